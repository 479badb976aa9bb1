"""The WKV6 operators beside each other: the loop over time, chunked, and the C kernel, on a CPU in fp32.

Forward and backward together, with gradients for r, k, v and log_decay, as in training an adapter. The operators take turns, and
the fastest of their repeats counts: other work on the machine makes times longer, never shorter. What is not equal to the loop over
time in fp64, outputs and all gradients, is not timed.

    python benchmarks/wkv6.py [--threads N] [--repeats N] [--quick] [--json FILE]
"""

import argparse
import json
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance
from torch import Tensor

from rwkv_adapters.wkv6 import c, resolve

N = 64
SHAPES = {  # heads, document lengths, operators
    "T=512 C=512": (8, (512,), ("naive", "chunked", "c")),
    "T=512 C=2048": (32, (512,), ("chunked", "c")),
    "T=512 C=2048, 6 documents": (32, (200, 131, 90, 64, 26, 1), ("chunked", "c")),
}
SPEEDUPS = {"chunked": 15, "c": 35}
LAYER_MS = 40


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    names = ["naive", "chunked"] + ([] if c.missing() else ["c"])
    if c.missing():
        print(f"The C kernel is left out: {c.missing()}")
    operators = {name: resolve(name, "cpu") for name in names}
    for name in names[1:]:
        _check_parity(name, operators[name])
    rows = []
    for shape, (heads, lengths, timed) in SHAPES.items():
        rows += _time(shape, heads, lengths, {name: operators[name] for name in timed if name in operators}, options)
        if options.json:
            options.json.write_text(json.dumps({"provenance": _provenance(options.threads), "rows": rows}, indent=1) + "\n")
    _report(rows)


def _check_parity(name: str, operator: Callable) -> None:
    lengths = (200, 1, 65)
    inputs = _inputs(2, lengths, torch.float64)
    expected = _results(resolve("naive", "cpu"), inputs, lengths)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-6)):
        found = _results(operator, [x.detach().to(dtype).requires_grad_() for x in inputs], lengths)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
        if not error <= tolerance:
            raise SystemExit(f"{name} is wrong in {dtype}: relative error {error:.1e}, at most {tolerance:g}; it is not timed")


def _inputs(heads: int, lengths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    T, D = sum(lengths), len(lengths)
    log_decay = -torch.exp(random(T, heads, N) - 2)
    inputs = [random(T, heads, N), random(T, heads, N), random(T, heads, N), log_decay, random(heads, N), random(D, heads, N, N)]
    return [x.to(dtype).requires_grad_() for x in inputs]


def _results(operator: Callable, inputs: list[Tensor], lengths: tuple[int, ...]) -> list[Tensor]:
    outputs = operator(*inputs, lengths)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])]


def _time(shape: str, heads: int, lengths: tuple[int, ...], operators: dict[str, Callable], options: argparse.Namespace) -> list[dict]:
    *streams, bonus, state = _inputs(heads, lengths, torch.float32)
    bonus, state, gy = bonus.detach(), state.detach(), torch.randn_like(streams[0])
    seconds = {name: [] for name in operators}
    for repeat in range(options.repeats + 1):
        for name, operator in operators.items():
            if name == "naive" and repeat > max(2, options.repeats // 4):
                continue
            begin = time.perf_counter()
            y, _ = operator(*streams, bonus, state, lengths)
            middle = time.perf_counter()
            torch.autograd.grad(y, streams, gy)
            if repeat:  # the first is a warm-up
                seconds[name].append((middle - begin, time.perf_counter() - middle))
    rows = []
    for name, times in seconds.items():
        forward, backward = min(times, key=sum)
        rows.append({"shape": shape, "heads": heads, "head_size": N, "document_lengths": lengths, "operator": name,
                     "forward_ms": round(1e3 * forward, 2), "backward_ms": round(1e3 * backward, 2),
                     "both_ms": round(1e3 * (forward + backward), 2), "repeats": len(times),
                     "all_both_ms": [round(1e3 * sum(pair), 2) for pair in times]})
        print(json.dumps({field: value for field, value in rows[-1].items() if field != "all_both_ms"}), flush=True)
    return rows


def _report(rows: list[dict]) -> None:
    print(f"\n{'shape':<28}{'operator':<10}{'forward ms':>12}{'backward ms':>13}{'both ms':>10}")
    for row in rows:
        print(f"{row['shape']:<28}{row['operator']:<10}{row['forward_ms']:>12.2f}{row['backward_ms']:>13.2f}{row['both_ms']:>10.2f}")
    small, large = ({row["operator"]: row["both_ms"] for row in rows if row["shape"] == shape} for shape in list(SHAPES)[:2])
    for name, target in SPEEDUPS.items():
        if name in small:
            speedup = small["naive"] / small[name]
            print(f"{name}: {speedup:.1f} times the loop over time (target {target}): {'met' if speedup >= target else 'MISSED'}")
    fastest = min(large.values())
    print(f"a layer at C=2048: {fastest:.1f} ms (target at most {LAYER_MS}): {'met' if fastest <= LAYER_MS else 'MISSED'}")


def _provenance(threads: int) -> dict:
    compiler = _first_line(*shlex.split(sysconfig.get_config_var("CC") or "cc"), "--version")
    return provenance("torch") | {"threads": threads, "compiler": compiler}


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError:
        return ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="2 repeats: shows that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.repeats = 2 if options.quick else options.repeats
    return options


if __name__ == "__main__":
    main()
