"""A language model as one module that maps a batch to its summed cross entropy: what the engine trains."""

from __future__ import annotations

from torch import Tensor, nn

from bone_ds.arch import Architecture, Batch
from bone_ds.loss import chunked_cross_entropy


class Objective(nn.Module):
    def __init__(self, model: nn.Module, architecture: Architecture, loss_chunk: int):
        super().__init__()
        self.model = model
        self.architecture = architecture
        self.head = _FrozenHead(architecture.head(model), loss_chunk)

    def forward(self, batch: Batch) -> Tensor:
        """The sum, not the mean, over the batch's labels, in fp32."""
        hidden = self.architecture.hidden(self.model, batch.tokens, batch.document_lengths)
        return self.head(hidden, batch.label_positions, batch.labels)


class _FrozenHead(nn.Module):
    """Owns the head's weight a second time, so that ZeRO-3 gathers it for this forward alone."""

    def __init__(self, weight: nn.Parameter, chunk: int):
        super().__init__()
        self.weight, self.chunk = weight, chunk

    def forward(self, hidden: Tensor, label_positions: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, self.weight, label_positions, labels, self.chunk)
