"""What a Bone adapter is, as a PEFT configuration: the fields of PEFT's former BoneConfig, and the groupings it had not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from peft import PeftConfig

from bone_ds.bone import resolve
from bone_ds.errors import ConfigError
from bone_ds.formats.peft import grouping_of


class PeftType(str, Enum):  # noqa: UP042 - PEFT takes what follows the dot of its str()
    """PEFT's own enumeration has it no more; transformers and PEFT ask a configuration's type for its `value`."""

    BONE = "BONE"


PEFT_TYPE = PeftType.BONE
BIASES = ("none", "all", "bone_only")
NEW_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT trains whole by task: the modules that a pretrained model lacks, and that begin with random values."""


@dataclass
class BoneConfig(PeftConfig):
    """Which linear modules get a Bone adapter, and of which kind.

    r: block size; `miss` takes any, the others one that divides both sides of every layer.
    target_modules: names or endings of names, a regex of whole names, "all-linear" (all but the output layer), or None: what PEFT
        chooses for the architecture. exclude_modules: the same, and never adapted.
    layers_to_transform, layers_pattern: of target_modules by name, only those in these layers; the pattern is what comes before the
        layer's number.
    init_weights: as PEFT's: True for `miss`, "bat" for `col`; False for random values in place of zeros.
    grouping: row, col, left, free or miss in place of what init_weights names. groups: of `free`, the number of a layer's matrices.
    form: affine, or the ablations hadamard and unconstrained, of row, col and free.
    modules_to_save: modules that are trained whole, in a copy, and saved with the adapter; task_type "SEQ_CLS", "TOKEN_CLS" and
        "QUESTION_ANS" add the heads of these tasks.
    bias: "none", "all" of the model's, or "bone_only", those of the adapted layers.
    strategy: how it is computed, with equal results; see `bone_ds/bone/README.md`.

    Raises ConfigError, or InjectionError for a grouping, form or strategy that is unknown, or goes not with the others.
    """

    r: int = 64
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["bat"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    grouping: str | None = None
    form: str = "affine"
    groups: int | None = None
    strategy: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ConfigError(f"r: {self.r!r} is no block size, give 1 or more")
        if self.bias not in BIASES:
            raise ConfigError(f"bias: {self.bias!r} is unknown, choose one of {', '.join(BIASES)}")
        self._name_the_grouping()
        resolve(self.strategy, self.grouping, self.form)
        self._check_layers()
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save: {self.modules_to_save!r} is one string, give a list of names")
        self.modules_to_save = list(dict.fromkeys([*(self.modules_to_save or ()), *NEW_HEADS.get(self.task_type, ())])) or None
        for field in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, field), (list, tuple)):
                setattr(self, field, set(getattr(self, field)))

    def _name_the_grouping(self) -> None:
        """Both `grouping` and, so that older PEFT reads the saved file right or not at all, `init_weights`."""
        named = grouping_of(self.init_weights)
        if self.grouping is None:
            self.grouping = named
        if self.init_weights == "bat" and (self.grouping, self.form) != ("col", "affine"):
            raise ConfigError(f"init_weights: 'bat' is grouping col and form affine, but they are {self.grouping!r} and "
                              f"{self.form!r}; remove it")
        if (self.groups is None) == (self.grouping == "free"):
            raise ConfigError(f"groups: {self.groups!r} with grouping {self.grouping!r}: free needs a number of groups, others have "
                              "none")
        if (self.grouping, self.form, self.init_weights) == ("col", "affine", True):
            self.init_weights = "bat"

    def _check_layers(self) -> None:
        for field in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, field) is not None:
                raise ConfigError(f"{field}: {getattr(self, field)!r} has no meaning with a regex as target_modules, which says the "
                                  "layers itself; remove it")

    @property
    def method(self) -> dict[str, Any]:
        """What the tensors mean: equal for adapters that may be loaded for each other."""
        return {"r": self.r, "grouping": self.grouping, "form": self.form, "groups": self.groups}

    def to_dict(self) -> dict[str, Any]:
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    @classmethod
    def from_peft_type(cls, **kwargs) -> BoneConfig:
        """The configuration that a directory's file holds: this class's, that of older PEFT's Bone, or MiSS, which is another name of it.

        Raises ConfigError for other methods and for MiSS's `mini`.
        """
        peft_type = kwargs.get("peft_type", PEFT_TYPE)
        if peft_type not in (PEFT_TYPE, "MISS"):
            raise ConfigError(f"peft_type: {peft_type!r} is another method; BONE and MISS are read")
        grouping_of(kwargs.get("init_weights", True))
        theirs = {name: value for name, value in kwargs.items() if name not in ("miss_dropout", "mini_r")}
        return super().from_peft_type(**theirs | {"peft_type": PEFT_TYPE})
