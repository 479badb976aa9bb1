"""Greedy completions of many prompts with a plain transformers model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from bone_ds.data import prompt_ids


def load_plain(directory: Path, dtype: torch.dtype):
    """A model directory as transformers alone reads it, with its tokenizer."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
    return model.eval(), AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


@torch.inference_mode()
def complete(model, tokenizer, prompts: list[str], max_new_tokens: int, batch_size: int = 64) -> list[str]:
    """The most likely continuation of each prompt up to EOS, tokenised as in training; shortest prompts first."""
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        tokens, mask = _left_padded([ids[index] for index in batch], tokenizer.eos_token_id)
        output = model.generate(
            input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens,
            do_sample=False, pad_token_id=tokenizer.eos_token_id)
        for index, row in zip(batch, output[:, tokens.shape[1]:], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def _left_padded(rows: list[list[int]], filling: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, T) tokens and mask: generation continues each row at its right end."""
    width = max(map(len, rows))
    tokens = torch.tensor([[filling] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask
