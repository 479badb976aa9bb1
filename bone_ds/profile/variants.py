"""What is compared: the config, and the config with changes of each variant."""

from __future__ import annotations

import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml

from bone_ds.config import AdapterConfig, RunConfig, dump_yaml, load_config
from bone_ds.errors import ConfigError

_FORM = "write NAME: section.key=value ..., for example --compare \"lora: adapter.method=lora adapter.rank=32\""
_NOTHING = ("", "~", "null")
METHODS = get_args(AdapterConfig.model_fields["method"].annotation)


@dataclass(frozen=True)
class Variant:
    name: str
    config: RunConfig
    index: int = 0
    """Its place among those compared."""

    @property
    def file_name(self) -> str:
        """Of its own among those compared."""
        return f"{self.index + 1}-{re.sub(r'[^A-Za-z0-9._=+-]+', '-', self.name)}".rstrip("-.")


def variants(path: str, overrides: list[str], compare: list[str]) -> list[Variant]:
    """One for each --compare, a text `NAME: overrides` or a YAML file of them; the config itself where there is none.

    Raises ConfigError for a text of another form, two variants of one name, and where a variant's config is refused.
    """
    base = load_config(path, overrides)
    if not compare:
        return [Variant(Path(path).stem, base)]
    given = [pair for text in compare for pair in (_read(Path(text)) if text.endswith((".yaml", ".yml")) else [_parse(text)])]
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--compare: two variants are called {name!r}; give each a name of its own")
    return [Variant(name, _changed(base, name, changes), index) for index, (name, changes) in enumerate(given)]


def _parse(text: str) -> tuple[str, list[str]]:
    name, colon, rest = text.partition(":")
    try:
        changes = shlex.split(rest)
    except ValueError as error:
        raise ConfigError(f"--compare {text!r}: {error}") from None
    if not (colon and name.strip()) or re.match(r"\w+\.\w+=", name):
        raise ConfigError(f"--compare {text!r}: has no name; {_FORM}")
    if not all("=" in change for change in changes):
        raise ConfigError(f"--compare {text!r}: {next(change for change in changes if '=' not in change)!r} sets nothing; {_FORM}")
    return name.strip(), changes


def _read(path: Path) -> list[tuple[str, list[str]]]:
    """A mapping of names to overrides, each a text like --compare's."""
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--compare {path}: can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--compare {path}: is no YAML: {str(error).splitlines()[0]}") from None
    # Nodes, of which none is lost where a name stands twice.
    pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
    if not pairs or not all(isinstance(node, yaml.ScalarNode) for pair in pairs for node in pair):
        raise ConfigError(f"--compare {path}: give a line NAME: section.key=value ... for each variant")
    return [_parse(f"{name.value}: {'' if changes.value in _NOTHING else changes.value}") for name, changes in pairs]


def _changed(base: RunConfig, name: str, changes: list[str]) -> RunConfig:
    """The variant's config."""
    base = base.model_copy(update={"adapter": _adapter(base.adapter, dict(change.split("=", 1) for change in changes))})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        try:
            path.write_text(dump_yaml(base), encoding="utf-8")
            return load_config(path, changes)
        except ConfigError as error:
            raise ConfigError(f"--compare {name!r}: {str(error).removeprefix(f'{path}: ')}") from None


def _adapter(adapter: AdapterConfig, changes: dict[str, str]) -> AdapterConfig:
    """The config's own without what the changes take the place of: fields of another method or grouping, rank beside parameters."""
    fields = {field: value for field, value in adapter if field in adapter.model_fields_set}
    if changes.get("adapter.method") in METHODS:
        fields["method"] = changes["adapter.method"]
    if changes.get("adapter.grouping", "free") != "free":
        fields.pop("groups", None)
    if "adapter.rank" in changes:
        fields.pop("parameters", None)
    if "adapter.parameters" in changes:
        fields.pop("rank", None)
        fields["parameters"] = 1  # without any, the default rank would be written
    return AdapterConfig.model_construct(**fields)
