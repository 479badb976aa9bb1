"""What the core asks of an architecture, and how it finds one by name.

An architecture is a package `<name>_adapters` whose `__init__` holds `ARCHITECTURE`, an object with the methods of
`Architecture`. A new one is a new folder and a name in `NAMES`; nothing else in the core changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bone_ds.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bone_ds.checksums import Checksums
    from bone_ds.config import ModelConfig

NAMES = ("llama", "rwkv")

State = tuple["Tensor", ...]
"""What D documents leave behind for their continuation: tensors whose first dimension is D, without gradient."""


@dataclass(frozen=True)
class Source:
    """A model on disk, opened but not read."""

    path: Path
    """The directory or file that holds it in the architecture's layout."""
    origin: str
    """What the user wrote: a directory, a hub id or a file."""
    revision: str | None
    """The hub commit, where there is one."""
    fingerprint: str
    """Hash of tensor names, shapes and a sample of their bytes: equal models have equal fingerprints."""


@dataclass(frozen=True)
class Inventory:
    """A model on disk as its headers describe it."""

    source: Source
    """It can be built. Its fingerprint is empty where a conversion alone would tell it."""
    sizes: Mapping[str, int]
    """By the names of the architecture's own configuration."""
    parameters_by_dtype: Mapping[str, int]
    """As they are stored, by the file format's name of the dtype."""


@dataclass(frozen=True)
class Batch:
    """Documents end to end in one row, without padding; each attends to itself alone."""

    tokens: Tensor
    """(1, T) int64"""
    document_lengths: tuple[int, ...]
    """Sums to T."""
    label_positions: Tensor
    """(M,) int64, rows of the hidden states that predict a loss-bearing token."""
    labels: Tensor
    """(M,) int64, the tokens they predict."""
    continues: bool = False
    """The first document goes on where the last one of the batch before it stopped."""


class Placement(Protocol):
    """Where parameters live: whole on this device, or partitioned over ranks under ZeRO-3."""

    def empty(self) -> AbstractContextManager[None]:
        """Modules constructed inside get uninitialised parameters, placed."""

    def assign(self, param: nn.Parameter, tensor: Tensor) -> None:
        """Copies a whole tensor into a placed parameter, in its dtype; every rank calls it, in the same order."""


class Reading(Protocol):
    """Documents that a model has read so far: its cache or state of them."""

    def read(self, tokens: list[list[int]]) -> Tensor:
        """Reads on in every document, one token at least; the logits (D, V) of what comes next."""

    def keep(self, documents: list[int]) -> None:
        """Forgets all documents but these, which are renumbered in this order."""


class Architecture(Protocol):
    name: str
    targets: tuple[str, ...]
    """Names of the linear modules adapted by default; every one that may be."""
    carries_state: bool
    """Whether a document can go on from a state: trained in chunks, generated in constant memory."""
    kinds: Mapping[str, str]
    """Names of a residual block's modules that mix tokens -> "attention", or channels -> "mlp"; its others are norms."""

    def recognises(self, path: str) -> bool:
        """Whether this directory, hub id or file holds a model of this architecture."""

    def open(self, model: ModelConfig) -> Source:
        """Finds, downloads or converts the model and checks it without reading its weights. Raises CheckpointError."""

    def outline(self, model: ModelConfig) -> Source:
        """As `open`, but where the weights are not there, from a config file alone or from the published sizes of a model of that name.

        The source's fingerprint is empty then: it can be built, not loaded. Raises CheckpointError where nothing is known of it.
        """

    def without_weights(self, model: ModelConfig) -> Source:
        """As `outline`, with a tokenizer that can be loaded: of a model on the hub everything but its weights is fetched."""

    def inventory(self, model: ModelConfig) -> Inventory:
        """As `open`, of a model on this machine; converts nothing. Raises CheckpointError where it is not whole."""

    def tokenizer(self, source: Source): ...

    def context_length(self, source: Source) -> int | None:
        """Tokens of the longest document that the model was made for; None where it has no limit."""

    def build(self, source: Source, dtype: torch.dtype) -> nn.Module:
        """The causal language model with unset weights; called under `Placement.empty()`."""

    def load(self, model: nn.Module, source: Source, placement: Placement, checksums: Checksums | None = None) -> None:
        """Streams the weights into the model, one tensor at a time.

        checksums: are taken of all that the model's outputs depend on, and finished. Raises CheckpointError for weights that are found
        damaged, by what the files say of themselves or by `checksums`.
        """

    def keep_as_on(self, model: nn.Module, device: str) -> None:
        """Makes a model of fake CPU tensors keep for backward what it would on a "cuda" device; "cpu" changes nothing."""

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The residual blocks in order, with their module names."""

    def hidden(self, model: nn.Module, tokens: Tensor, document_lengths: tuple[int, ...], state: State | None = None,
               keep_state: slice | None = None) -> tuple[Tensor, State | None]:
        """tokens (1, T) -> the final hidden states (T, C) that the head reads, and the state of the documents that keep_state takes.

        state: of the first documents of the row, which go on from it; the others begin anew. Only where `carries_state`.
        """

    def head(self, model: nn.Module) -> nn.Parameter:
        """(vocab, C)"""

    def add_initial_state(self, model: nn.Module, first_layer: int, last_layer: int) -> dict[str, nn.Parameter]:
        """Gives layers [first, last) a trainable state, zero at first, that documents begin with; by adapter name.

        Only where `carries_state`.
        """

    def reading(self, model: nn.Module, documents: int) -> Reading:
        """So many documents that the model has read nothing of."""

    def rewrite(self, source: Source, out: Path, change: Callable[[str, Tensor], Tensor], added: Mapping[str, Tensor],
                checksums: Checksums | None = None) -> None:
        """Writes the model to `out`, in the source's dtype and the form its name asks for, each weight as change(name, weight).

        added: tensors to write where the source lacks them. `out` does not exist and appears whole. checksums: as in `load`. Raises
        ConfigError for a name that asks for no form the architecture has, and CheckpointError as `load` does.
        """


def load(name: str) -> Architecture:
    if name not in NAMES:
        raise ConfigError(f"model.architecture: {name!r} is unknown, choose one of {', '.join(NAMES)}")
    return importlib.import_module(f"{name}_adapters").ARCHITECTURE


def resolve(model: ModelConfig) -> Architecture:
    """The architecture the config names, or the one that recognises the model."""
    if model.architecture != "auto":
        return load(model.architecture)
    for architecture in map(load, NAMES):
        if architecture.recognises(model.path):
            return architecture
    raise ConfigError(f"model.path: no architecture of {', '.join(NAMES)} recognises {model.path!r}")
