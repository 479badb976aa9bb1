"""What backward computes again instead of keeping: one policy from the YAML and the DeepSpeed JSON's activation_checkpointing."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass

from bone_ds.config import RunConfig
from bone_ds.errors import ConfigError

CHOICES = ("none", "bone", "layer", "bone+layer")
# Fields of DeepSpeed's section that only its own checkpoint function obeys, which Hugging Face's and RWKV6's layers don't go through.
_REFUSED = {
    "partition_activations": "shares what is kept among ranks of one tensor-parallel group; here every rank has samples of its own",
    "contiguous_memory_optimization": "copies partitioned activations into one buffer, and nothing is partitioned here",
    "synchronize_checkpoint_boundary": "is for DeepSpeed's own timing of each checkpoint; no other use waits there",
    "profile": "is DeepSpeed's own timing of each checkpoint; none of its checkpoints are in use",
}
_AMONG_LAYERS = ("every", "modules", "number_checkpoints")
_WITHOUT = {"none": (*_AMONG_LAYERS, "cpu_checkpointing"), "bone": _AMONG_LAYERS}
"""Fields that mean nothing to a policy."""
_YAML = {"policy": "train.activation_checkpointing", "every": "train.recompute_every", "modules": "train.recompute_modules"}


@dataclass(frozen=True)
class ActivationPolicy:
    policy: str = "none"
    """One of CHOICES."""
    every: int | None = None
    """layer: each such layer, from the first."""
    modules: tuple[str, ...] | None = None
    """layer: these modules of it, by their names within a layer, instead of the whole layer."""
    number_checkpoints: int | None = None
    """layer: so many layers, evenly spread, in place of `every`."""
    cpu_checkpointing: bool = False
    """Kept inputs wait in host memory."""

    @property
    def bone(self) -> bool:
        return "bone" in self.policy

    @property
    def layer(self) -> bool:
        return "layer" in self.policy

    @classmethod
    def of(cls, section: dict) -> ActivationPolicy:
        """From the section of a resolved JSON."""
        modules = section.get("modules")
        return cls(**section | {"modules": modules and tuple(modules)})

    def section(self) -> dict:
        """The section of a resolved JSON: what has a meaning with this policy."""
        fields = asdict(self) | {"modules": self.modules and list(self.modules)}
        return {name: value for name, value in fields.items() if name not in _WITHOUT.get(self.policy, ())}


def policy_of(config: RunConfig, origin: str, section: object) -> ActivationPolicy:
    """The policy of a run. section: activation_checkpointing as the JSON `origin` has it, {} where it has none.

    Left to `auto`, whole layers are recomputed where anything else is said about them. Raises ConfigError for fields that would
    not be obeyed, and where YAML and JSON, or two fields, contradict each other.
    """
    path = f"{origin}: activation_checkpointing"
    given = _checked(path, section)
    names = {name: f"{path}.{name}" for name in given}
    for name, (field, value) in _said_in_yaml(config).items():
        if name in given and given[name] != value:
            raise ConfigError(f"{names[name]}: {_shown(given[name])} contradicts {field}: {_shown(value)}; remove one")
        given[name], names[name] = value, field
    _refuse_contradictions(given, names)
    policy = given.setdefault("policy", "layer" if given else "none")
    if "bone" in policy and config.adapter.method != "bone":
        raise ConfigError(f"{names['policy']}: {policy!r} needs adapter.method: bone, this is {config.adapter.method!r}; use none or layer")
    adapter = config.adapter
    if policy == "bone" and "cpu_checkpointing" in given and adapter.strategy != "materialized" and adapter.grouping != "left":
        raise ConfigError(f"{names['cpu_checkpointing']}: True has no effect with {names['policy']}: 'bone', since adapter.strategy: "
                          f"{adapter.strategy!r} keeps nothing that could wait on the host; use layer, or remove it")
    if "layer" in policy and "number_checkpoints" not in given:
        given.setdefault("every", 1)
    return ActivationPolicy(**given)


def _said_in_yaml(config: RunConfig) -> dict[str, tuple[str, object]]:
    """Name in the section -> (the YAML's field, value)."""
    train = config.train
    values = {"policy": None if train.activation_checkpointing == "auto" else train.activation_checkpointing,
              "every": train.recompute_every, "modules": train.recompute_modules}
    return {name: (_YAML[name], value) for name, value in values.items() if value is not None}


def _refuse_contradictions(given: dict, names: dict[str, str]) -> None:
    for name in _WITHOUT.get(given.get("policy"), ()):
        if name in given:
            raise ConfigError(f"{names[name]}: {_shown(given[name])} has no meaning with {names['policy']}: {given['policy']!r}; "
                              "remove one")
    if "every" in given and "number_checkpoints" in given:
        raise ConfigError(f"{names['number_checkpoints']}: {given['number_checkpoints']} and {names['every']}: {given['every']} both say "
                          "how many layers are recomputed; remove one")


def _checked(path: str, section: object) -> dict:
    """The fields of a JSON's section that ask for something."""
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: is {section!r}, give an object like {{\"policy\": \"layer\"}}")
    given = {}
    for name, value in section.items():
        if name not in _CHECKS and name not in _REFUSED:
            near = difflib.get_close_matches(name, [*_CHECKS, *_REFUSED], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            raise ConfigError(f"{path}.{name}: is no field known here; {hint}")
        if value is None or value is False:
            continue
        if name in _REFUSED:
            raise ConfigError(f"{path}.{name}: {_REFUSED[name]}; remove it")
        fits, wanted = _CHECKS[name]
        if not fits(value):
            near = difflib.get_close_matches(str(value), CHOICES, n=1) if name == "policy" else ()
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}.{name}: {value!r:.60} is not {wanted}{hint}")
        given[name] = tuple(value) if name == "modules" else value
    return given


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_names(value: object) -> bool:
    return isinstance(value, list) and value and all(isinstance(name, str) and name for name in value) and len(set(value)) == len(value)


_CHECKS = {
    "policy": (lambda value: value in CHOICES, f"one of {', '.join(CHOICES)}"),
    "every": (_is_count, "a whole number from 1 up"),
    "modules": (_are_names, "a list of names, each once"),
    "number_checkpoints": (_is_count, "a whole number from 1 up"),
    "cpu_checkpointing": (lambda value: value is True, "true or false"),
}


def _shown(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
