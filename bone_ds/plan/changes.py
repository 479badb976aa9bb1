"""Changes of the configuration that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bone_ds.config import RunConfig, validate
from bone_ds.errors import BoneError
from bone_ds.plan.report import Change, Plan

_MOST = 4
Replan = Callable[[RunConfig, int], Plan]
"""Of a changed configuration and number of ranks, with the batches that these are dealt."""


@dataclass(frozen=True)
class _Candidate:
    overrides: dict[str, object]
    note: str
    same_results: bool = True


def that_fit(planned: Plan, config: RunConfig, again: Replan) -> tuple[Change, ...]:
    """The first few that fit, by FLOPs added; those that change what is learnt come last."""
    found: list[Change] = []
    for candidate in _candidates(planned, config):
        if any(candidate.overrides.keys() == change.overrides.keys() for change in found):
            continue  # of the same fields the cheapest values are enough
        ranks = candidate.overrides.get("--ranks", planned.world_size)
        try:
            other = again(_changed(config, candidate.overrides), ranks)
        except BoneError:
            continue  # the configuration or the model has no such combination
        if other.peak_bytes <= planned.capacity_bytes and _host_has(planned, other.host_bytes):
            ratio = other.flops.total * ranks / max(1, planned.flops.total * planned.world_size)
            found.append(Change(
                candidate.overrides, other.peak_bytes, other.host_bytes, round(ratio, 3), candidate.same_results, candidate.note))
        if len(found) == _MOST:
            break
    return tuple(sorted(found, key=lambda change: (not change.same_results, change.flops_ratio)))


def _host_has(planned: Plan, host_bytes: int) -> bool:
    """Also where nobody said how much it has."""
    return planned.host_capacity_bytes is None or host_bytes <= planned.host_capacity_bytes


def _candidates(planned: Plan, config: RunConfig) -> Iterator[_Candidate]:
    """About by what they cost: first nothing, then communication, FLOPs, devices, and what is learnt."""
    train, adapter, ranks = config.train, config.adapter, planned.world_size
    if adapter.method == "bone" and adapter.strategy in ("materialized", "checkpointed"):
        yield _Candidate({"adapter.strategy": "auto"}, "the same results, no weight-sized tensor kept")
    if train.loss_chunk > 128:
        yield _Candidate({"train.loss_chunk": 128}, "the same results")
    # In chunks the length of one is what a forward pass has, whatever the batch.
    smaller_batches = train.micro_batch_size > 1 and not train.chunk_length
    if smaller_batches:
        yield _Candidate({"train.micro_batch_size": train.micro_batch_size // 2}, "the same results, smaller products")
    for stage in range(planned.stage + 1, 4):
        if ranks > 1:
            note = "the same results, more communication" if stage == 3 else "the same results"
            yield _Candidate({"deepspeed.config": f"zero{stage}"}, note)
    if train.activation_checkpointing in ("auto", "none"):
        if adapter.method == "bone" and adapter.strategy == "materialized":
            yield _Candidate({"train.activation_checkpointing": "bone"}, "W' is built again in backward")
        yield _Candidate(_recomputing(train, 2), "every second layer runs again in backward")
    if train.activation_checkpointing != "layer" or train.recompute_every not in (None, 1) or train.recompute_modules:
        yield _Candidate(_recomputing(train, 1), "every layer runs again in backward")
        if smaller_batches:
            yield _Candidate(_recomputing(train, 1) | {"train.micro_batch_size": 1}, "every layer runs again in backward")
    if planned.device != "cpu":  # on a CPU the host's memory is the device's, and more ranks share it
        if planned.stage < 3:
            yield _Candidate({"deepspeed.config": "zero2_offload"}, "the optimizer steps in host memory")
        yield _Candidate({"deepspeed.config": "zero3_offload"}, "every weight is copied from host memory twice a micro-batch")
        for more in (2 * ranks, 4 * ranks, 8 * ranks):
            stage_3 = {} if planned.stage == 3 else {"deepspeed.config": "zero3"}
            yield _Candidate({"--ranks": more} | stage_3, "more devices share the weights")
    if adapter.method == "full":
        yield _Candidate({"adapter.method": "bone"}, "trains an adapter alone", same_results=False)
    if train.chunk_length and train.chunk_length >= 32:
        yield _Candidate({"train.chunk_length": train.chunk_length // 2}, "the gradient is cut more often", same_results=False)
    elif config.data.max_length >= 128:
        yield _Candidate({"data.max_length": config.data.max_length // 2}, "longer samples are cut", same_results=False)


def _recomputing(train, every: int) -> dict[str, object]:
    whole_layers = {"train.recompute_modules": None} if train.recompute_modules else {}
    return {"train.activation_checkpointing": "layer", "train.recompute_every": every} | whole_layers


def _changed(config: RunConfig, overrides: dict[str, object]) -> RunConfig:
    """Raises ConfigError for what can't be combined."""
    tree = config.model_dump(exclude_unset=True)
    for field, value in overrides.items():
        section, _, name = field.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
    return validate(tree, "the changed configuration")
