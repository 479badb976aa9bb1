"""Which layers and modules an adapter of another program is on; an adapter of this project is on the same modules in a range of layers."""

from __future__ import annotations

from pathlib import Path

from bone_ds.errors import CheckpointError


def rectangle(path: Path, found: dict[int, set[str]], layers_name: str) -> tuple[tuple[int, int], set[str]]:
    """The modules by layer -> the layers [first, last) and the modules, every one on every layer.

    layers_name: what comes before a layer's number. Raises CheckpointError where a module is missing on a layer.
    """
    first, last = min(found), max(found) + 1
    modules = set.union(*found.values())
    for layer in range(first, last):
        missing = sorted(modules - found.get(layer, set()))
        if missing:
            raise CheckpointError(f"{path}: has no tensor for {layers_name}.{layer}.{missing[0]}, but for other layers' {missing[0]} or "
                                  "other modules of that layer; an adapter is on the same modules in a range of layers")
    return (first, last), modules
