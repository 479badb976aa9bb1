"""The shipped DeepSpeed configurations: plain JSON, without batch sizes, precision or optimizer, which follow from the YAML."""

import json
from importlib.resources import files

NAMES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def read(name: str) -> dict:
    """The shipped configuration `name` as a dictionary; `name` is one of NAMES."""
    return json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
