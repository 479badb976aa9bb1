"""The project's own small RWKV6, which knows a small world in prose, learns to answer questions about it.

Bone teaches it the form: the sums that are asked stand in the prose that the base was trained on (MODEL_CARD.md), and the held-out ones
in no question that the adapter is trained on.
"""

from __future__ import annotations

from pathlib import Path

from bone_ds import generate
from bone_ds.config import RunConfig
from bone_ds.demo import quickstart
from bone_ds.demo.demonstration import Part


def prepare(config: RunConfig) -> None:
    quickstart.write(Path(config.model.path).parent)


def ask(model: Path, config: RunConfig, prompts: list[str], max_new_tokens: int) -> list[str]:
    """By the project's own generation, one token at a time from a state that doesn't grow."""
    loaded = generate.load(config.model.model_copy(update={"path": str(model)}))
    return generate.continuations(loaded, prompts, max_new_tokens, generate.most_likely, batch_size=len(prompts))


PART = Part(
    title="A small RWKV6 learns to answer questions",
    about="It goes on with stories, and does their sums; questions and answers it has never seen. Bone teaches it to answer.",
    recipe="demo_rwkv6",
    merged=Path(".demo/rwkv6/merged.pth"),
    questions=120,
    held_out="On questions whose names and numbers were not trained on:",
    max_new_tokens=64,
    prepare=prepare,
    ask=ask)
