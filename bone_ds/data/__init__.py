"""Files to batches, one way: sources -> rows -> prompts or chat -> tokenization -> samples -> packing -> order -> collate."""

from bone_ds.data.collate import collate, collate_chunks
from bone_ds.data.loading import load_samples
from bone_ds.data.order import GlobalOrder, Hand, Window, deal, evaluation_units
from bone_ds.data.packing import pack
from bone_ds.data.prompts import Prompt, build_prompt
from bone_ds.data.samples import Part, Report, Samples
from bone_ds.data.tokenization import prompt_ids, tokenize

__all__ = [
    "GlobalOrder", "Hand", "Part", "Prompt", "Report", "Samples", "Window", "build_prompt", "collate", "collate_chunks", "deal",
    "evaluation_units", "load_samples", "pack", "prompt_ids", "tokenize",
]
