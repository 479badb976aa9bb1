"""One YAML file becomes one frozen RunConfig. Imports nothing heavy: `bone-ds --help` answers at once."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, PydanticKnownError

from bone_ds.errors import ConfigError


def _as_tuple(value: Any) -> Any:
    """YAML knows lists alone, and one path may stand without a list."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)]


LARGEST = 2**63 - 1
"""Of whole numbers: what files, tensors and iterators count with."""
_NO_TEXT = "holds what files and tokenizers don't take, \\0 or half a surrogate pair"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _refuse_what_nothing_takes(cls, value: Any) -> Any:
        for one in _leaves(value):
            if isinstance(one, int) and one > LARGEST:
                raise PydanticKnownError("less_than_equal", {"le": LARGEST})
            if isinstance(one, str) and not _is_plain(one):
                raise PydanticCustomError("text", _NO_TEXT)
        return value


def _leaves(value: Any) -> Iterator[Any]:
    """Numbers and texts of a field; a section in it has looked at its own."""
    if isinstance(value, dict):
        value = (*value, *value.values())
    if isinstance(value, tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _is_plain(text: str) -> bool:
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


class ModelConfig(Section):
    path: str = Field(
        description="Llama: a Hugging Face directory, a hub id, or a .gguf file (converted once, then cached). "
                    "RWKV6: an official .pth, or a .safetensors file of the same tensors.", min_length=1)
    revision: str | None = Field(None, min_length=1, description="Hub branch, tag or commit; the commit it names is recorded in the run.")
    architecture: Literal["auto", "llama", "rwkv"] = Field("auto", description="Which adapter package reads the model.")
    tokenizer: str = Field(
        "auto", min_length=1,
        description="RWKV6: world, bytes, utf-16le (bytes of that encoding), or the path of a World vocabulary file; auto goes by the "
                    "vocabulary's size. Llama has its own beside the weights.")
    wkv: Literal["auto", "naive", "chunked", "c", "fla"] = Field(
        "auto", description="RWKV6: which operator computes WKV, with equal results; auto takes fla on a GPU, c on a CPU, else chunked.")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="Dtype of the frozen weights and of the forward pass.")
    cache_dir: str = Field("~/.cache/bone_ds", min_length=1, description="Where a converted GGUF model and tokenised data are kept.")


class AdapterConfig(Section):
    method: Literal["bone", "lora", "state", "full"] = Field(
        "bone", description="bone: block affine (the paper). lora: the baseline, through peft. state: RWKV6's initial state alone. "
                            "full: every weight, for small models and as a baseline.")
    grouping: Literal["row", "col", "left", "free", "miss"] = Field(
        "row", description="Which blocks share a Bone matrix: row costs what LoRA costs; col is the paper's Llama setting; left, ours and "
                           "not the paper's, has col's parameters at about row's cost; free deals adapter.groups matrices out in turn; "
                           "miss adds one D (r, out) to every r inputs, as peft's MiSS does.")
    groups: int | None = Field(
        None, ge=1, description="grouping free: the number of matrices of a layer, the paper's g; it divides the number of blocks.")
    form: Literal["affine", "hadamard", "unconstrained"] = Field(
        "affine", description="What a block W gains: affine W B + B; hadamard W * B + B, elementwise; unconstrained W A + C, two matrices "
                              "in place of one. The last two are the paper's ablations, for grouping row, col and free.")
    rank: int = Field(64, ge=1, le=2**16, description="Bone block size r, or LoRA rank.")
    parameters: int | None = Field(
        None, ge=1, le=10**12, description="In place of rank: take the largest one that trains at most so many parameters.")
    alpha: float | None = Field(None, gt=0, le=1e6, description="LoRA scale numerator (scale = alpha / rank); default rank. Not for bone.")
    strategy: Literal["auto", "materialized", "checkpointed", "fused", "factored"] = Field(
        "auto", description="How Bone is computed, with equal results: auto takes the cheapest, factored for row, left and miss, fused "
                            "for col and hadamard, for free the one that has fewer products.")
    targets: Texts | None = Field(
        None, description="Module names to adapt, for example [q_proj, v_proj]; default all of the architecture's.")
    layers: Annotated[tuple[int, int], BeforeValidator(_as_tuple)] | None = Field(
        None, description="First and last layer to adapt, from 0, the last excluded; default all.")

    @property
    def has_rank(self) -> bool:
        """False until adapter.parameters has become a rank, which takes the model's shapes."""
        return self.parameters is None or "rank" in self.model_fields_set


PromptName = Literal["metamath", "instruction", "wizardlm", "code", "user_assistant", "chat", "text", "template"]


def _as_entry(value: Any) -> Any:
    """An entry of a mixture may be its path alone."""
    return {"path": value} if isinstance(value, str) else value


class MixtureSource(Section):
    """One entry of data.mixture. What it leaves out is the data section's; one that names a prompt brings all that belongs to it."""

    path: str = Field(description="A file, a directory or a hub id, as in data.train.", min_length=1)
    weight: float = Field(1.0, gt=0, description="Its share of an epoch's samples is this over the sum of all weights.")
    samples: int | None = Field(None, ge=1, description="Use only the first so many rows.")
    subset: str | None = Field(None, min_length=1, description="As data.subset.")
    split: str | None = Field(None, min_length=1, description="As data.train_split.")
    revision: str | None = Field(None, min_length=1, description="As data.revision.")
    prompt: PromptName | None = Field(None, description="As data.prompt.")
    fields: dict[str, str] | None = Field(None, description="As data.fields.")
    template: str | None = Field(None, description="As data.template.")
    completion: str | None = Field(None, description="As data.completion.")
    chat_template: str | None = Field(None, min_length=1, description="As data.chat_template.")
    drop_after_code: bool | None = Field(None, description="As data.drop_after_code.")


Mixture = Annotated[tuple[Annotated[MixtureSource, BeforeValidator(_as_entry)], ...], BeforeValidator(_as_tuple)]
_WORDED_BY = ("prompt", "fields", "template", "completion", "chat_template", "drop_after_code")
"""Fields of the data section and of a mixture's entry that belong to the prompt."""


class DataConfig(Section):
    train: Texts = Field(
        description="Training data: .jsonl, .json, .csv, .parquet or .arrow files, directories of them, hub ids; with prompt: text also "
                    ".txt and binidx .bin; one or a list. Leave it out with data.mixture.")
    mixture: Mixture = Field(
        default=(), description="In place of train: sources mixed by weight, each {path: ..., weight: ...} and where it differs samples, "
                                "prompt, fields, template, completion, chat_template, drop_after_code, subset, split, revision.")
    eval: Texts = Field(default=(), description="Held-out data, as data.train. Without it no held-out loss is measured.")
    train_samples: int | None = Field(None, ge=1, description="Use only the first so many rows of data.train.")
    eval_samples: int | None = Field(None, ge=1, description="Use only the first so many rows of data.eval.")
    subset: str | None = Field(
        None, min_length=1, description="Directories and hub ids: which configuration of the data set; default its own.")
    train_split: str = Field("train", min_length=1, description="Directories and hub ids: the split that data.train takes.")
    eval_split: str = Field("test", min_length=1, description="Directories and hub ids: the split that data.eval takes.")
    revision: str | None = Field(
        None, min_length=1, description="Hub ids: branch, tag or commit; the commit it names is recorded in the run.")
    prompt: PromptName = Field(
        "metamath",
        description="metamath: query/response. instruction: instruction/input/output. wizardlm: instruction/output. code: query/answer "
                    "up to the end of its first code block. user_assistant: query/response as RWKV's User:/Assistant: text. chat: "
                    "messages or conversations through the chat template, assistant turns learnt. text: text, all of it learnt. "
                    "template: data.template and data.completion.")
    fields: dict[str, str] = Field(
        {}, description="The data's names for the prompt's fields, for example {query: question, response: answer}.")
    template: str | None = Field(
        None, description="Prompt text with {field} places, for prompt: template.")
    completion: str | None = Field(
        None, description="Completion text with {field} places, for prompt: template; it alone bears loss.")
    chat_template: str | None = Field(
        None, min_length=1, description="For prompt: chat: a Jinja template or a .jinja file, in place of the tokenizer's own.")
    drop_after_code: bool = Field(
        False, description="Leave out what follows the completion's first fenced code block; prompt: code always does.")
    max_length: int = Field(512, ge=8, le=2**24, description="Longest sample, and the size of a pack, in tokens.")
    overlong: Literal["truncate", "drop", "split"] | None = Field(
        None, description="What happens to a longer sample; each is counted and reported. split: cut into samples, for prompt: text, "
                          "where it is the default; else that is truncate.")
    packing: bool = Field(True, description="Fill packs of max_length tokens with whole samples; samples never see each other.")
    cache: bool = Field(True, description="Keep tokenised data of 1 MiB and more under model.cache_dir, for the next start.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        """No train beside a mixture."""
        return {"train": ()} | tree if isinstance(tree, dict) and tree.get("mixture") else tree

    @property
    def overlong_rule(self) -> Literal["truncate", "drop", "split"]:
        """overlong, or its default: a file of text may be one long document."""
        return self.overlong or ("split" if self.prompt == "text" else "truncate")

    @property
    def train_paths(self) -> tuple[str, ...]:
        """Every source of training data as the config names it."""
        return self.train or tuple(source.path for source in self.mixture)

    def of_source(self, source: MixtureSource) -> DataConfig:
        """The section as it is for one source of the mixture alone."""
        worded = {field: getattr(source, field) for field in _WORDED_BY if getattr(source, field) is not None}
        if source.prompt is not None:
            worded = {field: DataConfig.model_fields[field].default for field in _WORDED_BY} | worded
        if self.overlong == "split" and worded.get("prompt", self.prompt) != "text":
            worded["overlong"] = None
        return self.model_copy(update=worded | {
            "train": (source.path,), "mixture": (), "train_samples": source.samples, "subset": source.subset or self.subset,
            "train_split": source.split or self.train_split, "revision": source.revision or self.revision})


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1, le=10**9, description="Optimizer steps; give this or train.epochs.")
    epochs: int | None = Field(
        None, ge=1, le=10**5, description="Passes over the data; give this or train.steps (default 1 epoch).")
    global_batch_size: int = Field(
        8, ge=1, le=2**31, description="Packs (samples without packing) in one optimizer step, over all ranks.")
    micro_batch_size: int = Field(
        1, ge=1, le=2**16, description="Packs (samples) in one forward pass on one rank; accumulation follows from it.")
    learning_rate: float = Field(
        1e-4, gt=0, le=100,
        description="Peak learning rate. The best one goes with the method: LoRA's is about 10 times Bone's, state's 0.1 to 1.")
    schedule: Literal["cosine", "linear", "constant", "cosine_restarts", "exponential"] = Field(
        "cosine", description="Course of the learning rate after the warm-up; cosine_restarts falls train.cycles times from the peak.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    final_lr_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the end as a share of the peak; not for constant.")
    cycles: int | None = Field(None, ge=2, description="cosine_restarts: how many cycles share the steps after the warm-up; default 2.")
    optimizer: Literal["adamw", "adamw_fused"] = Field(
        "adamw", description="torch's AdamW; fused: in one kernel and without temporaries, with results equal to rounding.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay on the adapter.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay.")
    eps: float = Field(1e-8, gt=0, le=1, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm to this; 0 is no clipping.")
    activation_checkpointing: Literal["auto", "none", "bone", "layer", "bone+layer"] = Field(
        "auto", description="Recomputed in backward: nothing, each Bone layer, each whole layer, or both, one within the other; auto takes "
                            "layer where recompute_every, recompute_modules or the DeepSpeed JSON's section ask for it, else none.")
    recompute_every: int | None = Field(
        None, ge=1, description="layer: recompute each such layer, from the first; default every one.")
    recompute_modules: Texts | None = Field(
        None, description="layer: recompute these modules instead of whole layers, by their names within a layer, for example [mlp].")
    loss_chunk: int = Field(512, ge=1, description="Loss-bearing positions whose logits are held at once.")
    chunk_length: int | None = Field(
        None, ge=16, description="RWKV6: run so many tokens at a time and carry the state on, without gradient; default whole sequences.")
    l2wrap: float = Field(
        0.0, ge=0, le=1,
        description="Pull on the largest logit of each loss-bearing position, added to its gradient (RWKV trains with 1e-4).")
    seed: int = Field(0, ge=0, lt=2**63, description="Order of the data, and LoRA's first matrix.")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="A step whose loss or gradient is NaN or infinite changes no weight; stop ends the run there, skip passes over "
                            "its samples. Both write down which these are.")
    max_skipped: int | None = Field(None, ge=1, description="on_nan skip: end the run where more steps in a row are so; default 10.")
    collective_timeout_s: float = Field(
        600, ge=1, le=10**7, description="How long ranks wait for each other in a step, a held-out loss or a checkpoint before they end "
                                         "and name the one that does not answer.")
    eval_every: int = Field(
        50, ge=0, description="Steps between held-out losses (also before the first and after the last step); 0 is never.")
    log_norms_every: int = Field(
        0, ge=0, description="Steps between records of the norm of each adapter tensor and of its gradient; 0 is never.")
    save_every: int = Field(100, ge=0, description="Steps between checkpoints (one is always written at the end); 0 is only at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the latest checkpoints stay on disk.")
    keep_best: bool = Field(
        False, description="Keep the checkpoint of the lowest held-out loss too; train.save_every is a multiple of eval_every then.")
    async_save: bool | None = Field(
        None, description="Write checkpoints beside the next steps, from a copy in host memory (12 bytes a trainable parameter); "
                          "default on a GPU alone.")


class DeepSpeedConfig(Section):
    config: str = Field(
        "zero2", description="zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, or the path of a DeepSpeed JSON of your own.")


class OutputConfig(Section):
    directory: str = Field(description="The run directory: config, events, log, checkpoints, adapter.", min_length=1)


class RunConfig(Section):
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _refuse_impossible_combinations(self) -> RunConfig:
        for problem in _conflicts(self):
            raise ValueError(problem)
        return self


_NOT_FOR = {
    "bone": ("alpha",),
    "lora": ("grouping", "groups", "form", "strategy"),
    "state": ("rank", "parameters", "alpha", "grouping", "groups", "form", "strategy", "targets"),
    "full": ("rank", "parameters", "alpha", "grouping", "groups", "form", "strategy", "targets", "layers"),
}
"""Fields of the adapter section by the method they mean nothing to."""


def _conflicts_of_bone(adapter: AdapterConfig) -> Iterator[str]:
    """Combinations of grouping, form and strategy that bone_ds.bone does not have, which is too heavy to be asked here."""
    if adapter.grouping == "free" and adapter.groups is None:
        yield "adapter.groups: is missing, adapter.grouping: free needs it; with in/r of a layer it is row"
    if adapter.grouping != "free" and adapter.groups is not None:
        yield f"adapter.groups: {adapter.groups} is for adapter.grouping: free, this is {adapter.grouping!r}; remove one"
    if adapter.grouping in ("left", "miss") and adapter.form != "affine":
        yield f"adapter.form: {adapter.form!r} exists for adapter.grouping: row, col and free, this is {adapter.grouping!r}; remove one"
    if adapter.strategy == "factored" and adapter.form == "hadamard":
        yield "adapter.strategy: 'factored' does not exist for adapter.form: hadamard, which needs the weight itself; use auto or fused"
    if adapter.strategy == "factored" and adapter.grouping == "col":
        yield "adapter.strategy: 'factored' exists for adapter.grouping: row, left, free and miss, this is 'col'; use auto or fused"
    if adapter.strategy == "fused" and adapter.grouping in ("left", "miss"):
        yield f"adapter.strategy: 'fused' exists for adapter.grouping: row, col, free, this is {adapter.grouping!r}; use auto or factored"


def _conflicts(config: RunConfig) -> Iterator[str]:
    adapter, data, train = config.adapter, config.data, config.train
    for field in _NOT_FOR[adapter.method]:
        if field in adapter.model_fields_set and getattr(adapter, field) is not None:
            yield f"adapter.{field}: {_plain(getattr(adapter, field))!r} has no meaning with adapter.method: {adapter.method}, remove it"
    if "bone" in train.activation_checkpointing and adapter.method != "bone":
        yield (f"train.activation_checkpointing: {train.activation_checkpointing!r} needs adapter.method: bone, this is "
               f"{adapter.method!r}; use none or layer")
    for field in ("recompute_every", "recompute_modules"):
        if getattr(train, field) is not None and train.activation_checkpointing in ("none", "bone"):
            yield (f"train.{field}: {_plain(getattr(train, field))!r} has no meaning with train.activation_checkpointing: "
                   f"{train.activation_checkpointing!r}; remove one")
    for field, names in (("adapter.targets", adapter.targets), ("train.recompute_modules", train.recompute_modules)):
        if names is not None and (not names or len(set(names)) < len(names)):
            yield f"{field}: {list(names)} is empty or names a module twice"
    if adapter.method == "bone":
        yield from _conflicts_of_bone(adapter)
    if adapter.layers is not None and not 0 <= adapter.layers[0] < adapter.layers[1]:
        yield f"adapter.layers: {list(adapter.layers)} is no range, give [first, last) with 0 <= first < last"
    for field, path in (("model.cache_dir", config.model.cache_dir), ("output.directory", config.output.directory)):
        if path.startswith("~") and os.path.expanduser(path) == path:
            yield f"{field}: {_shortened(path)}: this machine knows no such home directory; write the path out"
    yield from _data_conflicts(data)
    if data.eval_samples is not None and not data.eval:
        yield f"data.eval_samples: {data.eval_samples} without data.eval; name a held-out file"
    if train.keep_best and not (data.eval and train.eval_every):
        yield "train.keep_best: True needs held-out losses; name a data.eval, and give train.eval_every"
    elif train.keep_best and train.save_every % train.eval_every:
        yield (f"train.save_every: {train.save_every} is no multiple of train.eval_every: {train.eval_every}, as train.keep_best: True "
               "needs it: a checkpoint's held-out loss is that of its step")
    if train.steps is not None and train.epochs is not None:
        yield f"train.steps: {train.steps} and train.epochs: {train.epochs} are both given; keep one"
    if train.steps is not None:
        yield from conflicts_with_steps(train, train.steps)
    if train.chunk_length is not None and train.chunk_length >= data.max_length:
        yield (f"train.chunk_length: {train.chunk_length} has no effect, samples are at most data.max_length: {data.max_length} long; "
               "raise that one, or remove this")
    if train.global_batch_size % train.micro_batch_size:
        yield (f"train.global_batch_size: {train.global_batch_size} is no multiple of "
               f"train.micro_batch_size: {train.micro_batch_size}")
    if train.learning_rate * train.weight_decay >= 1:
        yield (f"train.weight_decay: {train.weight_decay} times train.learning_rate: {train.learning_rate} is what every weight loses in a "
               "step, all of it or more; lower one")
    if train.schedule == "constant" and train.final_lr_ratio:
        yield f"train.final_lr_ratio: {train.final_lr_ratio} has no effect with train.schedule: constant; remove it"
    if train.schedule == "exponential" and not train.final_lr_ratio:
        yield "train.final_lr_ratio: 0.0 is out of reach of train.schedule: exponential; give what is left at the end, for example 0.1"
    if train.max_skipped is not None and train.on_nan != "skip":
        yield f"train.max_skipped: {train.max_skipped} is for train.on_nan: skip, this is {train.on_nan!r}; remove one"
    if train.cycles is not None and train.schedule != "cosine_restarts":
        yield f"train.cycles: {train.cycles} is for train.schedule: cosine_restarts, this is {train.schedule!r}; remove one"


def conflicts_with_steps(train: TrainConfig, steps: int) -> Iterator[str]:
    """What of the learning rate's course has no room in a run of `steps`."""
    of = f"train.steps: {steps}" if train.steps else f"the run's {steps} steps"
    left, cycles = steps - train.warmup_steps, train.cycles or 2
    if left < 0:
        yield f"train.warmup_steps: {train.warmup_steps} is more than {of}"
    elif train.schedule == "cosine_restarts" and left < 2 * cycles:  # in cycles of one step nothing falls
        yield f"train.cycles: {cycles} in the {left} steps after the warm-up, of {of}, are under 2 steps each; give fewer, or more steps"


def _data_conflicts(data: DataConfig) -> Iterator[str]:
    if not data.train_paths:
        yield "data.train: [] names no data; give files, or data.mixture"
    if data.train and data.mixture:
        yield f"data.train: {list(data.train)} and data.mixture are both given; keep one"
    if data.mixture and data.train_samples is not None:
        yield f"data.train_samples: {data.train_samples} is for data.train; give samples to each entry of data.mixture"
    yield from _wording_conflicts("data", data)
    for number, source in enumerate(data.mixture):
        yield from _wording_conflicts(f"data.mixture.{number}", data.of_source(source))


def _wording_conflicts(place: str, data: DataConfig) -> Iterator[str]:
    """Fields that the prompt needs, or that mean nothing to it."""
    templates = {"template": data.template, "completion": data.completion}
    for field, value in templates.items():
        if data.prompt == "template" and value is None:
            yield f"{place}.{field}: is missing, {place}.prompt: template needs it"
        if data.prompt != "template" and value is not None:
            yield f"{place}.{field}: {value!r} is for {place}.prompt: template, this is {data.prompt!r}"
    if data.chat_template is not None and data.prompt != "chat":
        yield f"{place}.chat_template: {_shortened(data.chat_template)} is for {place}.prompt: chat, this is {data.prompt!r}"
    if data.drop_after_code and data.prompt in ("text", "chat"):
        yield f"{place}.drop_after_code: True is for a prompt with a completion, this is {data.prompt!r}; remove it"
    if data.overlong == "split" and data.prompt != "text":
        yield (f"{place}.overlong: 'split' is for {place}.prompt: text, this is {data.prompt!r}: a prompt can't be parted from its "
               "completion")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with repairs: 1e-4 is a number, 064 (eight times six and four) and 1:30 (ninety) are none, and a key given twice, or a
    scalar that is not what its form or tag says, is an error in its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # 2024-02-30; !!bool x
            raise yaml.constructor.ConstructorError(
                problem=f"{_shortened(node.value)} is no {node.tag.rpartition(':')[2]}; put text in quotes",
                problem_mark=node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
        list("-+0123456789"))
_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != _INTEGER] for first, resolvers in _Loader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789"))


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: << is not read; write the fields out")
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} is no text")
        if key in seen:
            raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def load_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Reads a YAML file and `section.key=value` overrides. Raises ConfigError naming the file, field and value."""
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return validate(tree, str(path))


def validate(tree: dict, origin: str) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(detail) for detail in error.errors()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{origin}: {problems[0]}{more}") from None


def _read_yaml(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: line {error.problem_mark.line + 1}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {_shortened(tree)}"
        raise ConfigError(f"{path}: {found}, give sections like model:, data:, output:")
    # A section with every line commented out is one of defaults.
    return {section: {} if fields is None else fields for section, fields in tree.items()}


def _apply_override(tree: dict, override: str) -> None:
    """`train.steps=10` sets tree["train"]["steps"]; the value is read as YAML."""
    key, equals, text = override.partition("=")
    section, _, field = key.partition(".")
    if not (equals and section and field) or "." in field:
        raise ConfigError(f"override {override!r}: write section.key=value, for example train.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"override {_shortened(override)}: {_shortened(text)} is no YAML value; quote it") from None
    fields = tree.setdefault(section, {})
    if not isinstance(fields, dict):
        raise ConfigError(f"override {override!r}: the file's {section}: is {_shortened(fields)}, not a section")
    fields[field] = value


_WORDING = {
    "model_type": "is no section, give its fields below it, indented",
    "dict_type": "give pairs, for example {query: question}",
    "tuple_type": "give a list",
    "too_short": "the list has too few items",
    "too_long": "the list has too many items",
    "string_type": "give text, in quotes where YAML takes it for something else",
    "string_too_short": "is empty",
    "string_unicode": _NO_TEXT,
    "bool_type": "give true or false",
    "int_type": "give a whole number",
    "float_type": "give a number",
}
"""By pydantic's kind of error, where its own words are about Python rather than YAML."""


def _describe(detail: ErrorDetails) -> str:
    """One pydantic error as `field: what is wrong with which value`."""
    field = ".".join(map(str, detail["loc"]))
    is_item = detail["loc"] and isinstance(detail["loc"][-1], int)
    kind, value = detail["type"], _plain(detail["input"])
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "missing" and is_item:
        return f"{'.'.join(map(str, detail['loc'][:-1]))}: {_shortened(value)}: {_WORDING['too_short']}"
    if kind == "missing":
        return f"{field}: is missing ({_field_info(detail['loc']).description or 'a section'})"
    if kind == "extra_forbidden":
        known = _fields_of(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{field}: is no such field; {hint}"
    if kind == "literal_error":
        near = difflib.get_close_matches(_shortened(value).strip("'"), re.findall(r"'([^']*)'", detail["ctx"]["expected"]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{field}: {_shortened(value)} is not one of {detail['ctx']['expected']}{hint}"
    return f"{field}: {_shortened(value)}: {_WORDING.get(kind) or detail['msg'][0].lower() + detail['msg'][1:]}"


_SHOWN = reprlib.Repr()
"""A few lines of YAML may stand for a value of gigabytes, by aliases of aliases."""
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxtuple, _SHOWN.maxdict, _SHOWN.maxset = 4, 12, 12, 12, 12
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 100


def _shortened(value: Any) -> str:
    text = _SHOWN.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def model_of(**fields: Any) -> ModelConfig:
    """The model that a command's arguments name. Raises ConfigError naming the field and value."""
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        raise ConfigError(f"model.{_describe(error.errors()[0])}") from None


def _section_of(location: tuple) -> type[Section]:
    """The class whose field the last part of the location names."""
    if location[:2] == ("data", "mixture") and len(location) > 3:
        return MixtureSource
    return RunConfig.model_fields[location[0]].annotation if len(location) > 1 else RunConfig


def _fields_of(location: tuple) -> list[str]:
    return list(_section_of((*location, "")).model_fields)


def _field_info(location: tuple):
    return _section_of(location).model_fields[location[-1]]


def dump_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal object."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for field in _NOT_FOR[config.adapter.method]:  # given at all, they are refused
        tree["adapter"].pop(field, None)
    if not config.adapter.has_rank:
        del tree["adapter"]["rank"]
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def describe_fields() -> str:
    """Every field with its meaning and default, as a YAML skeleton for `bone-ds config`."""
    lines = []
    for name, info in RunConfig.model_fields.items():
        lines.append(f"{name}:")
        for field, detail in info.annotation.model_fields.items():
            default = "  # required" if detail.is_required() else ""
            value = "" if detail.is_required() else " " + _as_yaml(detail.default)
            choices = re.findall(r"'([^']*)'", str(detail.annotation)) if "Literal" in str(detail.annotation) else []
            told = f"{detail.description} One of: {', '.join(choices)}." if choices else detail.description
            lines += [f"  # {line}" for line in textwrap.wrap(told, 96, break_long_words=False, break_on_hyphens=False)]
            lines.append(f"  {field}:{value}{default}")
        lines.append("")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(_plain(value), default_flow_style=True).replace("\n...\n", "").strip()
