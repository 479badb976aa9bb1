"""Activation checkpointing: less is kept, and the gradients stay."""

import pytest
import tiny
import torch

from bone_ds import activation
from bone_ds.config import AdapterConfig, ModelConfig
from bone_ds.inject import inject
from llama_adapters import ARCHITECTURE


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def kept_and_gradients(directory, policy, **adapter):
    """Bytes that a forward pass keeps for backward beside the weights, and the adapter's gradients."""
    source = ARCHITECTURE.open(ModelConfig(path=str(directory)))
    model = ARCHITECTURE.build(source, torch.float32)
    ARCHITECTURE.load(model, source, Here())
    trainable = inject(model, ARCHITECTURE, AdapterConfig(rank=tiny.RANK, **adapter))
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable.values():
        parameter.data.normal_(std=0.02, generator=generator)
    activation.apply(model, ARCHITECTURE, policy)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept_bytes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.arange(3, 43)[None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = ARCHITECTURE.hidden(model, tokens, (40,))[0].square().sum()
    loss.backward()
    return sum(kept_bytes.values()), {name: parameter.grad for name, parameter in trainable.items()}


class Here:
    def assign(self, param, tensor):
        param.data.copy_(tensor)


@pytest.mark.parametrize(("policy", "adapter"), [
    ("layer", {"grouping": "row"}), ("layer", {"grouping": "col", "strategy": "materialized"}),
    ("bone", {"grouping": "row", "strategy": "materialized"}), ("bone", {"grouping": "col", "strategy": "materialized"})])
def test_a_policy_keeps_less_and_changes_no_gradient(model_directory, policy, adapter):
    kept, gradients = kept_and_gradients(model_directory, "none", **adapter)
    kept_with_policy, gradients_with_policy = kept_and_gradients(model_directory, policy, **adapter)
    assert kept_with_policy < 0.7 * kept, (kept_with_policy, kept)
    assert all(gradient.abs().amax() > 0 for gradient in gradients.values())
    torch.testing.assert_close(gradients_with_policy, gradients, rtol=1e-5, atol=1e-6)
