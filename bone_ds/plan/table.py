"""A plan as text: a table, and a line of it."""

from __future__ import annotations

from bone_ds.plan.report import COMPONENTS, GIB, Change, Plan

_WHAT = {
    "weights": "frozen base model", "adapter": "trainable tensors", "gradients": "of the adapter",
    "optimizer": "fp32 masters and AdamW's moments", "buckets": "ZeRO reduces gradients in them",
    "gathered": "parameters that ZeRO-3 has made whole", "activations": "kept by forward for backward",
    "transient": "everything else that is computed with", "context": {"cpu": "interpreter and libraries", "cuda": "CUDA context"},
    "slack": "what the allocator holds beyond the tensors",
}
_SHARE_WIDTH = 24


def table(plan: Plan) -> str:
    lines = [f"{plan.model}: {plan.parameters:,} parameters, {plan.trainable_parameters:,} trainable "
             f"({plan.trainable_parameters / (plan.parameters or 1):.2%})",
             f"{plan.world_size} {'rank' if plan.world_size == 1 else 'ranks'} on {plan.device}, ZeRO stage {plan.stage}"]
    lines += [f"note: {note}" for note in plan.notes]
    lines += ["", *_memory(plan), *_host(plan), "", *_kept(plan), "", *_work(plan), "", *_verdict(plan)]
    return "\n".join(lines)


def line(plan: Plan) -> str:
    """`plan: 6.9 GiB of 23.4 GiB a rank (weights 3.0, activations 2.9, ...), 1.2 PFLOP and 512 tokens a step, 33,030,144 trainable`"""
    of = f" of {gib(plan.capacity_bytes)}" if plan.capacity_bytes else ""
    largest = sorted(plan.by_component.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {_in_gib(size)}" for name, size in largest)
    there = "" if plan.host_capacity_bytes is None else f" ({_in_gib(plan.host_capacity_bytes)} are there)"
    beside = f", {gib(plan.host_bytes)} of host memory{there}" if plan.host_bytes else ""
    return (f"plan: {gib(plan.peak_bytes)}{of} a rank ({parts}){beside}, {flop(plan.flops.total * plan.world_size)} and "
            f"{plan.workload.tokens_per_step:,.0f} tokens a step, {plan.trainable_parameters:,} trainable")


def breakdown(plan: Plan) -> str:
    """`6.90 GiB a rank (weights 3.02, activations 2.91, ...)`, all that is 0.01 GiB or more"""
    parts = [f"{name} {_in_gib(size)}" for name, size in plan.by_component.items() if size >= 0.005 * GIB]
    return f"{gib(plan.peak_bytes)} a rank ({', '.join(parts)})"


def refusal(plan: Plan) -> str:
    """Why a run can't fit, and what would."""
    text = (f"this run needs {gib(plan.needed_bytes)} a rank, {gib(plan.capacity_bytes)} are there "
            f"(weights {_in_gib(plan.by_component['weights'])}, activations {_in_gib(plan.by_component['activations'])})")
    if not plan.changes:
        return f"{text}; no change of the configuration that was tried would make it fit\n--force starts it all the same"
    return f"{text}\nIt would fit with {_options(plan)}; --force starts it as it is"


def warning(plan: Plan) -> str:
    """One line, of a run that is neither sure to fit nor sure not to."""
    would = f"; it would surely with {_options(plan)}" if plan.changes else ""
    return f"may not fit: {_spread(plan)}{would}"


def gib(size_bytes: int) -> str:
    return f"{_in_gib(size_bytes)} GiB"


def flop(count: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.1f} MFLOP"


def disk(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def _in_gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}" if size_bytes < 10 * GIB else f"{size_bytes / GIB:.1f}"


def _cost(change: Change) -> str:
    ratio = change.flops_ratio
    flops = "no more FLOPs" if ratio < 1.005 else f"{ratio - 1:.0%} more FLOPs"
    if ratio < 0.995:
        flops = f"{1 - ratio:.0%} fewer FLOPs a step"
    return f"{gib(change.host_bytes)} of host memory a rank, {flops}" if change.host_bytes else flops


def _options(plan: Plan) -> str:
    return "; ".join(f"{change} ({gib(change.peak_bytes)}, {_cost(change)}{', ' + change.note if change.host_bytes else ''})"
                     for change in plan.changes)


def _spread(plan: Plan) -> str:
    if not plan.complete:
        return f"{gib(plan.peak_bytes)} without the settings that are not planned, {gib(plan.capacity_bytes)} a rank are there"
    return (f"{gib(plan.needed_bytes)} a rank are needed, {gib(plan.peak_bytes)} with what the allocator may hold beyond, "
            f"{gib(plan.capacity_bytes)} are there")


def _memory(plan: Plan) -> list[str]:
    peak = "resident set of one rank at its highest" if plan.device == "cpu" else "device memory of one rank at its peak"
    lines = [f"{peak + ', GiB':<52}"]
    for component in COMPONENTS:
        size = plan.by_component[component]
        if size:
            what = _WHAT[component] if isinstance(_WHAT[component], str) else _WHAT[component][plan.device]
            bar = "█" * round(_SHARE_WIDTH * size / plan.peak_bytes)
            lines.append(f"  {component:<12}{size / GIB:>8.3f}  {bar:<{_SHARE_WIDTH}}  {what}")
    lines.append(f"  {'total':<12}{plan.peak_bytes / GIB:>8.3f}  of which tensors {plan.live_peak_bytes / GIB:.3f}")
    return lines


def _host(plan: Plan) -> list[str]:
    if not plan.host_bytes:
        return []
    lines = ["", "host memory of one rank beside it, at its highest, GiB"]
    lines += [f"  {component:<12}{size / GIB:>8.3f}" for component, size in plan.host_by_component.items()]
    there = "" if plan.host_capacity_bytes is None else f"  of {plan.host_capacity_bytes / GIB:.3f} that are there"
    return [*lines, f"  {'total':<12}{plan.host_bytes / GIB:>8.3f}{there}"]


def _kept(plan: Plan) -> list[str]:
    lines = ["activations by layer kind, GiB"]
    kept = sorted(plan.saved_by_layer_kind.items(), key=lambda item: -item[1])
    return lines + [f"  {kind:<12}{size / GIB:>8.3f}" for kind, size in kept if size >= 0.0005 * GIB]


def _work(plan: Plan) -> list[str]:
    work, flops = plan.workload, plan.flops
    heaviest = work.heaviest
    lines = [f"a step: {work.tokens_per_step:,.0f} tokens, {work.label_tokens_per_step:,.0f} bear loss, of all ranks; the heaviest "
             f"micro-batch has {heaviest['tokens']:,} in {heaviest['documents']} documents",
             f"a rank computes {flop(flops.total)}: forward {flop(flops.forward)}, backward {flop(flops.backward)}"
             + (f", recomputed {flop(flops.recomputed)}" if flops.recomputed else "")]
    if work.steps is not None:
        lines.append(f"the run: {work.steps:,} steps, {work.steps * work.tokens_per_step:,.0f} tokens")
    if work.report is not None:
        report = work.report
        lines.append(f"data: {report['kept']:,} samples of {report['rows']:,} rows, {report['truncated']:,} truncated, "
                     f"{report['dropped']:,} dropped, {report['label_less']:,} without a token to learn")
    lines.append(f"on disk: {disk(plan.checkpoint_bytes)} a checkpoint, {disk(plan.adapter_bytes)} the adapter")
    return lines


def _verdict(plan: Plan) -> list[str]:
    if plan.fits is None:
        return ["how much there is was not said (--device-memory 24GiB)"]
    if plan.fits:
        return [f"fits: {gib(plan.peak_bytes)} of {gib(plan.capacity_bytes)}"]
    lines = [f"does not fit: {gib(plan.needed_bytes)} of {gib(plan.capacity_bytes)} without slack" if plan.cannot_fit
             else f"may not fit: {_spread(plan)}"]
    if not plan.changes:
        return [*lines, "no change that was tried would make it fit"]
    lines.append("it would with, by FLOPs added, and last what changes what is learnt:")
    return lines + [f"  {str(change):<70}{gib(change.peak_bytes):>11}  {_cost(change)}; {change.note}"
                    for change in plan.changes]
