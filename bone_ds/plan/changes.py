"""Changes of the configuration that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bone_ds.config import RunConfig
from bone_ds.errors import BoneError
from bone_ds.plan.report import Change, Plan
from bone_ds.plan.trace import Shape

_MOST = 4
Replan = Callable[[RunConfig, int, Shape], Plan]


def that_fit(planned: Plan, config: RunConfig, shape: Shape, again: Replan) -> tuple[Change, ...]:
    """The first few that fit: those without a cost first, then by FLOPs added, and last those that change what is learnt."""
    found = []
    for overrides, note, changed, ranks, its_shape in _candidates(planned, config, shape):
        try:
            other = again(changed, ranks, its_shape)
        except BoneError:
            continue
        if other.peak_bytes <= planned.capacity_bytes:
            ratio = other.flops.total * ranks / max(1, planned.flops.total * planned.world_size)
            found.append(Change(overrides, other.peak_bytes, round(ratio, 3), note))
        if len(found) == _MOST:
            break
    return tuple(found)


def _candidates(planned: Plan, config: RunConfig, shape: Shape) -> Iterator[tuple[dict, str, RunConfig, int, Shape]]:
    train, adapter, ranks = config.train, config.adapter, planned.world_size
    if adapter.method == "bone" and adapter.strategy in ("materialized", "checkpointed"):
        yield _changed(config, ranks, shape, {"adapter.strategy": "auto"}, "the same results, no weight-sized tensor kept")
    if train.loss_chunk > 128:
        yield _changed(config, ranks, shape, {"train.loss_chunk": 128}, "the same results")
    if train.micro_batch_size > 1:
        half = train.micro_batch_size // 2
        smaller = Shape(_first_half(shape.document_lengths), shape.label_tokens // 2, shape.continues)
        if train.global_batch_size % (half * ranks) == 0:
            yield _changed(config, ranks, smaller, {"train.micro_batch_size": half}, "the same results, smaller products")
    for stage in range(planned.stage + 1, 4):
        if ranks > 1:
            yield _changed(config, ranks, shape, {"deepspeed.config": f"zero{stage}"}, "the same results, more communication"
                           if stage == 3 else "the same results")
    if train.activation_checkpointing in ("auto", "none"):
        if adapter.method == "bone" and adapter.strategy == "materialized":
            yield _changed(config, ranks, shape, {"train.activation_checkpointing": "bone"}, "W' is built again in backward")
        yield _changed(config, ranks, shape, {"train.activation_checkpointing": "layer", "train.recompute_every": 2},
                       "every second layer runs again in backward")
    if train.activation_checkpointing != "layer" or train.recompute_every not in (None, 1):
        yield _changed(config, ranks, shape, {"train.activation_checkpointing": "layer", "train.recompute_every": 1},
                       "every layer runs again in backward")
        if train.micro_batch_size > 1 and train.global_batch_size % ranks == 0:
            single = Shape(shape.document_lengths[:1], min(shape.label_tokens, shape.document_lengths[0]), shape.continues)
            yield _changed(config, ranks, single, {"train.activation_checkpointing": "layer", "train.recompute_every": 1,
                                                   "train.micro_batch_size": 1}, "every layer runs again in backward")
    for more in (2 * ranks, 4 * ranks, 8 * ranks):
        if train.global_batch_size % (train.micro_batch_size * more) == 0:
            changes = {"--ranks": more} | ({} if planned.stage == 3 else {"deepspeed.config": "zero3"})
            yield _changed(config, more, shape, changes, "more devices share the weights")
    if adapter.method == "full":
        yield _changed(config, ranks, shape, {"adapter.method": "bone"}, "trains an adapter alone")
    if config.data.max_length >= 128:
        half = config.data.max_length // 2
        shorter = Shape(_first_half(shape.document_lengths), shape.label_tokens // 2, shape.continues)
        yield _changed(config, ranks, shorter, {"data.max_length": half}, "longer samples are cut")


def _changed(config: RunConfig, ranks: int, shape: Shape, overrides: dict[str, object], note: str):
    for field, value in overrides.items():
        if field == "--ranks":
            continue
        section, _, name = field.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return overrides, note, config, ranks, shape


def _first_half(document_lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Documents of the first half of the tokens."""
    budget, lengths = sum(document_lengths) // 2, []
    for length in document_lengths:
        if budget > 0:
            lengths.append(min(length, budget))
            budget -= length
    return tuple(lengths)
