"""The quickstart's directory: the project's small RWKV6, and questions to train it on and to ask it."""

from __future__ import annotations

import shutil
import sys
from importlib.resources import files
from pathlib import Path

from bone_ds.demo import small_world

MODEL = Path(str(files("bone_ds").joinpath("demo/rwkv6-small.pth")))


def write(directory: Path) -> tuple[Path, ...]:
    """Writes rwkv6-small.pth, train.jsonl and held_out.jsonl, in place of what lies there under these names; returns their paths."""
    questions = small_world.write_questions(directory)
    return Path(shutil.copyfile(MODEL, directory / MODEL.name)), *questions


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bone_ds.demo.quickstart DIRECTORY")
    for written in write(Path(sys.argv[1])):
        print(written)
