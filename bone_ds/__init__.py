"""Fine-tunes RWKV6 and LLaMA models with Bone (block affine) adapters on DeepSpeed; `BoneConfig` and `BoneModel` are for any model."""

import importlib

__version__ = "0.1.0"
__all__ = ["BoneConfig", "BoneModel"]


def __getattr__(name: str):
    """Imported when first asked for: the command line answers without torch and PEFT."""
    if name in __all__:
        return getattr(importlib.import_module("bone_ds.hugging_face"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
