"""One optimizer step over the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from bone_ds import engine as engines
from bone_ds.arch import Batch
from bone_ds.config import TrainConfig
from bone_ds.engine import Engine
from bone_ds.errors import InjectionError


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean cross entropy over the loss-bearing tokens of the global batch, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    positions: int
    """Token positions computed over all ranks, idle ranks' included."""
    gradient_norms: dict[str, float] = field(default_factory=dict)
    """By adapter tensor, before clipping; empty unless asked for."""
    adapter_norms: dict[str, float] = field(default_factory=dict)
    """By adapter tensor, after the step, rounded to the model's dtype below ZeRO-3; empty unless asked for."""
    stop_asked: bool = False
    """Of any rank."""
    bad_batches: tuple[int, ...] = ()
    """Numbers of this rank's batches whose loss is NaN or infinite."""

    @property
    def is_finite(self) -> bool:
        """Otherwise weights, moments and AdamW's step count are those from before the step, on every rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def optimizer_step(engine: Engine, batches: list[Batch], label_tokens: int, learning_rate: float,
                   check_gradients: bool = False, with_norms: bool = False,
                   stop_asked: Callable[[], bool] = lambda: False) -> StepResult:
    """Trains on this rank's micro-batches of one global batch that holds `label_tokens` loss-bearing tokens in all.

    Every rank brings the same number of batches; one without labels still runs. Micro-batches may be cut into chunks that
    continue each other: the state is carried, the gradient through it is not. The gradient is that of the mean
    over the global batch: ranks average, so each scales its sums by world_size / label_tokens. With `check_gradients`,
    raises InjectionError naming a layer whose adapter received no gradient. `with_norms` fills in the norms by tensor. `stop_asked`
    is asked on every rank; the answers travel with the loss, so that all ranks know after the same step.
    """
    losses = []
    for index, loss in enumerate(engine.losses(batches)):
        # An infinite loss may have a finite gradient: multiplied by NaN it has none, and then no rank takes the step.
        scale = loss.detach() * 0 + engine.world_size / label_tokens
        engine.backward(loss * scale, boundary=index == len(batches) - 1)
        losses.append(float(loss.detach()))
    if check_gradients:
        _check_every_layer_learns(engine)
    gradient_norms = engine.gradient_norms() if with_norms else {}
    grad_norm = engine.update(learning_rate)
    adapter_norms = engine.adapter_norms() if with_norms else {}
    positions = sum(batch.tokens.numel() for batch in batches)
    loss_sum, positions, asked = engines.total([sum(losses), positions, stop_asked()], batches[0].tokens.device)
    bad_batches = tuple(number for number, loss in enumerate(losses) if not math.isfinite(loss))
    return StepResult(loss_sum / label_tokens, grad_norm, int(positions), gradient_norms, adapter_norms, asked > 0, bad_batches)


def _check_every_layer_learns(engine: Engine) -> None:
    """A layer learns where one of its adapter's tensors has a gradient: LoRA's first one has none at the start.

    A gradient that is not finite is none of this: it comes from above, and so all layers have it.
    """
    learns: dict[str, bool] = {}
    for name in engine.trainable:
        layer = name.rpartition(".")[0]
        gradient = engine.gradient(name)
        learns[layer] = learns.get(layer, False) or gradient is not None and bool(gradient.any())
    for layer in (layer for layer, does in learns.items() if not does):
        raise InjectionError(
            f"{layer}: its adapter received no gradient in the first step\n"
            "It stands before weights that are zero, as in a new model; train that with adapter.method: full first")


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then the configured course.

    The last step's rate lies one step before the end of the course, so a course to 0 still moves at its last step. The courses are
    those of transformers.get_scheduler and torch's ExponentialLR, as pure functions: a resumed run has no scheduler to restore.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = (step - train.warmup_steps) / max(1, steps - train.warmup_steps)
    if train.schedule == "exponential":
        return train.learning_rate * train.final_lr_ratio**progress
    if train.schedule == "cosine_restarts":
        progress = _within_cycle(step - train.warmup_steps, steps - train.warmup_steps, train.cycles or 2)
    shape = 1 - progress if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate * (train.final_lr_ratio + (1 - train.final_lr_ratio) * shape)


def _within_cycle(step: int, steps: int, cycles: int) -> float:
    """How far its cycle is at `step` of `steps`; in whole numbers, since rounding would take a cycle's start for the end of another."""
    return 1.0 if step >= steps else step * cycles % steps / steps
