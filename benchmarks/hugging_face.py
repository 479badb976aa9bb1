"""What a user has without bone_ds: peft's LoRA under Hugging Face's Trainer, on the samples of a bone_ds config in the same order.

    python benchmarks/hugging_face.py CONFIG OUT padded|flattened

Reads the config's model, data, LoRA rank, batch, rate and steps, and writes OUT: for every step its end (seconds since 1970), loss,
tokens without padding and loss-bearing tokens, and the process's high-water resident set.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bone_ds.config import RunConfig, load_config
from bone_ds.data import GlobalOrder, Samples, load_samples
from bone_ds.progress import peak_memory_gib
from llama_adapters.targets import TARGETS

MASKED = -100


class _Clock(TrainerCallback):
    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *_, **__) -> None:
        self.ends.append(time.time())


class _Counted:
    """A collator that notes what it is given."""

    def __init__(self, collator: Callable):
        self.collator = collator
        self.tokens: list[int] = []
        self.label_tokens: list[int] = []

    def __call__(self, features: list[dict]) -> dict:
        self.tokens.append(sum(len(feature["input_ids"]) for feature in features))
        self.label_tokens.append(sum(label != MASKED for feature in features for label in feature["labels"]))
        return self.collator(features)


def main() -> None:
    path, out, form = sys.argv[1:]
    config = load_config(path)
    set_seed(config.train.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    samples = load_samples(config.data, tokenizer)
    collator = _Counted(DataCollatorWithFlattening() if form == "flattened" else DataCollatorForSeq2Seq(tokenizer, padding="longest"))
    clock = _Clock()
    trainer = Trainer(
        model=_model(config), args=_arguments(config, Path(out).with_suffix(".trainer")), train_dataset=_dataset(config, samples),
        data_collator=collator, callbacks=[clock])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(out).write_text(json.dumps({
        "ends_s": clock.ends, "loss": losses, "tokens": collator.tokens[:len(losses)], "label_tokens": collator.label_tokens[:len(losses)],
        "memory_gib": peak_memory_gib(), "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0]}))


def _model(config: RunConfig):
    """bf16 weights and fp32 adapters, as peft makes them; the Trainer's autocast does the products in bf16."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.bfloat16)
    model.config.use_cache = False
    adapter = config.adapter
    return get_peft_model(model, LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha or adapter.rank, lora_dropout=0.0,
                                            target_modules=list(TARGETS), task_type="CAUSAL_LM"))


def _dataset(config: RunConfig, samples: Samples) -> list[dict]:
    """The samples of every step, one step's after the other's."""
    order = GlobalOrder(samples, config.data.packing, config.data.max_length, config.train.global_batch_size, config.train.seed)
    return [_features(samples, index) for step in range(config.train.steps) for unit in order.window(step).units for index in unit]


def _features(samples: Samples, index: int) -> dict:
    tokens, learnt = samples[index].tolist(), samples.learnt_of(index).tolist()
    labels = [token if is_learnt else MASKED for token, is_learnt in zip(tokens, learnt, strict=True)]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _arguments(config: RunConfig, directory: Path) -> TrainingArguments:
    train = config.train
    return TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=train.global_batch_size, max_steps=train.steps,
        train_sampling_strategy="sequential", learning_rate=train.learning_rate, lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup_steps, weight_decay=train.weight_decay, adam_beta1=train.beta1, adam_beta2=train.beta2,
        adam_epsilon=train.eps, max_grad_norm=train.max_grad_norm, bf16=True, seed=train.seed, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available())


if __name__ == "__main__":
    main()
