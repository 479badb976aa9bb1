"""Runs cases on several ranks: `run` starts torchrun on this file, which runs them one after another in one process group.

Starting ranks costs ten seconds of imports, a case less than one. A case is {"run": function of this file, "config":
tree, more of the function's arguments}; its outcome is what rank 0 returns, or {"error": text} for a BoneError.
"""

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

TIMEOUT_S = 600


def run(cases: dict[str, dict], world_size: int, directory: Path) -> dict[str, dict]:
    """Outcomes by the cases' names. Nothing but our own progress may be printed, and there is none here."""
    given, outcomes = directory / "cases.json", directory / "outcomes.json"
    given.write_text(json.dumps(cases), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    # On the CPU even where there are GPUs: two ranks can't share one.
    # One thread each: the models are tiny, and threads that wait for each other on a busy machine are many times slower.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, __file__, given, outcomes], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "", done.stdout
    return json.loads(outcomes.read_text(encoding="utf-8"))


def _main() -> None:
    import faulthandler
    import warnings

    from bone_ds import engine as engines
    from bone_ds import launch
    from bone_ds.errors import BoneError

    faulthandler.enable()  # a rank that is aborted says where
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DeprecationWarning)  # all from inside torch and deepspeed
    given, outcomes_path = map(Path, sys.argv[1:])
    ranks = launch.current()
    outcomes = {}
    with engines.distributed(ranks):
        for name, case in json.loads(given.read_text(encoding="utf-8")).items():
            started = time.monotonic()
            try:
                outcomes[name] = globals()[case.pop("run")](ranks, **case)
            except BoneError as error:
                outcomes[name] = {"error": f"{type(error).__name__}: {error}"}
            outcomes[name]["seconds"] = time.monotonic() - started
    if ranks.is_first:
        outcomes_path.write_text(json.dumps(outcomes), encoding="utf-8")


def train(ranks, config: dict, resume: str | None = None, checkpoints: str | None = None, second_step: str | None = None) -> dict:
    """As `bone_ds.train.train`, in a process group that is there already and without a run directory.

    With `checkpoints` it saves there after step 3 and goes on, with train.async_save before that is written; with `resume`, a
    checkpoint, it starts from that. At the end the fp32 adapter is written beside the run's would-be directory. The second step is left
    out, or the last rank has in it an `infinite loss` of finite gradient or a `NaN gradient` of finite loss.
    """
    import torch
    from safetensors.torch import save_file

    from bone_ds import adapter_file, arch, checkpoint, ds_json
    from bone_ds import engine as engines
    from bone_ds.config import dump_yaml, validate
    from bone_ds.data import GlobalOrder, collate_chunks, deal, load_samples
    from bone_ds.evaluate import HeldOut
    from bone_ds.step import learning_rate, optimizer_step
    from bone_ds.train import build_engine

    config = validate(config, "case")
    ds = ds_json.resolve(config, ranks.world_size)
    device = engines.device(ranks)
    architecture = arch.resolve(config.model)
    source = architecture.open(config.model)
    samples = load_samples(config.data, architecture.tokenizer(source))
    order = GlobalOrder(samples, config.data.packing, config.data.max_length, config.train.global_batch_size, config.train.seed)
    held_out = HeldOut(samples, config.data.packing, config.data.max_length, ranks, device, config.train.chunk_length)
    torch.manual_seed(config.train.seed)
    engine = build_engine(config, architecture, source, ds, device)
    gradients = _recorded(engine)
    origin = checkpoint.Origin(adapter_file.header_of(config, architecture, source, 0), samples.fingerprint(), dump_yaml(config))
    saver = checkpoints and checkpoint.Saver(Path(checkpoints), Path(f"{checkpoints}.safetensors"), engine, origin, keep=2,
                                             beside=bool(config.train.async_save))
    first = 0
    if resume:
        first = checkpoint.given(Path(resume), origin).step
        checkpoint.load(Path(resume), engine)
    outcome = {"losses": [], "norms": [], "units": [], "gathered": 0, "evaluations": [held_out.evaluate(engine).loss]}
    for step in range(first, config.train.steps):
        window = order.window(step)
        hands = deal(window, ranks.rank, ranks.world_size, config.train.micro_batch_size, config.train.global_batch_size)
        batches = [chunk for hand in hands
                   for chunk in collate_chunks(samples, hand.units, device, config.train.chunk_length, hand.all_units)]
        rate = learning_rate(config.train, step, config.train.steps)
        if step == 1 and second_step == "left out":
            continue
        engine.losses = partial(_losses, engine, second_step if step == 1 and ranks.rank == ranks.world_size - 1 else None)
        result = optimizer_step(engine, batches, window.label_tokens, rate, check_gradients=step == 0,
                                with_norms=step + 1 == config.train.steps)
        del engine.losses
        outcome["losses"].append(result.loss)
        outcome["norms"].append(result.grad_norm)
        outcome["units"].append(len(window.units))
        outcome["gathered"] += _gathered(engine, device)
        if step + 1 == 3:
            outcome["evaluations"].append(held_out.evaluate(engine).loss)
            outcome["gathered"] += _gathered(engine, device)
            if saver:
                saver.save(step + 1, outcome["evaluations"][-1])
    if saver:
        saver.finish()
    outcome["first_gradients_norm"] = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    outcome["gradient_norms"], outcome["adapter_norms"] = result.gradient_norms, result.adapter_norms
    outcome["masters"] = config.output.directory + ".safetensors"
    masters = engine.gather("master")
    if ranks.is_first:
        save_file(masters, outcome["masters"])
    engine.deepspeed.destroy()
    return outcome


def _losses(engine, fault, batches):
    """In place of the engine's own."""
    for loss in type(engine).losses(engine, batches):
        loss = loss + float("inf") if fault == "infinite loss" else loss * 1
        if fault == "NaN gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        yield loss


def seen(ranks, config: dict, cache_dir: str | None = None) -> dict:
    """The units that all ranks together are dealt in the steps of two epochs, sorted; and of which ranks the samples were cached."""
    import torch.distributed as dist

    from bone_ds import arch
    from bone_ds.config import validate
    from bone_ds.data import GlobalOrder, deal, load_samples

    config = validate(config, "case")
    architecture = arch.resolve(config.model)
    samples = load_samples(config.data, architecture.tokenizer(architecture.open(config.model)), cache_dir=cache_dir)
    train, data = config.train, config.data
    order = GlobalOrder(samples, data.packing, data.max_length, train.global_batch_size, train.seed)
    mine = []
    for step in range(order.steps_in_epochs(2)):
        hands = deal(order.window(step), ranks.rank, ranks.world_size, train.micro_batch_size, train.global_batch_size)
        mine.append([unit for hand in hands for unit in hand.units])
    everyones, cached = [None] * ranks.world_size, [None] * ranks.world_size
    dist.all_gather_object(everyones, mine)
    dist.all_gather_object(cached, [part.was_cached for part in samples.parts])
    units = [sorted(unit for rank_units in step for unit in rank_units) for step in zip(*everyones, strict=True)]
    return {"units": units, "steps_in_an_epoch": order.steps_in_epochs(1), "cached": cached, "fingerprint": samples.fingerprint()}


def _recorded(engine) -> dict:
    """Every gradient that the engine is asked for, by name."""
    gradients, gradient_of = {}, engine.gradient
    engine.gradient = lambda name: gradients.setdefault(name, gradient_of(name).clone())
    return gradients


def _gathered(engine, device) -> int:
    """Frozen parameters that are whole under ZeRO-3, counted over the ranks."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from bone_ds import engine as engines

    whole = 0
    for parameter in engine.deepspeed.module.parameters():
        if hasattr(parameter, "ds_id") and not parameter.requires_grad:
            whole += parameter.numel() > 0 or parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE
    return int(engines.total([whole], device)[0])


def load_memory(ranks, config: dict) -> dict:
    """Anonymous memory of each rank while a model is built and loaded, above what the process held before."""
    import torch.distributed as dist

    from bone_ds import arch, ds_json
    from bone_ds import engine as engines
    from bone_ds.config import validate
    from bone_ds.train import DTYPES

    config = validate(config, "case")
    dtype = DTYPES[config.model.dtype]
    architecture = arch.resolve(config.model)
    source = architecture.open(config.model)
    placement = engines.placement.choose(ds_json.resolve(config, ranks.world_size), engines.device(ranks))
    engines.total([0.0], engines.device(ranks))  # gloo's own buffers
    with _Peak() as peak:
        with placement.empty():
            model = architecture.build(source, dtype)
        architecture.load(model, source, placement)
    rises = [None] * ranks.world_size
    dist.all_gather_object(rises, peak.rise_bytes)
    sizes = [parameter.ds_numel * dtype.itemsize for parameter in model.parameters()]
    return {"rises_bytes": rises, "weights_bytes": sum(sizes), "largest_bytes": max(sizes)}


class _Peak:
    """The high-water mark of this process's anonymous memory within a block, looked at every 2 ms."""

    def __enter__(self):
        self.before = self.highest = _anonymous_bytes()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.stopped.wait(0.002):
            self.highest = max(self.highest, _anonymous_bytes())

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        self.rise_bytes = self.highest - self.before


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    _main()
