"""What `bone-ds plan` says beside what the real engine takes: live tensors at their peak, and the process's resident set at its highest.

Each configuration is planned by the installed command line and then run in fresh processes of the real engine for 2 optimizer steps and
a checkpoint; of its ranks the one that takes most counts. The plan's constants are fitted on eighteen configurations alone. The other eight
are for a plan that is frozen: once a constant is changed with their figures in view, they are held out no longer, and others are to be
chosen. The models: SmolLM2-135M and an RWKV6 of 3M parameters, both trained, and random ones of 0.1 to 0.2 billion parameters.

    python benchmarks/plan_against_measured.py --smollm2 DIR --rwkv6 FILE.pth --rows GSM8K.jsonl --text FILE.txt --work DIR
        [--only calibration|held_out] [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from rows import Results, Row, parser

SMOLLM2, TINY_RWKV6, RWKV6, LLAMA = "SmolLM2-135M", "RWKV6-3M", "random RWKV6", "random Llama"
LIVE_BOUND, RESIDENT_BOUND = 0.03, 0.10


@dataclass(frozen=True)
class Case:
    model: str
    stage: int
    ranks: int
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, ZeRO-{self.stage}, {self.ranks} ranks, {' '.join(change.partition('.')[2] for change in self.changes)}"


CALIBRATION = (
    Case(SMOLLM2, 2, 1, ("model.dtype=bf16", "adapter.grouping=row")),
    Case(SMOLLM2, 1, 2, ("model.dtype=bf16", "adapter.method=lora", "adapter.rank=32")),
    Case(SMOLLM2, 0, 1, ("model.dtype=fp32", "adapter.grouping=col", "data.packing=false", "train.micro_batch_size=2")),
    Case(TINY_RWKV6, 3, 2, ("model.dtype=fp32", "adapter.grouping=row")),
    Case(RWKV6, 2, 1, ("model.dtype=bf16", "adapter.grouping=row", "train.chunk_length=128")),
    Case(RWKV6, 1, 1, ("model.dtype=bf16", "adapter.strategy=materialized", "train.activation_checkpointing=layer")),
    Case(LLAMA, 3, 2, ("model.dtype=bf16", "adapter.grouping=row", "train.activation_checkpointing=layer")),
    Case(LLAMA, 2, 2, ("model.dtype=bf16", "adapter.strategy=materialized", "train.activation_checkpointing=bone")),
    Case(SMOLLM2, 3, 2, ("model.dtype=bf16", "adapter.grouping=left")),
    Case(SMOLLM2, 2, 1, ("model.dtype=bf16", "adapter.strategy=materialized", "train.activation_checkpointing=layer",
                         "train.recompute_every=2")),
    Case(SMOLLM2, 2, 2, ("model.dtype=fp32", "adapter.grouping=row", "train.activation_checkpointing=layer")),
    Case(TINY_RWKV6, 0, 1, ("model.dtype=fp32", "adapter.method=lora", "adapter.rank=8", "data.packing=false", "train.micro_batch_size=4")),
    Case(RWKV6, 2, 2, ("model.dtype=bf16", "adapter.grouping=col")),
    Case(RWKV6, 3, 2, ("model.dtype=bf16", "adapter.grouping=left", "train.activation_checkpointing=layer")),
    Case(LLAMA, 1, 1, ("model.dtype=fp32", "adapter.method=lora", "adapter.rank=32", "train.activation_checkpointing=layer")),
    Case(LLAMA, 0, 2, ("model.dtype=bf16", "adapter.grouping=row", "data.packing=false", "train.micro_batch_size=4")),
    Case(SMOLLM2, 0, 2, ("model.dtype=bf16", "adapter.grouping=col", "data.max_length=256", "train.micro_batch_size=2")),
    Case(SMOLLM2, 1, 1, ("model.dtype=fp32", "adapter.grouping=left", "data.max_length=384", "train.activation_checkpointing=layer",
                         "train.recompute_every=3")),
)
HELD_OUT = (
    Case(SMOLLM2, 2, 2, ("model.dtype=bf16", "adapter.method=lora", "adapter.rank=16", "data.max_length=256", "train.micro_batch_size=2")),
    Case(SMOLLM2, 0, 1, ("model.dtype=fp32", "adapter.grouping=row", "data.max_length=384", "train.activation_checkpointing=layer",
                         "train.recompute_every=2")),
    Case(SMOLLM2, 3, 2, ("model.dtype=fp32", "adapter.method=lora", "adapter.rank=16", "data.max_length=256")),
    Case(TINY_RWKV6, 1, 2, ("model.dtype=fp32", "adapter.grouping=col", "data.max_length=1024")),
    Case(TINY_RWKV6, 2, 1, ("model.dtype=bf16", "adapter.strategy=materialized", "train.activation_checkpointing=bone",
                            "train.micro_batch_size=2")),
    Case(RWKV6, 0, 1, ("model.dtype=bf16", "adapter.method=lora", "adapter.rank=32", "data.packing=false", "train.micro_batch_size=2")),
    Case(RWKV6, 3, 2, ("model.dtype=fp32", "adapter.grouping=row", "data.max_length=256", "train.activation_checkpointing=layer",
                       "train.recompute_every=2")),
    Case(LLAMA, 2, 1, ("model.dtype=fp32", "adapter.grouping=left", "train.micro_batch_size=2")),
)
KINDS = {"calibration": CALIBRATION, "held_out": HELD_OUT}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        return _worker(Path(sys.argv[2]), Path(sys.argv[3]))
    given = parser(__doc__, "the first case of either architecture")
    given.add_argument("--smollm2", type=Path, required=True, help="its Hugging Face directory")
    given.add_argument("--rwkv6", type=Path, required=True, help="a small .pth over bytes of UTF-16LE")
    given.add_argument("--rows", type=Path, required=True, help=".jsonl of question and answer")
    given.add_argument("--text", type=Path, required=True)
    given.add_argument("--work", type=Path, required=True, help="directory for random models")
    given.add_argument("--only", choices=KINDS)
    options = given.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    cases = [case for kind, cases in KINDS.items() if options.only in (None, kind) for case in cases]
    if options.quick:
        cases = [next(case for case in cases if case.model == model) for model in (SMOLLM2, TINY_RWKV6)]
    results = Results(options.json, {"steps": 2}, ("torch", "deepspeed"), options.fresh)
    rows = []
    for case in cases:
        measured = results.once(case.name, lambda case=case: _measure(case, options))
        rows += _rows(case, measured)
        results.write(rows)
    results.finish(rows)


def _rows(case: Case, measured: dict) -> list[Row]:
    kind = next(kind for kind, cases in KINDS.items() if case in cases).replace("_", " ")
    rows = []
    for what, bound in (("live", LIVE_BOUND), ("resident", RESIDENT_BOUND)):
        planned, taken = measured[f"planned_{what}_bytes"], measured[f"{what}_bytes"]
        rows.append(Row(f"{case.name}: {what}", planned / taken, "ratio", f"{taken / 2**20:.0f} MiB measured, {kind}",
                        at_least=1 - bound, at_most=1 + bound))
    return rows


def _measure(case: Case, options) -> dict:
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        config, worked = Path(directory) / "run.yaml", Path(directory) / "worked"
        config.write_text(yaml.safe_dump(_config(case, options, Path(directory))), encoding="utf-8")
        changed = [f"deepspeed.config=zero{case.stage}", *case.changes]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        planned = json.loads(subprocess.run(
            [sys.executable, "-m", "bone_ds", "plan", str(config), *changed, "--ranks", str(case.ranks), "--device", "cpu", "--json"],
            capture_output=True, text=True, check=True, env=environment).stdout)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.ranks)]
        resolved = Path(directory) / "resolved.yaml"
        shown = [sys.executable, "-m", "bone_ds", "config", str(config), *changed]
        resolved.write_text(subprocess.run(shown, capture_output=True, text=True, check=True, env=environment).stdout, encoding="utf-8")
        subprocess.run([*torchrun, __file__, "--worker", str(resolved), str(worked)], check=True, env=environment, capture_output=True)
        taken = [json.loads(path.read_text()) for path in Path(directory).glob("worked.*")]
    assert len(taken) == case.ranks
    return {"planned_live_bytes": planned["live_peak_bytes"], "planned_resident_bytes": planned["peak_bytes"],
            "live_bytes": max(one["live_bytes"] for one in taken), "resident_bytes": max(one["resident_bytes"] for one in taken),
            "planned": planned["by_component"], "phases": taken[0]["phases"]}


def _config(case: Case, options, directory: Path) -> dict:
    import random_models

    random_models.RWKV6["plan"] = random_models.Sizes(layers=12, width=768, attention_width=768, heads=12, ffn_width=2688,
                                                      vocabulary=65536, mix_rank=32, decay_rank=64)
    random_models.LLAMA["plan"] = {"hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 2816, "num_attention_heads": 16,
                                   "vocab_size": 2000}
    rows = {"train": str(options.rows), "fields": {"query": "question", "response": "answer"}, "max_length": 512, "train_samples": 400}
    if case.model == TINY_RWKV6:
        rows = {"train": str(options.text), "prompt": "text", "max_length": 512}
    paths = {SMOLLM2: lambda: options.smollm2, TINY_RWKV6: lambda: options.rwkv6,
             RWKV6: lambda: random_models.write_rwkv6("plan", options.work),
             LLAMA: lambda: random_models.write_llama("plan", options.work, options.text)}
    return {
        "model": {"path": str(paths[case.model]())} | ({"tokenizer": "utf-16le"} if case.model == TINY_RWKV6 else {}),
        "adapter": {"rank": 32 if case.model == TINY_RWKV6 else 64}, "data": rows,
        "train": {"steps": 2, "global_batch_size": 8, "learning_rate": 1e-4},
        "output": {"directory": str(directory / "run")}}


def _worker(config_path: Path, out: Path) -> None:
    """One rank: two steps and a checkpoint, as training does them."""
    from bone_ds import adapter_file, arch, checkpoint, ds_json, launch
    from bone_ds import engine as engines
    from bone_ds.config import dump_yaml, load_config
    from bone_ds.data import GlobalOrder, collate_chunks, deal, load_samples
    from bone_ds.live import LiveMemory
    from bone_ds.step import optimizer_step
    from bone_ds.train import build_engine

    ranks = launch.current()
    config = load_config(config_path)
    train = config.train
    ds = ds_json.resolve(config, ranks.world_size)
    with engines.distributed(ranks):
        device = engines.device(ranks)
        architecture = arch.resolve(config.model)
        source = architecture.open(config.model)
        samples = load_samples(config.data, architecture.tokenizer(source))
        order = GlobalOrder(samples, config.data.packing, config.data.max_length, train.global_batch_size, train.seed)
        phases = {"before": _resident_bytes()}
        live = LiveMemory()
        with live:
            engine = build_engine(config, architecture, source, ds, device)
            phases["built"] = _resident_bytes()
            live.reset_peak()
            for step in range(train.steps):
                window = order.window(step)
                hands = deal(window, ranks.rank, ranks.world_size, train.micro_batch_size, train.global_batch_size)
                batches = [chunk for hand in hands
                           for chunk in collate_chunks(samples, hand.units, device, train.chunk_length, hand.all_units)]
                optimizer_step(engine, batches, window.label_tokens, train.learning_rate)
            live_bytes, phases["stepped"] = live.peak_bytes, _resident_bytes()
        origin = checkpoint.Origin(adapter_file.header_of(config, architecture, source, step=0), samples.fingerprint(), dump_yaml(config))
        checkpoint.Saver(out.parent / "checkpoints", out.parent / "adapter.safetensors", engine, origin, keep=1).save(train.steps)
        phases["saved"] = _resident_bytes()
    Path(f"{out}.{ranks.rank}").write_text(json.dumps({"live_bytes": live_bytes, "resident_bytes": phases["saved"], "phases": phases}))


def _resident_bytes() -> int:
    """The high-water mark."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
