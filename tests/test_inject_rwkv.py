"""What is trained of an RWKV6: exact counts at the official sizes, subsets, states and all weights."""

import pytest
import tiny_rwkv
import torch

from bone_ds.config import AdapterConfig
from bone_ds.errors import InjectionError
from bone_ds.inject import check, inject, with_rank
from rwkv_adapters import ARCHITECTURE
from rwkv_adapters.model import Rwkv6, Sizes


def official(layers, width, ffn_width):
    sizes = Sizes(layers, width, width, width // 64, ffn_width, vocabulary=65536, mix_rank=32 if width < 4096 else 64,
                  decay_rank=64 if width < 4096 else 128)
    with torch.device("meta"):
        return Rwkv6(sizes)


def tiny():
    with torch.device("meta"):
        return Rwkv6(tiny_rwkv.tiny_sizes(layers=3))


def trained(model, **adapter):
    trainable = inject(model, ARCHITECTURE, AdapterConfig.model_validate(adapter))
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == set(map(id, trainable.values()))
    return trainable


@pytest.mark.parametrize(("size", "expected"), [
    ((24, 2048, 7168), 33_030_144), ((32, 2560, 8960), 55_050_240), ((32, 4096, 14336), 88_080_384)], ids=["1.6B", "3B", "7B"])
@pytest.mark.parametrize("adapter", [{"rank": 64}, {"method": "lora", "rank": 32}], ids=["bone row r=64", "lora r=32"])
def test_parameters_at_the_official_sizes(size, expected, adapter):
    assert sum(parameter.numel() for parameter in trained(official(*size), **adapter).values()) == expected


@pytest.mark.parametrize(("adapter", "rank"), [
    ({}, 64), ({"grouping": "col"}, 64), ({"grouping": "left"}, 64), ({"method": "lora"}, 32)], ids=str)
def test_the_largest_rank_within_a_budget(adapter, rank):
    asked = AdapterConfig(parameters=33_030_144, **adapter)
    assert with_rank(official(24, 2048, 7168), ARCHITECTURE, asked).rank == rank


@pytest.mark.parametrize("grouping", ["row", "col", "left"])
def test_every_projection_of_every_layer_by_default(grouping):
    names = trained(tiny(), rank=8, grouping=grouping)
    assert set(names) == {f"blocks.{layer}.{target}.bone" for layer in range(3) for target in ARCHITECTURE.targets}


def test_a_part_of_the_targets_and_layers():
    names = trained(tiny(), rank=8, targets=("att.key", "ffn.value"), layers=(1, 3))
    assert list(names) == [f"blocks.{layer}.{target}.bone" for layer in (1, 2) for target in ("att.key", "ffn.value")]


def test_states_of_a_range_of_layers():
    states = trained(tiny(), method="state", layers=(1, 3))
    assert {name: tuple(state.shape) for name, state in states.items()} == {
        f"blocks.{layer}.att.time_state": (4, 8, 8) for layer in (1, 2)}


def test_full_trains_every_weight():
    model = tiny()
    assert dict(trained(model, method="full")) == dict(model.named_parameters())


@pytest.mark.parametrize(("adapter", "says"), [
    ({"targets": ("key",)}, "adapter.targets: rwkv has no 'key', choose among att.receptance, "),
    ({"targets": ("att.keys",)}, "did you mean 'att.key'"),
    ({"layers": (0, 4)}, r"adapter.layers: \[0, 4\] goes past the model's 3 layers"),
    ({"method": "state", "layers": (2, 4)}, r"adapter.layers: \[2, 4\] goes past"),
    ({"rank": 16}, r"adapter.rank: 16 does not divide blocks.0.ffn.key"),
])
def test_what_does_not_fit_is_refused(adapter, says):
    model = tiny()
    for attempt in (check, inject):
        with pytest.raises(InjectionError, match=says):
            attempt(model, ARCHITECTURE, AdapterConfig.model_validate(adapter))
    assert all(parameter.requires_grad for parameter in model.parameters())
