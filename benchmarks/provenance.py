"""Where rows come from: as the package says it, with the commit of the checkout that the benchmarks lie in."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bone_ds import provenance as packaged

CHECKOUT = Path(__file__).resolve().parents[1]
MEASURED = ("bone_ds", "llama_adapters", "rwkv_adapters", "ds_configs", "benchmarks", ":!*.md", ":!benchmarks/*.json", ":!bone_ds/recipes")
"""The files whose change makes another measurement."""

provenance = partial(packaged.provenance, checkout=CHECKOUT)
commit = partial(packaged.commit, CHECKOUT)


def is_same_code(since: str) -> bool:
    """As at a clean commit."""
    return packaged.is_unchanged(CHECKOUT, since, *MEASURED)
