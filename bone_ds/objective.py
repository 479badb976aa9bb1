"""A language model as one module that maps a batch to its summed cross entropy: what the engine trains."""

from __future__ import annotations

from torch import Tensor, nn

from bone_ds.arch import Architecture, Batch, State
from bone_ds.loss import chunked_cross_entropy


class Objective(nn.Module):
    def __init__(self, model: nn.Module, architecture: Architecture, loss_chunk: int, l2wrap: float = 0.0):
        super().__init__()
        self.model = model
        self.architecture = architecture
        self.head = _Head(architecture.head(model), loss_chunk, l2wrap)

    def forward(self, batch: Batch, state: State | None = None, keep_state: bool = False) -> tuple[Tensor, State | None]:
        """The sum, not the mean, over the batch's labels, in fp32, and the state after the last document if it is kept.

        state: what the first document goes on from.
        """
        last_document = slice(-1, None)
        hidden, after = self.architecture.hidden(
            self.model, batch.tokens, batch.document_lengths, state, last_document if keep_state else None)
        return self.head(hidden, batch.label_positions, batch.labels), after


class _Head(nn.Module):
    """Owns the head's weight a second time, so that ZeRO-3 gathers it for this forward alone."""

    def __init__(self, weight: nn.Parameter, chunk: int, l2wrap: float):
        super().__init__()
        self.weight, self.chunk, self.l2wrap = weight, chunk, l2wrap

    def forward(self, hidden: Tensor, label_positions: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, self.weight, label_positions, labels, self.chunk, self.l2wrap)
