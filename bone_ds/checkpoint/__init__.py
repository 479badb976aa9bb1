"""Training state on disk, readable at any ZeRO stage and world size.

`checkpoints/step-00000100/` holds

- `adapter.safetensors`, the adapter's fp32 weights, a file like the run's own: it can be merged, generated from and exported
- `state.safetensors`, AdamW's two moments of each of its tensors, as `exp_avg/NAME` and `exp_avg_sq/NAME`
- `config.yaml` of the run
- `manifest.json`: step, held-out loss, fingerprints of base and data, size and SHA-256 of each file and of itself

Frozen weights are never written. Training draws no random numbers, the learning rate is a function of the step, and the order of
the data one of seed and step, so the step count is all the position there is. Steps are whole: a run that is killed within an
accumulation window does that step again.

A checkpoint is written aside, as `step-N.partial`: every file is synced, read back, compared and hashed, then the directory is renamed
and its parent synced. So whatever has the name `step-N` was whole when it got it. What is found damaged later is passed over.
"""

from bone_ds.checkpoint.files import Origin, Snapshot, outline, verify, write
from bone_ds.checkpoint.manifest import FORMAT_VERSION, Damaged, Manifest
from bone_ds.checkpoint.resumption import Found, given, last_whole, load
from bone_ds.checkpoint.retention import existing, settle, step_of, thin
from bone_ds.checkpoint.saver import Saved, Saver

__all__ = ["FORMAT_VERSION", "Damaged", "Found", "Manifest", "Origin", "Saved", "Saver", "Snapshot", "existing", "given", "last_whole",
           "load", "outline", "settle", "step_of", "thin", "verify", "write"]
