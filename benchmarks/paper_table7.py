"""The plan beside the paper's Table 7, which was measured on GPUs: nothing of it is measured here.

The live tensors of each row are planned from its shapes, for the paper's trainer: one sequence of 512 tokens a GPU, bf16, ZeRO-1 with
buckets of 200M elements, whole logits and L2Wrap. What a device reads beyond live tensors (the CUDA context, the allocator's slack,
the libraries' workspaces) is one constant, the mean over the three rows of RWKV6-1.6B on 1 GPU; those of RWKV6-3B are then predicted. The
rows on 4 GPUs and those with model checkpointing have no target.

    python benchmarks/paper_table7.py [--quick] [--json FILE]
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from rows import Results, Row, parser

from bone_ds import arch, ds_json
from bone_ds.config import validate
from bone_ds.objective import Objective
from bone_ds.plan import memory, trace

MIB = 2**20
TOKENS = 512
LORA, BONE = ("adapter.method=lora", "adapter.rank=32"), ("adapter.rank=64", "adapter.strategy=materialized")
CHECKPOINT, FACTORED = ("adapter.rank=64", "adapter.strategy=checkpointed"), ("adapter.rank=64", "adapter.strategy=factored")
LAYERS = ("train.activation_checkpointing=layer",)


@dataclass(frozen=True)
class PaperRow:
    name: str
    size: str
    changes: tuple[str, ...]
    gpus: int = 1
    published: int | None = None
    """The table's figure."""
    predicted: bool = False


ROWS = (
    PaperRow("1.6B LoRA", "1B6", LORA, published=7314),
    PaperRow("1.6B Bone", "1B6", BONE, published=12276),
    PaperRow("1.6B Bone (checkpoint)", "1B6", CHECKPOINT, published=7398),
    PaperRow("1.6B Bone (model checkpoint)", "1B6", BONE + LAYERS, published=7398),
    PaperRow("1.6B row factored", "1B6", FACTORED),
    PaperRow("3B LoRA", "3B", LORA, published=12074, predicted=True),
    PaperRow("3B Bone", "3B", BONE, published=22978, predicted=True),
    PaperRow("3B Bone (checkpoint)", "3B", CHECKPOINT, published=12168, predicted=True),
    PaperRow("3B row factored", "3B", FACTORED),
    PaperRow("3B LoRA (model checkpoint), 4 GPUs", "3B", LORA + LAYERS, gpus=4, published=15328),
    PaperRow("3B Bone (model checkpoint), 4 GPUs", "3B", BONE + LAYERS, gpus=4, published=15305),
)
"""Of arXiv 2409.15371, Table 7, in MiB as nvidia-smi reads them. The paper prints no batch size for 4 GPUs, and doubtful figures: the
model checkpoint of 1.6B equals the row above it."""
CALIBRATION = ROWS[:3]
BOUND = 0.06


class WholeLogits(Objective):
    """The author's loss: all logits at once, and L2Wrap, which keeps them."""

    def forward(self, batch, state=None, keep_state=False):
        hidden, after = self.architecture.hidden(self.model, batch.tokens, batch.document_lengths, state, None)
        logits = hidden @ self.head.weight.t()
        return _L2Wrap.apply(F.cross_entropy(logits[batch.label_positions], batch.labels), logits), after


class _L2Wrap(torch.autograd.Function):
    """JL-er/RWKV-PEFT, src/model.py."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        largest, places = torch.max(logits, -1, keepdim=True)
        return gradient, torch.zeros_like(logits).scatter_(-1, places, largest * 1e-4)


def main() -> None:
    options = parser(__doc__, "the same: it takes seconds").parse_args()
    results = Results(options.json, {"tokens": TOKENS}, ("torch",), options.fresh)
    live = {row.name: results.once(row.name, lambda row=row: {"live_mib": live_bytes(row) / MIB})["live_mib"] for row in ROWS}
    beyond = mean(row.published - live[row.name] for row in CALIBRATION)
    rows = [Row("beyond live tensors, mean of the three 1.6B rows on 1 GPU", beyond, "MiB",
                spread=_ends([row.published - live[row.name] for row in CALIBRATION]))]
    for row in ROWS:
        planned = live[row.name] + beyond
        if row.published is None:
            rows.append(Row(f"{row.name}: planned", planned, "MiB", "not in the paper"))
        else:
            target = {"at_least": 1 - BOUND, "at_most": 1 + BOUND} if row.predicted else {}
            kind = "calibration" if row in CALIBRATION else "predicted" if row.predicted else "reported"
            rows.append(Row(f"{row.name}: planned / the paper", planned / row.published, "ratio",
                            f"{planned:.0f} planned, {row.published} in the paper; {kind}", **target))
    rows += [_difference(size, live) for size in ("1.6B", "3B")]
    results.finish(rows)


def _difference(size: str, live: dict[str, float]) -> Row:
    published = {row.name: row.published for row in ROWS}
    ours, theirs = (figures[f"{size} Bone"] - figures[f"{size} LoRA"] for figures in (live, published))
    return Row(f"{size} Bone - LoRA: planned / the paper", ours / theirs, "ratio", f"{ours:.0f} planned, {theirs} in the paper",
               at_least=1 - BOUND, at_most=1 + BOUND)


def _ends(figures: list[float]) -> tuple[float, float]:
    return min(figures), max(figures)


def live_bytes(row: PaperRow) -> int:
    """Tensors alive at the peak of the paper's trainer."""
    config = _config(row)
    architecture = arch.resolve(config.model)
    source = architecture.outline(config.model)
    ds = ds_json.resolve(config, row.gpus)
    ds["zero_optimization"] = {"stage": 1, "reduce_bucket_size": 200_000_000, "allgather_bucket_size": 200_000_000}
    shape = trace.Shape((TOKENS,), TOKENS)
    traced = trace.trace(config, architecture, source, ds_json.activation_policy(ds), shape, "cuda", WholeLogits)
    return memory.memory(traced, ds, row.gpus, 2, False, "cuda").live_peak_bytes


def _config(row: PaperRow):
    tree = {
        "model": {"path": f"RWKV-x060-World-{row.size}.pth", "dtype": "bf16"}, "adapter": {},
        "data": {"train": "absent.jsonl", "max_length": TOKENS}, "train": {"steps": 1, "global_batch_size": row.gpus},
        "output": {"directory": "absent"}}
    for change in row.changes:
        field, _, value = change.partition("=")
        section, _, name = field.partition(".")
        tree[section][name] = int(value) if value.isdigit() else value
    return validate(tree, row.name)


if __name__ == "__main__":
    main()
