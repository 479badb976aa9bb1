"""DeepSpeed's monitor sections: TensorBoard, CSV files and Weights & Biases; where they write and what must be installed for them."""

from __future__ import annotations

import difflib
import os
from importlib.util import find_spec
from pathlib import Path

from bone_ds.errors import ConfigError

_FIELDS = {
    "tensorboard": ("output_path", "job_name"),
    "csv_monitor": ("output_path", "job_name"),
    "wandb": ("group", "team", "project"),
}
SECTIONS = tuple(_FIELDS)
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What DeepSpeed imports; csv_monitor needs nothing."""


def check(origin: str, given: dict) -> None:
    """Raises ConfigError for a monitor section of the JSON `origin` that would not be obeyed."""
    for name in SECTIONS:
        if name in given:
            _check(origin, name, given[name])


def placed(resolved: dict, directory: Path) -> dict[str, dict]:
    """The monitor sections, those that write files in the run directory where they don't say otherwise.

    DeepSpeed's own default is a directory of a fixed name wherever the command was started, shared by all runs.
    """
    found = {name: resolved[name] for name in SECTIONS if name in resolved}
    return {name: _placed(name, section, directory) if "output_path" in _FIELDS[name] else section for name, section in found.items()}


def _placed(name: str, section: dict, directory: Path) -> dict:
    output_path = Path(os.path.expanduser(section.get("output_path", directory)))
    return {"job_name": name} | section | {"output_path": str(output_path)}


def without(resolved: dict) -> dict:
    """What DeepSpeed's engine is told: it opens no monitor by itself."""
    return {key: value for key, value in resolved.items() if key not in SECTIONS}


def check_installed(resolved: dict) -> None:
    """Raises ConfigError for a monitor that is on and whose package is not there."""
    for name, package in _PACKAGES.items():
        if resolved.get(name, {}).get("enabled") and not _is_installed(package):
            raise ConfigError(f"deepspeed.config: {name}: needs the package {package}, which is not installed; "
                              f"pip install {package}, or set {name}.enabled to false")


def _is_installed(package: str) -> bool:
    """A directory of that name where the command is started, like the one that wandb writes to, is found without an origin."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _check(origin: str, name: str, section: object) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"{origin}: {name}: is {section!r:.60}; give an object like {{\"enabled\": true}}")
    known = ("enabled", *_FIELDS[name])
    for field, value in section.items():
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            raise ConfigError(f"{origin}: {name}.{field}: is no field known here; "
                              + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"))
        if field != "enabled" and not (isinstance(value, str) and value):
            raise ConfigError(f"{origin}: {name}.{field}: {value!r} is no text")
    if not isinstance(section.get("enabled"), bool):
        raise ConfigError(f"{origin}: {name}.enabled: is {section.get('enabled')!r}; give true or false, without it nothing is reported")
