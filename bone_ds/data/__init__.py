"""Files to batches, one way: sources -> prompts -> samples -> packing -> order -> collate."""

from bone_ds.data.collate import collate, collate_chunks
from bone_ds.data.order import GlobalOrder, Hand, Window, deal, evaluation_units
from bone_ds.data.packing import pack
from bone_ds.data.prompts import Prompt, build_prompt
from bone_ds.data.samples import Report, Samples, load_samples, prompt_ids, tokenize
from bone_ds.data.sources import read_rows

__all__ = [
    "GlobalOrder", "Hand", "Prompt", "Report", "Samples", "Window", "build_prompt", "collate", "collate_chunks", "deal", "evaluation_units",
    "load_samples", "pack", "prompt_ids", "read_rows", "tokenize",
]
