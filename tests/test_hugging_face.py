"""BoneModel keeps the promises of PEFT's models, as one who comes from PEFT would check them."""

import copy
import json
import math

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

import bone_ds
from bone_ds import BoneConfig, BoneModel
from bone_ds.bone import GROUPINGS, adapted_weight, bone_shape
from bone_ds.errors import CheckpointError, ConfigError, InjectionError
from bone_ds.hugging_face import AdaptedLinear

# Raised inside PEFT's own __init__.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS = {"miss": {}, "bat": {"init_weights": "bat"}}
METHODS |= {grouping: {"grouping": grouping} for grouping in GROUPINGS if grouping != "free"}
METHODS |= {
    "free": {"grouping": "free", "groups": 4}, "hadamard": {"grouping": "row", "form": "hadamard"},
    "unconstrained": {"grouping": "col", "form": "unconstrained"}}
TOKENS = torch.arange(3, 43)[None]
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Mlp(nn.Module):
    """No transformer, and nothing that Hugging Face knows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone_blocks = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 8, bias=False)

    def forward(self, x):
        for block in self.backbone_blocks:
            x = torch.tanh(block(x))
        return self.head(self.norm(x))


X = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)


def config(method="row", **options) -> BoneConfig:
    return BoneConfig(**{"r": 8, "target_modules": ["0", "1"]} | METHODS[method] | options)


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """What is trainable drawn anew, as if it had been trained."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted(method="row", **options) -> BoneModel:
    return moved(BoneModel(Mlp(), config(method, **options)))


def llama(**options) -> BoneModel:
    return moved(BoneModel(tiny_model(), BoneConfig(**{"r": 8, "grouping": "row", "target_modules": ALL_TARGETS} | options)))


def blocks(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in model.named_parameters() if key.endswith(f".bone_block.{name}")}


def layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def adapted_names(model: nn.Module) -> list[str]:
    return [name.removeprefix("base_model.model.") for name in layers(model)]


def test_they_are_names_of_the_package():
    assert {"BoneConfig", "BoneModel", "__version__"} <= set(dir(bone_ds)) and bone_ds.BoneModel is BoneModel
    with pytest.raises(AttributeError, match="'bone_ds' has no attribute 'BoneAge'"):
        _ = bone_ds.BoneAge


# A new adapter


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(method):
    torch.testing.assert_close(BoneModel(Mlp(), config(method))(X), Mlp()(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_alone_is_trainable_and_counted(method, capsys):
    model = BoneModel(Mlp(), config(method))
    trainable = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    its = model.peft_config["default"]
    assert trainable == {f"base_model.model.backbone_blocks.{index}.bone_block.default": bone_shape(
        its.grouping, 32, in_features, 8, its.form, its.groups) for index, in_features in enumerate((16, 32))}
    count = sum(map(math.prod, trainable.values()))
    base = sum(parameter.numel() for parameter in Mlp().parameters())
    assert model.get_nb_trainable_parameters() == (count, base + count)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (f"trainable params: {count:,d} || all params: {base + count:,d} || "
                                       f"trainable%: {100 * count / (base + count):.4f}\n")


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_adapter_and_no_bit_of_the_base(method):
    model = BoneModel(Mlp(), config(method))
    optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=0.01)
    losses = []
    for _ in range(20):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(block.abs().max() > 0 for block in blocks(model).values())
    assert all(torch.equal(weight, before) for weight, before in zip(model.unload().parameters(), Mlp().parameters(), strict=True))


@pytest.mark.parametrize("init_weights, theirs", [(True, True), ("bat", "bat")], ids=["miss", "bat"])
def test_outputs_and_gradients_are_those_of_peft(init_weights, theirs):
    options = {"r": 8, "target_modules": ["0", "1"]}
    ours = moved(BoneModel(Mlp(), BoneConfig(init_weights=init_weights, **options)))
    model = moved(get_peft_model(Mlp(), MissConfig(init_weights=theirs, **options)))
    torch.testing.assert_close(ours(X), model(X), rtol=1e-5, atol=1e-5)
    assert (ours(X) - Mlp()(X)).abs().max() > 0.1
    ours(X).square().mean().backward()
    model(X).square().mean().backward()
    gradients = [[parameter.grad for parameter in each.parameters() if parameter.requires_grad] for each in (ours, model)]
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


def test_a_block_size_that_does_not_divide_is_miss_alone():
    model = moved(BoneModel(Mlp(), BoneConfig(r=5, target_modules=["0", "1"])))
    theirs = moved(get_peft_model(Mlp(), MissConfig(r=5, target_modules=["0", "1"])))
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_random_values_to_begin_with():
    model = BoneModel(Mlp(), config("miss", init_weights=False))
    assert model.peft_config["default"].grouping == "miss"
    assert (model(X) - Mlp()(X)).abs().max() > 0.1


@pytest.mark.parametrize("strategy", ["materialized", "checkpointed", "fused", "factored"])
def test_a_strategy_changes_no_result(strategy):
    model, auto = adapted("row", strategy=strategy), adapted("row")
    torch.testing.assert_close(model(X), auto(X), rtol=1e-5, atol=1e-6)


def test_a_base_weight_that_is_unfrozen_gets_its_gradient():
    model = adapted()
    before = model(X)
    layer = next(iter(layers(model).values()))
    layer.base_layer.weight.requires_grad_(True)
    after = model(X)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    after.sum().backward()
    assert layer.base_layer.weight.grad.abs().max() > 0 and layer.bone_block["default"].grad.abs().max() > 0


# Disabling


@pytest.mark.parametrize("method", METHODS)
def test_disabled_it_is_the_base_to_the_bit(method):
    model = adapted(method)
    before = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), Mlp()(X))
        with model.disable_adapter():
            assert torch.equal(model(X), Mlp()(X))
        assert torch.equal(model(X), Mlp()(X))
        assert not any(block.requires_grad for block in blocks(model).values())
    assert torch.equal(model(X), before) and (before - Mlp()(X)).abs().max() > 0.05
    assert all(block.requires_grad for block in blocks(model).values())


def test_it_is_enabled_again_after_an_error():
    model = adapted()
    before = model(X)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        _ = 1 / 0
    assert torch.equal(model(X), before)


def test_layers_are_disabled_and_enabled_by_hand():
    model = adapted()
    before = model(X)
    model.disable_adapter_layers()
    assert torch.equal(model(X), Mlp()(X))
    model.enable_adapter_layers()
    assert torch.equal(model(X), before)


# Saving and loading


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_the_adapter_alone(tmp_path, method):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wanted = {name.removesuffix(".default"): block for name, block in blocks(model).items()}
    assert tensors.keys() == wanted.keys() == {f"base_model.model.backbone_blocks.{index}.bone_block" for index in (0, 1)}
    assert all(torch.equal(tensors[name], wanted[name]) for name in tensors)


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_computes_the_same_bits(tmp_path, method):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    loaded = BoneModel.from_pretrained(Mlp(), tmp_path)
    assert type(loaded) is BoneModel and torch.equal(loaded(X), model(X))
    assert loaded.peft_config["default"].method == model.peft_config["default"].method
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


def test_a_loaded_adapter_is_trained_on(tmp_path):
    adapted().save_pretrained(tmp_path)
    loaded = BoneModel.from_pretrained(Mlp(), tmp_path, is_trainable=True)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == blocks(loaded).keys()
    loaded(X).sum().backward()
    assert all(block.grad.abs().max() > 0 for block in blocks(loaded).values())


def test_a_loaded_adapter_may_have_another_name(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = BoneModel.from_pretrained(Mlp(), tmp_path, adapter_name="mine")
    assert loaded.active_adapter == "mine" and torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_without_memory_for_zeros_keeps_every_bit(tmp_path, dtype):
    model = moved(BoneModel(Mlp().to(dtype), config()))
    model.save_pretrained(tmp_path)
    loaded = BoneModel.from_pretrained(Mlp().to(dtype), tmp_path, low_cpu_mem_usage=True)
    assert all(torch.equal(block, blocks(model)[name]) and block.dtype == torch.float32 for name, block in blocks(loaded).items())


@pytest.mark.parametrize("method", METHODS)
def test_a_config_survives_its_file(tmp_path, method):
    written = config(method, target_modules=["b", "a"], exclude_modules=["c"], layers_to_transform=[0, 2], layers_pattern="layers",
                     modules_to_save=["head"], bias="bone_only", strategy="materialized")
    written.save_pretrained(tmp_path)
    assert BoneConfig.from_pretrained(tmp_path) == written
    tree = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (tree["peft_type"], tree["target_modules"]) == ("BONE", ["a", "b"])
    assert tree["init_weights"] == ("bat" if (written.grouping, written.form) == ("col", "affine") else True)


def test_it_is_a_method_of_peft(tmp_path):
    model = adapted("col")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert torch.equal(again(X), model(X))
    assert isinstance(model, PeftModel) and isinstance(peft.PeftConfig.from_pretrained(tmp_path), BoneConfig)
    assert torch.equal(moved(get_peft_model(Mlp(), config("col")))(X), model(X))
    status = model.get_model_status()
    assert status.peft_types == {"default": "BONE"}
    assert (status.enabled, status.active_adapters, status.num_adapter_layers, status.trainable_params) == (True, ["default"], 2, 512)


def test_a_state_dict_of_peft_goes_in_and_out():
    model, other = adapted(), adapted()
    moved(other, seed=2)
    state = get_peft_model_state_dict(model)
    assert state.keys() == {f"base_model.model.backbone_blocks.{index}.bone_block" for index in (0, 1)}
    set_peft_model_state_dict(other, state)
    assert torch.equal(other(X), model(X))


def test_the_whole_state_dict_goes_in_and_out():
    model, other = adapted(), BoneModel(Mlp(), config())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    assert "base_model.model.backbone_blocks.0.base_layer.weight" in model.state_dict()


def test_a_directory_of_peft_miss_is_loaded(tmp_path):
    for name in ("miss", "bat"):
        theirs = moved(get_peft_model(Mlp(), MissConfig(r=8, target_modules=["0", "1"], init_weights=name == "miss" or "bat")))
        theirs.save_pretrained(tmp_path / name)
        ours = BoneModel.from_pretrained(Mlp(), tmp_path / name)
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)
        for mine, original in zip(blocks(ours).values(), [p for n, p in theirs.named_parameters() if "miss_block" in n], strict=True):
            assert torch.equal(mine, original)


# Merging


@pytest.mark.parametrize("method", METHODS)
def test_merged_it_computes_the_same(method):
    model = adapted(method)
    before = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
    assert model.get_model_status().merged_adapters == ["default"]
    its = model.peft_config["default"]
    for layer in layers(model).values():
        wanted = adapted_weight(layer.unmerged_weight, layer.bone_block["default"].data, its.grouping, its.form)
        assert torch.equal(layer.base_layer.weight.data, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_unmerging_gives_back_every_bit(method, dtype):
    model = moved(BoneModel(Mlp().to(dtype), config(method)))
    x = X.to(dtype)
    before = model(x)
    model.merge_adapter()
    merged = {name: layer.weight.clone() for name, layer in layers(model).items()}
    model.unmerge_adapter()
    assert torch.equal(model(x), before)
    for (name, layer), original in zip(layers(model).items(), Mlp().to(dtype).backbone_blocks, strict=True):
        assert torch.equal(layer.weight, original.weight) and not torch.equal(merged[name], original.weight)
        assert layer.unmerged_weight is None


@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unload_gives_the_plain_module(method):
    model = adapted(method)
    before = model(X)
    plain = model.merge_and_unload()
    assert type(plain) is Mlp and not layers(plain) and type(plain.backbone_blocks[0]) is nn.Linear
    assert plain.state_dict().keys() == Mlp().state_dict().keys()
    torch.testing.assert_close(plain(X), before, rtol=1e-5, atol=1e-5)


def test_a_bf16_weight_is_merged_in_fp32_and_rounded_once():
    model = moved(BoneModel(Mlp().bfloat16(), config("col")))
    block = next(iter(blocks(model).values())).detach().clone()
    assert block.dtype == torch.float32
    wanted = adapted_weight(Mlp().bfloat16().backbone_blocks[0].weight.float(), block, "col").bfloat16()
    assert torch.equal(model.merge_and_unload().backbone_blocks[0].weight, wanted)


def test_a_merge_of_broken_values_is_refused_and_changes_nothing():
    model = adapted()
    with torch.no_grad():
        list(blocks(model).values())[-1][0, 0, 0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN or infinite"):
            merge(safe_merge=True)
        assert adapted_names(model) == ["backbone_blocks.0", "backbone_blocks.1"]
        for layer, base in zip(layers(model).values(), Mlp().backbone_blocks, strict=True):
            assert not layer.merged and torch.equal(layer.weight, base.weight)


def test_a_weight_that_another_module_has_too_is_not_merged():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.warns(UserWarning, match="tied"):
        model = moved(BoneModel(model, BoneConfig(r=8, grouping="row", target_modules=["q_proj", "lm_head"])))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InjectionError, match="lm_head: its weight is that of model.embed_tokens too"):
            merge()
        assert not any(layer.merged for layer in layers(model).values()) and "lm_head" in adapted_names(model)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_unload_is_the_base_even_when_merged():
    for merge in (False, True):
        model = adapted()
        if merge:
            model.merge_adapter()
        plain = model.unload()
        assert type(plain) is Mlp and torch.equal(plain(X), Mlp()(X))


def test_disabling_a_merged_model_gives_the_base():
    model = adapted()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), Mlp()(X))


def test_merging_twice_merges_once():
    model = adapted()
    model.merge_adapter()
    once = model(X)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(model(X), once)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


# Several adapters


def two(**second) -> BoneModel:
    """Adapters `default` (row) and `other`, both drawn anew; the first is active."""
    model = adapted("row")
    model.add_adapter("other", config(**{"method": "left", "r": 4} | second))
    model.set_adapter("other")
    moved(model, seed=2)
    model.set_adapter("default")
    return model


def test_an_added_adapter_is_not_active():
    model = adapted()
    before = model(X)
    model.add_adapter("other", config("col"))
    assert (model.active_adapter, list(model.peft_config)) == ("default", ["default", "other"])
    assert torch.equal(model(X), before)
    assert not any(block.requires_grad for block in blocks(model, "other").values())


def test_set_adapter_switches():
    model = two()
    first = model(X)
    model.set_adapter("other")
    second = model(X)
    assert model.active_adapter == "other" and (first - second).abs().max() > 0.05
    assert all(block.requires_grad for block in blocks(model, "other").values())
    assert not any(block.requires_grad for block in blocks(model).values())
    model.set_adapter("default")
    assert torch.equal(model(X), first)
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")


def test_each_is_saved_and_loaded(tmp_path):
    model = two()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "other/adapter_model.safetensors").exists()
    loaded = BoneModel.from_pretrained(Mlp(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(X), model(X))


def test_one_of_them_is_saved(tmp_path):
    two().save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other"]
    assert {tensor.shape for tensor in load_file(tmp_path / "other/adapter_model.safetensors").values()} == {(8, 4, 4)}


def test_adapters_may_be_on_other_modules():
    model = two(target_modules=["head"], method="miss", r=3)
    assert sorted(adapted_names(model)) == ["backbone_blocks.0", "backbone_blocks.1", "head"]
    before = model(X)
    model.set_adapter("other")
    plain = Mlp()
    plain.head = nn.Linear(32, 8, bias=False)
    block = blocks(model, "other")["base_model.model.head.bone_block.other"]
    plain.head.weight.data = adapted_weight(Mlp().head.weight, block, "miss").data
    torch.testing.assert_close(model(X), plain(X), rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(X), before)


def test_a_deleted_adapter_is_gone():
    model = two()
    before = model(X)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and not blocks(model, "other")
    assert not any("other" in layer.bone_config for layer in layers(model).values())
    assert torch.equal(model(X), before)
    with pytest.raises(ValueError, match="other"):
        model.delete_adapter("other")


def test_where_the_active_one_is_deleted_another_takes_its_place():
    model = two()
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert all(block.requires_grad for block in blocks(model, "other").values())


def test_two_active_adapters_act_in_turn():
    model = two()
    model.base_model.set_adapter(["default", "other"])
    both = model(X)
    for name, layer in layers(model).items():
        original = Mlp().get_submodule(name.removeprefix("base_model.model.")).weight
        weight = adapted_weight(adapted_weight(original, layer.bone_block["default"], "row"), layer.bone_block["other"], "left")
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), rtol=1e-5, atol=1e-5)
    both.sum().backward()
    assert all(block.grad.abs().max() > 0 for name in ("default", "other") for block in blocks(model, name).values())
    model.merge_adapter()
    torch.testing.assert_close(model(X), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    torch.testing.assert_close(model(X), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.unload()(X), Mlp()(X))


def test_a_name_is_given_once():
    model = adapted()
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", config())


# Which modules


@pytest.mark.parametrize("options, wanted", [
    ({"target_modules": ["q_proj", "mlp.up_proj"]}, ["0.mlp.up_proj", "0.self_attn.q_proj", "1.mlp.up_proj", "1.self_attn.q_proj"]),
    ({"target_modules": r".*\.1\..*(q|v)_proj"}, ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
    ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
    ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*0\.self_attn\.k_proj"},
     ["0.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.q_proj"]),
    ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["1.self_attn.q_proj"]),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, ["0.self_attn.q_proj"]),
    ({"target_modules": "all-linear"}, sorted(f"{layer}.{'mlp' if target in ALL_TARGETS[4:] else 'self_attn'}.{target}"
                                              for layer in (0, 1) for target in ALL_TARGETS)),
    ({"target_modules": None}, ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]),
], ids=str)
def test_modules_are_chosen_as_peft_does(options, wanted):
    assert sorted(adapted_names(llama(**options))) == [f"model.layers.{name}" for name in wanted]


def test_all_linear_of_a_plain_module():
    assert adapted_names(adapted(target_modules="all-linear")) == ["backbone_blocks.0", "backbone_blocks.1", "head"]


# modules_to_save and biases


def test_modules_to_save_are_trained_and_saved_in_a_copy(tmp_path):
    model = BoneModel(Mlp(), config(modules_to_save=["head"]))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} - blocks(model).keys() == {
        "base_model.model.head.modules_to_save.default.weight"}
    moved(model)
    with model.disable_adapter():
        assert torch.equal(model(X), Mlp()(X))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 3 and tensors["base_model.model.head.weight"].shape == (8, 32)
    assert torch.equal(BoneModel.from_pretrained(Mlp(), tmp_path)(X), model(X))
    plain = model.merge_and_unload()
    assert type(plain.head) is nn.Linear and torch.equal(plain.head.weight, tensors["base_model.model.head.weight"])


def test_modules_to_save_of_two_adapters():
    model = BoneModel(Mlp(), config(modules_to_save=["head"]))
    moved(model)
    model.add_adapter("other", config(modules_to_save=["head", "norm"]))
    first = model(X)
    model.set_adapter("other")
    torch.testing.assert_close(model(X), Mlp()(X), rtol=1e-6, atol=1e-6)
    moved(model, seed=3)
    model.set_adapter("default")
    assert torch.equal(model(X), first)


def test_a_causal_head_is_trained_beside_the_adapter(tmp_path):
    model = llama(modules_to_save=["lm_head"])
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    head = model.get_output_embeddings().modules_to_save["default"].weight
    assert head.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded = BoneModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_the_new_head_of_a_classifier_is_trained(tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0))
    model = BoneModel(copy.deepcopy(base), BoneConfig(task_type="SEQ_CLS", r=8, grouping="row", target_modules=["q_proj"]))
    moved(model)(input_ids=TOKENS, labels=torch.tensor([2])).loss.backward()
    assert model.get_base_model().score.modules_to_save["default"].weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded = BoneModel.from_pretrained(base, tmp_path)
    assert type(loaded) is BoneModel and loaded.peft_config["default"].modules_to_save == ["classifier", "score"]
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("bias, trained", [("none", set()), ("bone_only", {"0", "1"}), ("all", {"0", "1", "norm"})])
def test_biases_are_trained_and_saved(tmp_path, bias, trained):
    model = BoneModel(Mlp(), config(bias=bias))
    named = {name.split(".")[-3 if "base_layer" in name else -2] for name, p in model.named_parameters()
             if p.requires_grad and name.endswith("bias")}
    assert named == trained
    moved(model)
    model(X).sum().backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(BoneModel.from_pretrained(Mlp(), tmp_path)(X), model(X))


# Dtypes and devices


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_a_bf16_model_is_kept_in_fp32(method):
    model = moved(BoneModel(Mlp().bfloat16(), config(method)))
    assert {block.dtype for block in blocks(model).values()} == {torch.float32}
    y = model(X.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), adapted(method)(X), rtol=0.1, atol=0.1)
    y.float().square().mean().backward()
    assert all(block.grad.dtype == torch.float32 for block in blocks(model).values())
    kept = BoneModel(Mlp().bfloat16(), config(method), autocast_adapter_dtype=False)
    assert {block.dtype for block in blocks(kept).values()} == {torch.bfloat16}


def test_an_inactive_adapter_of_a_bf16_model_stays_frozen(tmp_path):
    model = moved(BoneModel(Mlp().bfloat16(), config()))
    model.add_adapter("other", config())
    assert not any(block.requires_grad for block in blocks(model, "other").values())
    model.save_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in BoneModel.from_pretrained(Mlp().bfloat16(), tmp_path).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_whole_model_changes_its_dtype(dtype):
    model = adapted().to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(model(X.to(dtype)).float(), adapted()(X), rtol=0.1, atol=0.1)
    merged = adapted()
    merged.merge_adapter()
    merged.to(dtype).unmerge_adapter()
    assert next(iter(layers(merged).values())).weight.dtype == dtype


def test_inputs_of_another_dtype_come_back_in_it():
    layer = next(iter(layers(BoneModel(Mlp().bfloat16(), config())).values()))
    assert layer(X).dtype == torch.float32
    torch.testing.assert_close(layer(X), Mlp().backbone_blocks[0](X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_it_computes_as_a_linear_layer_does(method):
    model = adapted(method)
    layer = next(iter(layers(model).values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(X).dtype == layer.base_layer(X).dtype == torch.bfloat16
        loss = model(X).float().square().mean()
    loss.backward()
    assert all(block.grad.dtype == torch.float32 and block.grad.abs().max() > 0 for block in blocks(model).values())


def test_a_move_takes_everything_along():
    model = two()
    model.merge_adapter()
    model.to("meta")
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_copy_is_its_own():
    model = adapted()
    twin = copy.deepcopy(model)
    moved(twin, seed=5)
    assert torch.equal(model(X), adapted()(X)) and not torch.equal(twin(X), model(X))


# Transformers


def test_attributes_are_the_models():
    model, base = llama(), tiny_model()
    assert model.config.hidden_size == 32 and model.device.type == "cpu" and model.dtype == torch.float32
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert type(model.get_base_model()) is LlamaForCausalLM
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_generation_is_that_of_the_merged_model():
    model = llama()
    generated = model.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False)
    with model.disable_adapter():
        plain = model.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False)
    assert not torch.equal(generated, plain)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert torch.equal(merged.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False), generated)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_recomputed_layers_give_the_same_gradients(reentrant):
    gradients = []
    for recompute in (False, True):
        model = llama().train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([block.grad for block in blocks(model).values()])
    assert all(here.abs().max() > 0 and torch.equal(here, there) for here, there in zip(*gradients, strict=True))


def test_tied_embeddings_stay_tied():
    torch.manual_seed(0)
    model = BoneModel(LlamaForCausalLM(tiny_config(tie_word_embeddings=True)), BoneConfig(r=8, grouping="row", target_modules="all-linear"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    merged = moved(model).merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


# What is refused


@pytest.mark.parametrize("options, says", [
    ({"r": 0}, "r: 0"), ({"r": 2.5}, "r: 2.5"), ({"grouping": "diagonal"}, "'diagonal'"), ({"init_weights": "mini"}, "'mini'"),
    ({"init_weights": "pissa"}, "'pissa'"), ({"init_weights": "bat", "grouping": "row"}, "'bat' is grouping col"),
    ({"grouping": "free"}, "free needs a number of groups"),
    ({"groups": 3}, "groups: 3"), ({"form": "cubic"}, "'cubic'"), ({"init_weights": "bat", "form": "hadamard"}, "'bat' is grouping col"),
    ({"form": "hadamard"}, "'hadamard' does not exist for grouping 'miss'"),
    ({"bias": "lora_only"}, "bias: 'lora_only'"), ({"strategy": "magic"}, "'magic'"),
    ({"grouping": "col", "strategy": "factored"}, "'factored'"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform: [0]"),
    ({"target_modules": "all-linear", "layers_pattern": "layers"}, "layers_pattern: 'layers'"),
], ids=str)
def test_configs_that_are_refused(options, says):
    with pytest.raises((ConfigError, InjectionError)) as caught:
        BoneConfig(**{"target_modules": ["q_proj"]} | options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options, says", [
    ({"r": 16, "target_modules": ["0", "head"]}, ["target_modules: head: ", "r=16 does not divide", "(8, 32)", "8, 4"]),
    ({"target_modules": ["0", "norm"]}, ["target_modules: norm: is a LayerNorm"]),
], ids=str)
def test_a_refused_adapter_leaves_the_model_as_it_was(options, says):
    base = Mlp()
    with pytest.raises(InjectionError) as caught:
        BoneModel(base, config(**options))
    assert all(part in str(caught.value) for part in says), caught.value
    assert not layers(base) and torch.equal(base(X), Mlp()(X)) and all(parameter.requires_grad for parameter in base.parameters())
    model = adapted()
    before = model(X)
    with pytest.raises(InjectionError):
        model.add_adapter("other", config(**options))
    assert adapted_names(model) == ["backbone_blocks.0", "backbone_blocks.1"] and list(model.peft_config) == ["default"]
    assert torch.equal(model(X), before) and not blocks(model, "other")
    assert all(block.requires_grad for block in blocks(model).values())


def test_a_refused_frozen_adapter_leaves_the_other_trainable():
    model = adapted("miss", target_modules=["0", "1", "head"])
    with pytest.raises(InjectionError, match="head: .*r=16 does not divide"):
        model.add_adapter("other", config("row", r=16, target_modules=["0", "1", "head"], inference_mode=True))
    assert len(blocks(model)) == 3 and all(block.requires_grad for block in blocks(model).values())


def test_transformers_loads_what_is_saved_and_saves_it_again(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = moved(BoneModel(LlamaForCausalLM.from_pretrained(tmp_path / "base"), BoneConfig(r=8, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    by_hand = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    by_hand.load_adapter(str(tmp_path / "adapter"))
    for loaded in (by_auto, by_hand):
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    by_hand.save_pretrained(tmp_path / "again")
    again = BoneModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return nn.Sequential(layer)


@pytest.mark.parametrize("make, target, says", [
    (lambda: nn.TransformerEncoderLayer(16, 2, 32), "linear1", "TransformerEncoderLayer reads the weight"),
    (lambda: nn.MultiheadAttention(16, 2), "out_proj", "MultiheadAttention reads the weight"),
    (lambda: nn.Sequential(Tripled(16, 16)), "0", "is a Tripled with a forward of its own"),
    (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))), "0", "is parametrized"),
    (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 16))), "0", "has hooks"),
    (hooked, "0", "has hooks"),
    (lambda: nn.Sequential(nn.Linear(16, 16).to(torch.float8_e4m3fn)), "0", "quantised .float8_e4m3fn"),
], ids=["encoder", "attention", "forward", "parametrized", "spectral_norm", "hook", "fp8"])
def test_linear_layers_that_are_more_than_their_product_are_refused(make, target, says):
    base = make()
    with pytest.raises(InjectionError, match=f"target_modules: {target}: .*{says}"):
        BoneModel(base, BoneConfig(r=8, target_modules=[target]))
    assert not layers(base)


def test_a_batch_that_mixes_adapters_is_refused():
    with pytest.raises(ConfigError, match="adapter_names: .'default', '__base__'.: a batch that mixes"):
        adapted()(X[:2], adapter_names=["default", "__base__"])


def test_modules_to_save_that_are_no_modules():
    with pytest.raises(ConfigError, match="modules_to_save: 'head' is one string"):
        config(modules_to_save="head")
    base = Mlp()
    with pytest.raises(InjectionError, match="modules_to_save: 'haed'"):
        BoneModel(base, config(modules_to_save=["haed"]))
    assert not layers(base) and all(parameter.requires_grad for parameter in base.parameters())


def test_enabling_checkpoints_again_adds_no_hook():
    model = llama()
    hooks = model.get_base_model().get_input_embeddings()._forward_hooks
    for _ in range(3):
        model.gradient_checkpointing_enable()
        assert len(hooks) == 1


def test_a_quantised_layer_is_refused():
    base = Mlp()
    base.head.weight = nn.Parameter(torch.zeros(8, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InjectionError, match="head: its weight is quantised .uint8"):
        BoneModel(base, config(target_modules=["head"]))


def test_an_offloaded_layer_is_refused():
    with pytest.raises(InjectionError, match="backbone_blocks.0: its weight is offloaded"):
        BoneModel(cpu_offload(Mlp(), torch.device("cpu")), config())


def test_names_that_no_module_has():
    with pytest.raises(ValueError, match="c_attn"):
        BoneModel(Mlp(), config(target_modules=["c_attn"]))


def test_configs_of_other_methods_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="LoraConfig"):
        BoneModel(Mlp(), LoraConfig(target_modules=["0"]))
    get_peft_model(Mlp(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*'LORA' is another method"):
        BoneModel.from_pretrained(Mlp(), tmp_path)


def test_mini_is_refused_by_name(tmp_path):
    get_peft_model(Mlp(), MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=["0", "1"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*'mini' is a variant of MiSS that is not here"):
        BoneModel.from_pretrained(Mlp(), tmp_path)


def changed(directory, change) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


FIRST, SECOND = (f"base_model.model.backbone_blocks.{index}.bone_block" for index in (0, 1))


@pytest.mark.parametrize("change, says", [
    (lambda tensors: tensors.pop(FIRST), "holds no tensor for base_model.model.backbone_blocks.0"),
    (lambda tensors: tensors.update({FIRST.replace(".0.", ".7."): torch.zeros(2, 8, 8)}), "blocks.7.bone_block: this model has no"),
    (lambda tensors: tensors.update({FIRST: torch.zeros(2, 4, 4)}), "does not fit this model: size mismatch"),
], ids=["missing", "unexpected", "of another size"])
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, says):
    adapted().save_pretrained(tmp_path)
    changed(tmp_path, change)
    base = Mlp()
    with pytest.raises(CheckpointError, match=says):
        BoneModel.from_pretrained(base, tmp_path)
    assert not layers(base) and all(parameter.requires_grad for parameter in base.parameters())
    model = adapted("col")
    with pytest.raises(CheckpointError, match=says):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"] and not blocks(model, "other")


def test_tensors_of_another_grouping_are_refused_though_they_have_the_shape(tmp_path):
    left = adapted("left")
    left.save_pretrained(tmp_path)
    model = adapted("col")
    assert {key: block.shape for key, block in blocks(left).items()} == {key: block.shape for key, block in blocks(model).items()}
    before = model(X)
    with pytest.raises(CheckpointError, match="grouping is 'left', the model's adapter has 'col'"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("change, says", [
    (lambda tensors: tensors.update({SECOND: torch.zeros(2, 4, 4)}), "does not fit this model"),
    (lambda tensors: tensors.pop(SECOND), "holds no tensor for"),
    (lambda tensors: tensors[SECOND].fill_(float("nan")), "backbone_blocks.1.bone_block: holds NaN"),
], ids=["of another size", "missing", "NaN"])
def test_a_refused_load_leaves_the_present_adapter_as_it_was(tmp_path, change, says):
    moved(adapted(bias="all"), seed=5).save_pretrained(tmp_path)
    changed(tmp_path, change)
    model = adapted(bias="all")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*{says}"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(parameter, before[name]) and parameter.requires_grad == (name.endswith(("default", "bias")))
               for name, parameter in model.named_parameters())


def field(**fields):
    def change(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


@pytest.mark.parametrize("spoil, says", [
    (field(r=-1), "r: -1"), (field(r=True), "r: True"), (field(grouping="bogus"), "'bogus'"), (field(bias="some"), "bias: 'some'"),
    (lambda directory: (directory / "adapter_config.json").unlink(), "adapter_config.json"),
    (lambda directory: (directory / "adapter_config.json").write_text("{"), "adapter_config.json"),
    (lambda directory: (directory / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    (lambda directory: (directory / "adapter_model.safetensors").write_bytes(b"0" * 40), "is no safetensors file"),
], ids=["r", "r of bool", "grouping", "bias", "no config", "a cut config", "no weights", "cut weights"])
def test_damaged_directories_are_refused_by_name_and_change_nothing(tmp_path, spoil, says):
    adapted().save_pretrained(tmp_path)
    spoil(tmp_path)
    base = Mlp()
    with pytest.raises(CheckpointError) as caught:
        BoneModel.from_pretrained(base, str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: ") and says in message and "\n" not in message
    assert not layers(base) and all(parameter.requires_grad for parameter in base.parameters())
