"""flash-linear-attention's kernels against the loop over time: on a GPU, and interpreted on a CPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_adapters.wkv6 import fla, naive

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("fla") and importlib.util.find_spec("triton")),
    reason="fla-core or triton is not installed: pip install 'bone_ds[gpu]'")
ROWS = [(20,), (5, 70, 1)]


def largest_errors(device: str, H: int, N: int, lengths: tuple[int, ...]) -> list[float]:
    """Of both outputs and all six gradients, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    T, D = sum(lengths), len(lengths)
    inputs = [random(T, H, N), random(T, H, N), random(T, H, N), -torch.exp(random(T, H, N)), random(H, N), random(D, H, N, N)]
    inputs = [x.requires_grad_() for x in inputs]
    g_outputs = [random(T, H, N), random(D, H, N, N)]
    found, expected = ((*outputs, *torch.autograd.grad(outputs, inputs, g_outputs))
                       for outputs in (operator.wkv6(*inputs, lengths) for operator in (fla, naive)))
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("lengths", [*ROWS, (200, 64, 1, 300)], ids=str)
def test_on_a_gpu(lengths):
    assert max(largest_errors("cuda", 4, 64, lengths)) < 5e-3  # tf32 products


def test_interpreted():
    """In a process of its own: Triton decides at import whether it interprets."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1],
                         env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(path or "." for path in sys.path), "PATH": "/usr/bin:/bin"})
    assert run.returncode == 0, run.stderr[-2000:]
    errors = [float(line) for line in run.stdout.split()]
    assert len(errors) == 8 * len(ROWS) and max(errors) < 1e-4


def interpret() -> None:
    """What the interpreter lacks: it can't time variants, and its loops count in plain ints."""
    from triton.runtime.autotuner import Autotuner

    tuned = Autotuner.__init__
    Autotuner.__init__ = lambda self, fn, names, configs, *args, **kwargs: tuned(self, fn, names, configs[:1], *args, **kwargs)

    class Step(int):
        def to(self, dtype):
            return int(self)

    for module in ("rwkv6.chunk", "common.chunk_h", "gla.chunk"):
        vars(importlib.import_module(f"fla.ops.{module}"))["range"] = lambda *ends: map(Step, range(*map(int, ends)))
    torch.set_num_threads(1)
    for lengths in ROWS:
        print(*largest_errors("cpu", 1, 16, lengths))


if __name__ == "__main__":
    interpret()
