"""Which parameters train, how many they are, and what is refused. A 7B model on the meta device costs no memory."""

import pytest
import torch
from tiny_llama import tiny_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bone_ds.config import AdapterConfig
from bone_ds.errors import InjectionError
from bone_ds.inject import inject, with_rank
from llama_adapters import ARCHITECTURE


def llama2_7b() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000))


def tiny() -> nn.Module:
    return LlamaForCausalLM(tiny_config())


def adapt(model: nn.Module, **adapter) -> dict[str, nn.Parameter]:
    return inject(model, ARCHITECTURE, AdapterConfig(**adapter))


@pytest.mark.parametrize("adapter, parameters", [
    ({"grouping": "col", "rank": 16}, 21_757_952),
    ({"grouping": "col", "rank": 32}, 43_515_904),
    ({"grouping": "col", "rank": 64}, 87_031_808),
    ({"grouping": "col", "rank": 128}, 174_063_616),
    ({"grouping": "row", "rank": 64}, 72_876_032),
    ({"grouping": "left", "rank": 64}, 87_031_808),
    ({"grouping": "row", "rank": 32, "form": "unconstrained"}, 72_876_032),
    ({"grouping": "col", "rank": 32, "form": "unconstrained"}, 87_031_808),
    ({"grouping": "row", "rank": 64, "form": "hadamard"}, 72_876_032),
    ({"grouping": "free", "rank": 64, "groups": 64}, 58_720_256),
    ({"grouping": "miss", "rank": 64}, 87_031_808),
    ({"method": "lora", "rank": 36}, 89_948_160),
], ids=str)
def test_trainable_parameters_of_llama2_7b(adapter, parameters):
    model = llama2_7b()
    trainable = adapt(model, **adapter)
    assert sum(parameter.numel() for parameter in trainable.values()) == parameters
    assert {id(p) for p in trainable.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(trainable) == 32 * 7 * (2 if adapter.get("method") == "lora" else 1)


@pytest.mark.parametrize("adapter, parts", [({"rank": 8}, ["bone"]), ({"method": "lora", "rank": 2}, ["lora_A", "lora_B"])], ids=str)
def test_a_subset_of_targets_and_layers_by_name_and_in_model_order(adapter, parts):
    model = tiny()
    frozen = dict(model.named_parameters())
    trainable = adapt(model, targets=("v_proj", "q_proj"), layers=(1, 2), **adapter)
    assert list(trainable) == [f"model.layers.1.self_attn.{target}.{part}" for target in ("q_proj", "v_proj") for part in parts]
    assert all(p.requires_grad for p in trainable.values()) and not any(p.requires_grad for p in frozen.values())
    kept = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in kept for parameter in frozen.values())


@pytest.mark.parametrize("adapter", [
    {"rank": 8}, {"rank": 8, "grouping": "col"}, {"rank": 8, "form": "hadamard"}, {"rank": 8, "grouping": "col", "form": "unconstrained"},
    {"rank": 8, "grouping": "free", "groups": 2}, {"rank": 7, "grouping": "miss"}, {"method": "lora", "rank": 2}], ids=str)
def test_an_adapter_has_no_effect_at_the_start_and_reaches_every_target(adapter):
    model = tiny()
    tokens = torch.arange(3, 20)[None]
    before = model(input_ids=tokens).logits
    trainable = adapt(model, **adapter)
    after = model(input_ids=tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    after.square().sum().backward()
    moved = {name.rpartition(".")[0] for name, parameter in trainable.items() if parameter.grad is not None and parameter.grad.any()}
    assert moved == {name.rpartition(".")[0] for name in trainable} and len(moved) == 2 * 7


def test_adapters_take_the_dtype_of_the_weights():
    for adapter in ({"rank": 8}, {"method": "lora", "rank": 2}):
        assert {p.dtype for p in adapt(tiny().bfloat16(), **adapter).values()} == {torch.bfloat16}


@pytest.mark.parametrize("model, adapter, says", [
    (tiny, {"rank": 12}, ["adapter.rank: 12", "model.layers.0.self_attn.q_proj and 3 more (32 x 32)",
                          "model.layers.0.self_attn.k_proj and 3 more (16 x 32)", "fit every target: 16, 8, 4, 2"]),
    (tiny, {"rank": 64, "targets": ("down_proj",)}, ["adapter.rank: 64", "down_proj and 1 more (32 x 64)", "32, 16"]),
    (llama2_7b, {"rank": 512}, ["adapter.rank: 512", "gate_proj", "(11008 x 4096)", "fit every target: 256, 128, 64, 32"]),
    (tiny, {"rank": 8, "targets": ("q_proj", "vproj")}, ["adapter.targets", "'vproj'", "did you mean 'v_proj'?", "o_proj"]),
    (tiny, {"rank": 8, "targets": ("lm_head",)}, ["adapter.targets", "'lm_head'", "choose among q_proj"]),
    (tiny, {"rank": 8, "layers": (0, 3)}, ["adapter.layers: [0, 3]", "2 layers"]),
    (tiny, {"rank": 33, "grouping": "miss"}, ["adapter.rank: 33 is more than the inputs of model.layers.0.self_attn.q_proj and 3 more",
                                              "(64 x 32)", "the largest that fits every target: 32"]),
    (tiny, {"rank": 12, "grouping": "free", "groups": 2}, ["adapter.rank: 12 does not divide", "fit every target: 16, 8, 4, 2"]),
    (tiny, {"rank": 8, "grouping": "free", "groups": 16}, ["adapter.groups: 16 does not divide the number of blocks of 8 x 8 in",
                                                           "k_proj and 3 more (16 x 32)", "fit every target: 8, 4, 2, 1"]),
])
def test_refused_and_named(model, adapter, says):
    model = model()
    with pytest.raises(InjectionError) as caught:
        adapt(model, **adapter)
    message = str(caught.value)
    assert message.count("\n") < 2 and all(part in message for part in says), message


@pytest.mark.parametrize("adapter, parameters, rank", [
    ({"method": "lora"}, 89_948_160, 36),
    ({"method": "lora"}, 89_948_159, 35),
    ({"method": "lora", "targets": ("q_proj",), "layers": (3, 4)}, 8192, 1),
    ({"grouping": "row"}, 89_948_160, 64),
    ({"grouping": "row"}, 72_876_031, 32),
    ({"grouping": "col"}, 89_948_160, 64),
    ({"grouping": "col"}, 174_063_616, 128),
    ({"grouping": "left"}, 87_031_808, 64),
    ({"grouping": "row", "form": "unconstrained"}, 72_876_032, 32),
    ({"grouping": "miss"}, 89_948_160, 66),
    ({"grouping": "miss"}, 10**12, 4096),
    ({"grouping": "free", "groups": 64}, 58_720_256, 64),
    ({"grouping": "free", "groups": 64}, 58_720_255, 32),
    ({"grouping": "free", "groups": 172, "targets": ("gate_proj",)}, 10**12, 256),
    ({"grouping": "row", "targets": ("q_proj", "down_proj"), "layers": (0, 1)}, 10**12, 256),
], ids=str)
def test_the_largest_rank_within_a_budget_on_llama2_7b(adapter, parameters, rank):
    asked = AdapterConfig(parameters=parameters, **adapter)
    model = llama2_7b()
    chosen = with_rank(model, ARCHITECTURE, asked)
    assert not asked.has_rank and chosen.has_rank and chosen.rank == rank
    assert with_rank(model, ARCHITECTURE, chosen) == chosen
    trained, of_chosen = ({name: parameter.shape for name, parameter in inject(model, ARCHITECTURE, given).items()}
                          for model, given in ((model, asked), (llama2_7b(), chosen)))
    assert trained == of_chosen and sum(shape.numel() for shape in trained.values()) <= parameters


def test_without_a_budget_the_rank_stays():
    adapter = AdapterConfig(rank=7)
    assert with_rank(tiny(), ARCHITECTURE, adapter) is adapter


@pytest.mark.parametrize("adapter, says", [
    ({"parameters": 100, "targets": ("q_proj", "k_proj")}, ["adapter.parameters: 100 are too few", "rank 1 trains 128"]),
    ({"parameters": 319, "targets": ("q_proj", "down_proj"), "method": "lora"}, ["adapter.parameters: 319", "rank 1 trains 320"]),
    ({"parameters": 2048, "rank": 2}, ["adapter.rank: 2", "adapter.parameters: 2048, which choose 4"]),
    ({"parameters": 2048, "targets": ("qproj",)}, ["did you mean 'q_proj'?"]),
    ({"parameters": 2048, "grouping": "free", "groups": 7}, ["adapter.groups: 7 does not divide", "q_proj and 3 more (32 x 32)"]),
    ({"parameters": 95, "grouping": "miss", "targets": ("q_proj", "down_proj")}, ["adapter.parameters: 95", "rank 1 trains 128"]),
])
def test_a_budget_that_no_rank_fits_is_refused(adapter, says):
    with pytest.raises(InjectionError) as caught:
        with_rank(tiny(), ARCHITECTURE, AdapterConfig(**adapter))
    assert all(part in str(caught.value) for part in says), caught.value
