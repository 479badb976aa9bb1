"""One rank of one turn: the configuration set up as training does it, and its step measured."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bone_ds import arch, ds_json, out_of_memory, resolution
from bone_ds import engine as engines
from bone_ds.arch import Batch
from bone_ds.config import RunConfig
from bone_ds.data import GlobalOrder, collate_chunks, deal, load_samples
from bone_ds.data.order import Window
from bone_ds.engine import Engine
from bone_ds.launch import Ranks
from bone_ds.profile import kinds, memory
from bone_ds.profile.clock import ClockedEngine, wait
from bone_ds.profile.matrix_peak import matrix_peak_flops
from bone_ds.profile.measurement import Failure, Measurement, Step
from bone_ds.progress import hold_log_lines
from bone_ds.resolution import DTYPES
from bone_ds.step import learning_rate, optimizer_step
from bone_ds.train import build_engine

OUT_OF_MEMORY = 3
"""The exit code of a worker that could not allocate."""


def measure(config: RunConfig, ranks: Ranks, steps: int, instruments: bool, out: Path) -> int:
    """Writes a Measurement, or the Failure of memory that ran out, to `out`; returns the exit code. Every rank calls it.

    instruments: also the profiled and the counted step, and beside `out` what a viewer of traces reads.
    """
    if not ranks.is_first:
        hold_log_lines()  # the first says the same
    try:
        with engines.distributed(ranks):
            _measure(config, ranks, steps, instruments, out)
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory.is_cause(error):
            raise
        if not out.exists():
            Failure(f"does not fit: {(str(error) or type(error).__name__).splitlines()[0]}").write(out)
        return OUT_OF_MEMORY
    return 0


def _measure(config: RunConfig, ranks: Ranks, steps: int, instruments: bool, out: Path) -> None:
    device = engines.device(ranks)
    run = _Run(config, ranks, device)
    run.step(run.heaviest, run.engine)  # untimed: it makes the optimizer's state and fills the caches
    timed = [run.timed(run.order.window(step)) for step in range(steps)]
    resident_bytes, allocated_bytes, reserved_bytes = (run.largest(value) for value in _high_water_bytes(device))
    engines.barrier()  # the ranks share the machine in a step, and so they do here
    peak_flops = matrix_peak_flops(DTYPES[config.model.dtype], device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    timed_alone = Measurement(
        ranks.world_size, name, run.trainable_parameters, timed, resident_bytes, allocated_bytes, reserved_bytes, peak_flops, None, None)
    if ranks.is_first:
        timed_alone.write(out)  # the instruments need memory of their own, and may be killed for it
    engines.barrier()  # no rank fails before
    if instruments:
        # Beside the measurement, for viewers of such files.
        trace, snapshot = (out.with_suffix(ending) if ranks.is_first else None for ending in (".trace.json.gz", ".snapshot.pickle"))
        first = run.order.window(0)
        profiled = kinds.profiled(lambda: run.step(first, ClockedEngine(run.engine, device)), run.engine, run.adapted(), device, trace)
        with _recorded(device, snapshot):
            counted = memory.counted(lambda engine: run.step(run.heaviest, engine), run.engine, device)
        if ranks.is_first:
            replace(timed_alone, kinds=profiled, memory=counted).write(out)
    run.engine.deepspeed.destroy()


class _Run:
    """What `train` sets up, without a run directory."""

    def __init__(self, config: RunConfig, ranks: Ranks, device: torch.device):
        torch.manual_seed(config.train.seed)
        self.ranks, self.device = ranks, device
        architecture = arch.resolve(config.model)
        resolution.check(config, architecture)
        source = architecture.open(config.model)
        self.config = resolution.resolve(config, architecture, source)
        self.samples = load_samples(config.data, architecture.tokenizer(source), cache_dir=config.model.cache_dir)
        self.order = GlobalOrder(
            self.samples, config.data.packing, config.data.max_length, config.train.global_batch_size, config.train.seed)
        self.steps = config.train.steps or self.order.steps_in_epochs(config.train.epochs or 1)
        self.heaviest = self._heaviest()
        ds = ds_json.resolve(config, ranks.world_size)
        self.engine = build_engine(self.config, architecture, source, ds, device)

    def _heaviest(self) -> Window:
        """The window of the first epoch with the most tokens in one forward pass: the ranks are dealt the longest units first."""
        at_once = self.config.train.micro_batch_size * self.ranks.world_size
        windows = map(self.order.window, range(min(self.steps, self.order.steps_in_epochs(1))))
        return max(windows, key=lambda window: (sum(sorted(window.unit_tokens)[-at_once:]), window.label_tokens))

    def batches(self, window: Window) -> list[Batch]:
        train = self.config.train
        hands = deal(window, self.ranks.rank, self.ranks.world_size, train.micro_batch_size, train.global_batch_size)
        return [chunk for hand in hands
                for chunk in collate_chunks(self.samples, hand.units, self.device, train.chunk_length, hand.all_units)]

    def step(self, window: Window, engine: Engine | ClockedEngine) -> None:
        optimizer_step(engine, self.batches(window), window.label_tokens, learning_rate(self.config.train, 0, self.steps))

    def timed(self, window: Window) -> Step:
        engines.barrier()
        started = time.monotonic()
        batches = self.batches(window)
        wait(self.device)
        data_s = time.monotonic() - started
        engine = ClockedEngine(self.engine, self.device)
        result = optimizer_step(engine, batches, window.label_tokens, learning_rate(self.config.train, 0, self.steps))
        parts_s = {"data": data_s} | {part: engine.seconds(part) for part in ("forward", "backward", "optimizer")}
        parts_s["rest"] = time.monotonic() - started - sum(parts_s.values())
        return Step(parts_s, result.positions, sum(window.unit_tokens), window.label_tokens)

    def adapted(self) -> list[nn.Module]:
        """The layers with an adapter of their own; none where the model's own weights or states are trained."""
        if self.config.adapter.method not in ("bone", "lora"):
            return []
        names = dict.fromkeys(name.rpartition(".")[0] for name in self.engine.trainable)
        return [self.engine.deepspeed.module.model.get_submodule(name) for name in names]

    @property
    def trainable_parameters(self) -> int:
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.engine.trainable.values())

    def largest(self, value: int | None) -> int | None:
        """Of all ranks."""
        if value is None:
            return None
        mine = [float(value) if rank == self.ranks.rank else 0.0 for rank in range(self.ranks.world_size)]
        return int(max(engines.total(mine, self.device)))


def _high_water_bytes(device: torch.device) -> tuple[int, int | None, int | None]:
    """Resident set, and what torch's CUDA allocator gave and held."""
    resident_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type != "cuda":
        return resident_bytes, None, None
    return resident_bytes, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


@contextmanager
def _recorded(device: torch.device, snapshot: Path | None) -> Iterator[None]:
    """On a GPU the allocator's own history, for https://pytorch.org/memory_viz."""
    if device.type != "cuda" or snapshot is None:
        yield
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
