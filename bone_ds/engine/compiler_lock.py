"""The lock of a build that was killed: torch waits for it, silently and for ever, when DeepSpeed first uses what it compiles."""

from __future__ import annotations

from pathlib import Path

from torch.utils import cpp_extension

from bone_ds.errors import ConfigError

_COMPILED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
"""Fields of zero_optimization that DeepSpeed compiles its operator `quantizer` for; nothing else that is allowed here needs one."""


def check(ds: dict) -> None:
    """Raises ConfigError naming a lock that this run would wait for and no process of this host holds."""
    field = next((field for field in _COMPILED if ds["zero_optimization"].get(field)), None)
    if field is None:
        return
    lock = Path(cpp_extension._get_build_directory("quantizer", verbose=False)) / "lock"
    if lock.exists() and not _is_held(lock):
        raise ConfigError(f"{lock}: is left from a build that was killed, and DeepSpeed, which compiles for zero_optimization.{field}, "
                          "would wait for it for ever; remove it, unless another host builds there at this moment")


def _is_held(lock: Path) -> bool:
    """A build keeps its lock open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(lock):
                return True
        except OSError:
            continue  # another user's, or gone meanwhile
    return False
