"""Where rows come from; as the package says it."""

from bone_ds.provenance import commit, provenance

__all__ = ["commit", "provenance"]
