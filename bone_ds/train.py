"""The training run, from a config to an adapter on disk."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from bone_ds import activation, adapter_file, arch, checkpoint, checksums, ds_json, monitoring, out_of_memory, plan, publishing, resolution
from bone_ds import engine as engines
from bone_ds.arch import Architecture, Source
from bone_ds.bad_steps import BadSteps
from bone_ds.checkpoint import Found, Origin, Saved
from bone_ds.checksums import Checksums
from bone_ds.config import RunConfig, conflicts_with_steps, dump_yaml
from bone_ds.data import GlobalOrder, Samples, collate_chunks, deal, load_samples
from bone_ds.engine import Engine, Monitor
from bone_ds.errors import BoneError, CheckpointError, ConfigError, DataError
from bone_ds.evaluate import Evaluation, HeldOut
from bone_ds.inject import check, inject
from bone_ds.launch import Ranks
from bone_ds.objective import Objective
from bone_ds.plan import Plan
from bone_ds.progress import Progress, hold_log_lines, peak_memory_gib
from bone_ds.resolution import DTYPES
from bone_ds.run_directory import RunDirectory
from bone_ds.step import StepResult, learning_rate, optimizer_step
from bone_ds.stopping import StopRequest


@dataclass(frozen=True)
class RunResult:
    directory: Path
    steps: int
    train_loss: float
    """Of the last step."""
    eval_loss: float | None
    """The last one; None without held-out data or with train.eval_every: 0."""
    stopped: bool = False
    """Before its last step, as it was asked to; the checkpoint of `steps` is there."""


def train(config: RunConfig, ranks: Ranks, resume: bool | Path = False, force: bool = False,
          stop: StopRequest | None = None) -> RunResult:
    """Trains on this process's rank; every rank of the run calls it. Raises BoneError where the user can mend it.

    resume: True goes on from the run's last whole checkpoint, a path from that one. Nothing is written before config, data, model and
    adapter have been found usable, and the run to fit into memory; `force` starts one that the plan says will not. The run directory
    is rank 0's alone: it need not be there for other hosts. When any rank has been asked to stop, the step under way is finished and
    saved, and the run ends.
    """
    stop = stop or StopRequest()
    hold_log_lines()
    ds = ds_json.resolve(config, ranks.world_size)
    monitoring.check_installed(ds)
    engines.compiler_lock.check(ds)
    run = RunDirectory.planned(config)
    with engines.distributed(ranks), out_of_memory.explained(ranks.rank) as memory, ExitStack() as held:
        device = engines.device(ranks)  # before anything is sent: NCCL takes the current one
        engines.by_first(lambda: run.check(config, resume))
        torch.manual_seed(config.train.seed)
        architecture = arch.resolve(config.model)
        resolution.check(config, architecture)
        source = architecture.open(config.model)
        if not engines.agree(source.fingerprint):
            raise CheckpointError(f"model.path: {config.model.path}: the ranks found different weights; give every host the same model")
        config = resolution.resolve(config, architecture, source)
        samples, held_out_samples = _load_data(config, architecture, source, device)
        order = GlobalOrder(samples, config.data.packing, config.data.max_length, config.train.global_batch_size, config.train.seed)
        held_out = held_out_samples and HeldOut(
            held_out_samples, config.data.packing, config.data.max_length, ranks, device, config.train.chunk_length)
        steps = config.train.steps or order.steps_in_epochs(config.train.epochs or 1)
        for conflict in conflicts_with_steps(config.train, steps):
            raise ConfigError(conflict)
        planned, plan_lines = _plan(config, ranks, architecture, source, samples, order, device)
        if planned and planned.cannot_fit and not force:
            raise ConfigError(plan.refusal(planned))
        for line in plan_lines if ranks.is_first else ():
            print(line, flush=True)  # reading the weights takes a while, and the log is made after it
        memory.known(planned, partial(plan.of_run, config, ranks.world_size, architecture, source, samples, order, device.type,
                                      held_bytes=plan.process.resident_bytes()))
        base = Checksums(rank=ranks.local_rank, ranks=ranks.local_world_size)
        engine = build_engine(config, architecture, source, ds, device, base)
        engines.limit_waiting(config.train.collective_timeout_s)

        started = time.monotonic()
        base_crc32s = checksums.together(engines.gathered(base.values), f"model.path: {config.model.path}")
        header = adapter_file.header_of(config, architecture, source, step=0, base_crc32=checksums.record(base_crc32s))
        origin = checkpoint.Origin(header, samples.fingerprint(), dump_yaml(config), base_crc32s.keys())
        found = engines.by_first(lambda: _taken(run, held, resume, origin))
        first_step = found.step if found else 0
        if first_step > steps:
            raise ConfigError(f"--resume: the run has done {first_step} steps already, more than the {steps} now asked for")
        if found:
            checkpoint.load(found.path, engine)
        # Before the run directory is filled: Weights & Biases may be refused. The other ranks report nothing.
        reported_to = monitoring.placed(ds, run.path) if ranks.is_first else {}
        monitor = Monitor(reported_to, first_step if run.goes_on(resume) else None)
        beside = config.train.async_save if config.train.async_save is not None else device.type != "cpu"
        saver = held.enter_context(checkpoint.Saver(
            run.checkpoints, run.adapter, engine, origin, config.train.keep_checkpoints, config.train.keep_best, beside,
            lambda saved: _record_saved(run, saved)))

        def begin() -> None:
            if resume:
                checkpoint.settle(run.checkpoints, first_step, found.damaged if found else ())
            run.record_start(found and str(found.path.absolute()), step=first_step, steps=steps, world_size=ranks.world_size,
                             **_provenance(engine, source, samples, held_out_samples, order))
            run.create(config, ds)
            with publishing.writing(run.log), run.log.open("a", encoding="utf-8") as log:
                log.writelines(f"{line}\n" for line in plan_lines)

        engines.by_first(begin)
        if found:
            saver.complete(found.path)  # the run may have been killed between its last checkpoint and what follows that
        progress = Progress(run.log if ranks.is_first else None, steps, first_step)
        _announce(progress, engine, source, samples, held_out_samples, order)
        if device.type == "cpu" and (fields := ds_json.offloaded(ds)):
            progress.say(f"warning: zero_optimization.{' and '.join(fields)}: no memory is saved on a CPU, where all of it is the host's")
        if warning := resolution.context_warning(architecture, source, int(samples.lengths.max())):
            progress.say(warning)
        if resume and not found:
            progress.say("no checkpoint yet: begun anew")
        if found:
            more = "" if first_step < steps else ": nothing is left to do, ask for more train.steps or train.epochs"
            progress.say(f"resumed after step {first_step} of {steps}{more}")

        evaluation = _evaluate(held_out, engine, run, monitor, ranks, progress, first_step)
        result = None
        bad_steps = BadSteps(config, samples, run, progress)
        adapted = config.adapter.method != "full"  # a fresh model has layers behind zeros that get no gradient at first
        stop.keep()
        for step in range(first_step, steps):
            step_started = time.monotonic()
            window = order.window(step)
            hands = deal(window, ranks.rank, ranks.world_size, config.train.micro_batch_size, config.train.global_batch_size)
            dealt = [(chunk, hand) for hand in hands
                     for chunk in collate_chunks(samples, hand.units, device, config.train.chunk_length, hand.all_units)]
            batches, hand_of = map(list, zip(*dealt))
            rate = learning_rate(config.train, step, steps)
            done = step + 1
            with_norms = config.train.log_norms_every > 0 and done % config.train.log_norms_every == 0
            result = optimizer_step(engine, batches, window.label_tokens, rate, step == 0 and adapted, with_norms, stop.asked)
            step_s = time.monotonic() - step_started

            tokens = sum(window.unit_tokens)
            rates = tuple(count / step_s for count in (result.positions, tokens, window.label_tokens))
            progress.step(done, result.loss, rate, result.grad_norm, rates)
            if ranks.is_first:
                saver.check()
                _record_step(run, monitor, done, window, result, rate, step_s, rates)
            bad_steps.judge(done, result, window, hand_of, ranks.is_first)
            stops = result.stop_asked and done < steps
            evaluates = held_out and not stops and (done % config.train.eval_every == 0 or done == steps)
            if evaluates:
                evaluation = _evaluate(held_out, engine, run, monitor, ranks, progress, done)
            if done == steps or stops or config.train.save_every and done % config.train.save_every == 0:
                saver.save(done, evaluation.loss if evaluates else None)
            if stops:
                saver.finish()
                return _stopped(run, ranks, progress, stop, done, result, evaluation)

        saver.finish()
        train_s = time.monotonic() - started
        progress.say(f"done in {train_s:.0f} s: {run.adapter}")
        progress.say(f"`bone-ds merge {run.adapter} --out MODEL` makes a plain model of it")
        if ranks.is_first:
            run.record("end", step=steps, train_s=round(train_s, 3))
        return RunResult(run.path, steps, result.loss if result else math.nan, evaluation and evaluation.loss)


def _stopped(run: RunDirectory, ranks: Ranks, progress: Progress, stop: StopRequest, step: int, result: StepResult,
             evaluation: Evaluation | None) -> RunResult:
    """All ranks end together: launchers take it for a failure and end those that are left."""
    progress.say(f"stopped by {stop.signal_name or 'a signal to another rank'} after step {step}, which is saved; --resume goes on")
    if ranks.is_first:
        run.record("stop", step=step, signal=stop.signal_name)
    stop.heed()
    engines.barrier()
    return RunResult(run.path, step, result.loss, evaluation and evaluation.loss, stopped=True)


def build_engine(config: RunConfig, architecture: Architecture, source: Source, ds: dict, device: torch.device,
                 base: Checksums | None = None) -> Engine:
    """The model with its weights placed, the adapter injected, under DeepSpeed."""
    placement = engines.placement.choose(ds, device)
    with placement.empty():
        model = architecture.build(source, DTYPES[config.model.dtype])
    policy = ds_json.activation_policy(ds)
    check(model, architecture, config.adapter)  # before the weights are read
    activation.check(model, architecture, policy)
    architecture.load(model, source, placement, base)
    trainable = inject(model, architecture, config.adapter)
    activation.apply(model, architecture, policy)
    return Engine(Objective(model, architecture, config.train.loss_chunk, config.train.l2wrap), trainable, monitoring.without(ds))


def _plan(config: RunConfig, ranks: Ranks, architecture: Architecture, source: Source, samples: Samples, order: GlobalOrder,
          device: torch.device) -> tuple[Plan | None, list[str]]:
    """Made by rank 0 and told to all, with the lines that say it.

    None where the adapter doesn't fit the model, which `build_engine` says on every rank, and where planning itself fails: a run that
    could be trained is not to end for that.
    """
    planned, lines = None, []
    if ranks.is_first:
        try:
            planned = _planned(config, ranks, architecture, source, samples, order, device)
            lines = [plan.line(planned)] + [plan.warning(planned)] * (planned.fits is False)
        except BoneError:
            pass
        except Exception as error:
            lines = [f"plan: not possible: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    return engines.told_by_first((planned, lines))


def _planned(config: RunConfig, ranks: Ranks, architecture: Architecture, source: Source, samples: Samples, order: GlobalOrder,
             device: torch.device) -> Plan:
    held_bytes = plan.process.resident_bytes()
    capacity_bytes = plan.process.capacity_bytes(device.type, ranks.local_world_size)
    if device.type == "cpu":
        capacity_bytes += held_bytes
    host_capacity_bytes = plan.process.host_capacity_bytes(device.type, ranks.local_world_size)
    return plan.of_run(config, ranks.world_size, architecture, source, samples, order, device.type, capacity_bytes, held_bytes,
                       host_capacity_bytes)


def _load_data(config: RunConfig, architecture: Architecture, source: Source, device: torch.device) -> tuple[Samples, Samples | None]:
    tokenizer = architecture.tokenizer(source)
    splits = ("train", "eval") if config.data.eval and config.train.eval_every else ("train",)
    samples, *held_out = (_load_split(config, tokenizer, split, device) for split in splits)
    return samples, held_out[0] if held_out else None


def _load_split(config: RunConfig, tokenizer, split: Literal["train", "eval"], device: torch.device) -> Samples:
    samples = load_samples(config.data, tokenizer, split, config.model.cache_dir)
    if not engines.agree(samples.fingerprint()):
        raise DataError(f"data.{split}: the ranks read different samples; give every host the same files")
    # A source that any rank had to tokenise was not there before this start.
    tokenised = engines.total([float(not part.was_cached) for part in samples.parts], device)
    parts = tuple(replace(part, was_cached=not count) for part, count in zip(samples.parts, tokenised, strict=True))
    return replace(samples, parts=parts)


def _evaluate(held_out: HeldOut | None, engine: Engine, run: RunDirectory, monitor: Monitor, ranks: Ranks, progress: Progress, step: int):
    if held_out is None:
        return None
    evaluation = held_out.evaluate(engine)
    progress.say(f"step {step}  held-out loss {evaluation.loss:.4f}")
    if ranks.is_first:
        run.record("eval", step=step, **asdict(evaluation))
        monitor.write(step, {"eval/loss": evaluation.loss})
    return evaluation


def _announce(progress: Progress, engine: Engine, source: Source, samples: Samples, held_out: Samples | None, order: GlobalOrder) -> None:
    trainable = _trainable_parameters(engine)
    progress.say(f"model {source.origin}: {trainable:,} trainable parameters in {len(engine.trainable)} tensors, "
                 f"{engine.world_size} rank{'s' * (engine.world_size > 1)}")
    progress.say(f"train {samples.report}")
    for part, count in zip(samples.parts, order.epoch_counts):
        progress.say(f"  {part.name}, weight {part.weight:g}: {count:,} samples an epoch; {part.report}")
    if held_out:
        progress.say(f"held out {held_out.report}")
    parts = samples.parts + (held_out.parts if held_out else ())
    found = [part for part in parts if part.was_cached]
    if found:
        progress.say(f"tokenised by an earlier start: {len(found)} of {len(parts)} sources, read from {found[0].cached.parent}")


def _provenance(engine: Engine, source: Source, samples: Samples, held_out: Samples | None, order: GlobalOrder) -> dict:
    counts = order.epoch_counts or [part.count for part in samples.parts]
    return {
        "sources": [{"name": part.name, "commits": list(part.commits), "weight": part.weight, "samples": part.count,
                     "samples_per_epoch": count} for part, count in zip(samples.parts, counts, strict=True)],
        "trainable_parameters": _trainable_parameters(engine),
        "data": asdict(samples.report),
        "eval": held_out and asdict(held_out.report),
        "model": {"origin": source.origin, "revision": source.revision, "fingerprint": source.fingerprint},
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }


def _trainable_parameters(engine: Engine) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.trainable.values())


def _taken(run: RunDirectory, held: ExitStack, resume: bool | Path, origin: Origin) -> Found | None:
    """Takes the run directory for this process as long as `held` lasts; returns the checkpoint to go on from. Rank 0 calls it."""
    held.enter_context(run.locked(resume))
    if isinstance(resume, Path):
        if run.goes_on(resume) and checkpoint.step_of(resume.resolve()) is None:
            raise ConfigError(f"--resume: {resume} has no checkpoint's name, such as step-00000100, and would not be found again; "
                              f"give it one, or move it out of {run.checkpoints} and name a new output.directory")
        return Found(resume, checkpoint.given(resume, origin).step)
    if not resume:
        return None
    found = checkpoint.last_whole(run.checkpoints, origin)
    began_from = None if found else run.began_from()
    return Found(began_from, checkpoint.given(began_from, origin).step) if began_from else found


def _record_step(run: RunDirectory, monitor: Monitor, step: int, window, result: StepResult, rate: float, step_s: float, rates) -> None:
    positions, tokens, label_tokens = (round(value, 1) for value in rates)
    measured = {
        "loss": result.loss, "learning_rate": rate, "grad_norm": result.grad_norm, "step_s": round(step_s, 4),
        "positions_per_s": positions, "tokens_per_s": tokens, "label_tokens_per_s": label_tokens,
        "memory_gib": round(peak_memory_gib(), 3)}
    run.record("step", step=step, epoch=window.epoch, tokens=sum(window.unit_tokens), label_tokens=window.label_tokens, **measured)
    monitor.write(step, {f"train/{name}": value for name, value in measured.items()})
    if result.adapter_norms:
        _record_norms(run, monitor, step, {"gradient": result.gradient_norms, "adapter": result.adapter_norms})


def _record_norms(run: RunDirectory, monitor: Monitor, step: int, norms: dict[str, dict[str, float]]) -> None:
    run.record("norms", step=step, **norms)
    for what, by_tensor in norms.items():
        monitor.write(step, {f"{what}_norm/{name}": norm for name, norm in by_tensor.items()})


def _record_saved(run: RunDirectory, saved: Saved) -> None:
    run.record("checkpoint", step=saved.step, path=str(saved.path.relative_to(run.path)), held_out_loss=saved.held_out_loss,
               write_s=round(saved.write_s, 3))
