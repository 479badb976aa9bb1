"""Activation checkpointing: less is kept, what is named is computed once more, and results are equal to the bit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import tiny_llama
import tiny_rwkv
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bone_ds import activation, arch
from bone_ds.activation_policy import ActivationPolicy
from bone_ds.config import AdapterConfig
from bone_ds.errors import ConfigError
from bone_ds.inject import inject
from bone_ds.live import LiveMemory

LAYERS, WIDTH, TOKENS, RANK = 4, 32, 40, 8
NONE, BONE, LAYER = ActivationPolicy(), ActivationPolicy("bone"), ActivationPolicy("layer", every=1)
BOTH = ActivationPolicy("bone+layer", every=1)
HALF = ActivationPolicy("layer", every=2)
EVERY_THIRD = ActivationPolicy("layer", every=3)
THREE = ActivationPolicy("layer", number_checkpoints=3)
ON_CPU = ActivationPolicy("layer", every=1, cpu_checkpointing=True)
MODULES = {"llama": ("self_attn", "mlp.up_proj"), "rwkv": ("att", "ffn.key")}
ADAPTERS = {
    "row": {"rank": RANK},
    "col": {"rank": RANK, "grouping": "col"},
    "left": {"rank": RANK, "grouping": "left"},
    "free": {"rank": RANK, "grouping": "free", "groups": 2},
    "miss": {"rank": RANK - 1, "grouping": "miss"},
    "hadamard": {"rank": RANK, "form": "hadamard"},
    "unconstrained": {"rank": RANK, "form": "unconstrained"},
    "row built": {"rank": RANK, "strategy": "materialized"},
    "col built": {"rank": RANK, "grouping": "col", "strategy": "materialized"},
    "lora": {"method": "lora", "rank": 3},
    "full": {"method": "full"},
    "state": {"method": "state"},
}


@pytest.fixture(scope="module", params=["llama", "rwkv"])
def tiny(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        tiny_llama.save_tiny(directory, num_hidden_layers=LAYERS)
        return Tiny("llama", tiny_llama.opened(directory))
    tiny_rwkv.save_tiny(directory / "tiny.pth", layers=LAYERS)
    return Tiny("rwkv", tiny_rwkv.opened(directory / "tiny.pth"))


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass."""

    loss: Tensor
    gradients: dict[str, Tensor]
    kept_bytes: int
    """Between forward and backward, beside the weights."""
    peak_bytes: int
    """Beside the weights."""


@dataclass(frozen=True)
class Tiny:
    name: str
    source: arch.Source

    @property
    def architecture(self):
        return arch.load(self.name)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return dict(self.architecture.layers(model))

    def named_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        return {f"{layer}.{name}": module.get_submodule(name)
                for layer, module in self.layers(model).items() for name in MODULES[self.name]}

    def loaded(self) -> nn.Module:
        return (tiny_llama if self.name == "llama" else tiny_rwkv).built_and_loaded(self.source)


@cache
def passed(tiny: Tiny, policy: ActivationPolicy = NONE, adapter: str = "row") -> Pass:
    return run(tiny.architecture, tiny.loaded(), policy, adapter)


def passed_fake(tiny: Tiny, policy: ActivationPolicy, adapter: str) -> Pass:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return run(tiny.architecture, tiny.architecture.build(tiny.source, torch.float32), policy, adapter)


@cache
def flops(tiny: Tiny, policy: ActivationPolicy = NONE, adapter: str = "row") -> int:
    """Of one forward and backward pass."""
    model, _ = adapted(tiny.architecture, tiny.loaded(), policy, adapter)
    with FlopCounterMode(display=False) as counter:
        loss_of(tiny.architecture, model).backward()
    return counter.get_total_flops()


def forward_flops(tiny: Tiny, of: Callable[[nn.Module], dict[str, nn.Module]]) -> dict[str, int]:
    """Of the forward passes of some modules of the model, by name."""
    model, _ = adapted(tiny.architecture, tiny.loaded(), NONE, "row")
    counted = {}
    with FlopCounterMode(display=False) as counter:
        for name, module in of(model).items():
            module.register_forward_pre_hook(lambda *_, name=name: counted.update({name: -counter.get_total_flops()}))
            module.register_forward_hook(lambda *_, name=name: counted.update({name: counted[name] + counter.get_total_flops()}))
        loss_of(tiny.architecture, model)
    return counted


def run(architecture, model, policy, adapter) -> Pass:
    model, trainable = adapted(architecture, model, policy, adapter)
    with LiveMemory() as live:
        live.claim("weights", model.parameters())
        weights_bytes = live.total_bytes
        loss = loss_of(architecture, model)
        kept_bytes = live.total_bytes - weights_bytes
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable.items() if parameter.grad is not None}
    return Pass(loss.detach(), gradients, kept_bytes, live.peak_bytes - weights_bytes)


def adapted(architecture, model, policy, adapter):
    trainable = inject(model, architecture, AdapterConfig(**ADAPTERS[adapter]))
    generator = torch.Generator().manual_seed(0)
    for parameter in () if adapter == "full" else trainable.values():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    activation.apply(model, architecture, policy)
    return model, trainable


def loss_of(architecture, model) -> Tensor:
    tokens = torch.arange(3, 3 + TOKENS)[None]
    return architecture.hidden(model, tokens, (TOKENS - 10, 10))[0].square().mean()


def modules_of(tiny: Tiny, **changes) -> ActivationPolicy:
    return ActivationPolicy("layer", every=1, modules=MODULES[tiny.name], **changes)


@pytest.mark.parametrize(("adapter", "policies"), [
    *[(adapter, [LAYER, HALF, THREE, ON_CPU, "modules", BONE, BOTH]) for adapter in ("row", "col", "left", "row built", "col built")],
    *[(adapter, [LAYER, BOTH]) for adapter in ("free", "miss", "hadamard", "unconstrained")],
    *[(adapter, [LAYER, THREE, "modules"]) for adapter in ("lora", "full", "state")]])
def test_loss_and_gradients_are_equal_to_the_bit(tiny, adapter, policies):
    if adapter == "state" and not tiny.architecture.carries_state:
        pytest.skip("attention has no state")
    plain = passed(tiny, NONE, adapter)
    assert sum(bool(gradient.any()) for gradient in plain.gradients.values()) >= 0.9 * len(plain.gradients) > 0
    for policy in policies:
        recomputed = passed(tiny, modules_of(tiny) if policy == "modules" else policy, adapter)
        assert_equal(recomputed, plain)


def assert_equal(recomputed: Pass, plain: Pass) -> None:
    assert torch.equal(recomputed.loss, plain.loss)
    assert recomputed.gradients.keys() == plain.gradients.keys()
    assert all(torch.equal(recomputed.gradients[name], gradient) for name, gradient in plain.gradients.items())


def test_a_recomputed_layer_keeps_its_input_alone(tiny):
    plain, layer = passed(tiny), passed(tiny, LAYER)
    inputs_bytes = LAYERS * TOKENS * WIDTH * 4
    assert inputs_bytes <= layer.kept_bytes < 2 * inputs_bytes < 0.15 * plain.kept_bytes, "beside them, the last norm and the loss"
    assert layer.peak_bytes < 0.45 * plain.peak_bytes


def test_part_of_the_layers_saves_that_part(tiny):
    """The first layer keeps less than the others where nothing before it is trained."""
    first, whole = ActivationPolicy("layer", number_checkpoints=1), LAYER
    saved = {policy: passed(tiny).kept_bytes - passed(tiny, policy).kept_bytes for policy in (first, HALF, THREE, EVERY_THIRD, whole)}
    another = (saved[whole] - saved[first]) / (LAYERS - 1)
    assert 0 < saved[first] <= another
    for policy, others in ((HALF, 1), (THREE, 2), (EVERY_THIRD, 1)):
        assert saved[policy] == pytest.approx(saved[first] + others * another, rel=0.05), policy


def test_named_modules_save_less_than_whole_layers(tiny):
    plain, layer, modules = passed(tiny), passed(tiny, LAYER), passed(tiny, modules_of(tiny))
    assert layer.kept_bytes < modules.kept_bytes < 0.8 * plain.kept_bytes


@pytest.mark.parametrize("adapter", ["row built", "col built"])
def test_bone_layers_keep_no_weight_and_live_one_at_a_time_within_a_recomputed_layer(tiny, adapter):
    plain, bone, layer, both = (passed(tiny, policy, adapter) for policy in (NONE, BONE, LAYER, BOTH))
    assert bone.kept_bytes == passed(tiny, NONE, adapter.split()[0]).kept_bytes < 0.8 * plain.kept_bytes
    assert both.kept_bytes == layer.kept_bytes < bone.kept_bytes
    assert both.peak_bytes < 0.8 * layer.peak_bytes and layer.peak_bytes < 0.6 * bone.peak_bytes


@pytest.mark.parametrize("adapter", ["row", "col", "free", "miss", "hadamard", "unconstrained"])
def test_bone_leaves_alone_what_keeps_its_input_only(tiny, adapter):
    assert flops(tiny, BONE, adapter) == flops(tiny, NONE, adapter)


def test_bone_gives_left_its_smaller_inputs_back(tiny):
    assert passed(tiny, BONE, "left").kept_bytes < passed(tiny, NONE, "left").kept_bytes
    assert flops(tiny, BONE, "left") > flops(tiny, NONE, "left")


@pytest.mark.parametrize(("policy", "layers"), [
    (LAYER, [0, 1, 2, 3]), (HALF, [0, 2]), (THREE, [0, 1, 2]), (EVERY_THIRD, [0, 3]),
    (ActivationPolicy("layer", number_checkpoints=2), [0, 2])])
def test_exactly_the_named_layers_run_forward_once_more(tiny, policy, layers):
    forward = list(forward_flops(tiny, tiny.layers).values())
    assert len(forward) == LAYERS and min(forward) > 0
    assert flops(tiny, policy) - flops(tiny) == sum(forward[layer] for layer in layers)


def test_exactly_the_named_modules_run_forward_once_more(tiny):
    forward = forward_flops(tiny, tiny.named_modules)
    assert flops(tiny, modules_of(tiny)) - flops(tiny) == sum(forward.values()) > 0


def test_built_bone_layers_are_built_once_more_without_their_products(tiny):
    """Once W' is there again nothing is left to compute: its product with the input is no part of any gradient."""
    model, trainable = adapted(tiny.architecture, tiny.loaded(), NONE, "col built")
    weights = [model.get_submodule(name.removesuffix(".bone")).weight for name in trainable]
    assert flops(tiny, BONE, "col built") - flops(tiny, NONE, "col built") == sum(2 * weight.numel() * RANK for weight in weights)


@pytest.mark.parametrize("policy", [NONE, LAYER, BONE, BOTH])
@pytest.mark.parametrize("adapter", ["row", "col built", "free", "miss", "hadamard", "unconstrained"])
def test_fake_tensors_live_as_real_ones(tiny, adapter, policy):
    real, fake = passed(tiny, policy, adapter), passed_fake(tiny, policy, adapter)
    assert (fake.kept_bytes, fake.peak_bytes) == (real.kept_bytes, real.peak_bytes)


class Host(saved_tensors_hooks):
    """Stands in for save_on_cpu: copies what it is given, and keeps a list of it."""

    moved: list[tuple[int, ...]] = []

    def __init__(self, pin_memory):
        assert not pin_memory, "there is no accelerator"

        def pack(tensor):
            self.moved.append(tuple(tensor.shape))
            return tensor.clone()

        super().__init__(pack, lambda copy: copy)


@pytest.mark.parametrize("policy", ["layer", "bone+layer", "modules", "bone"])
def test_with_cpu_checkpointing_the_inputs_of_what_is_recomputed_wait_on_the_host(tiny, policy, monkeypatch):
    """Those of Bone layers within a recomputed layer aren't kept, so they don't travel either."""
    monkeypatch.setattr(activation, "save_on_cpu", Host)
    Host.moved = []
    modules = MODULES[tiny.name] if policy == "modules" else None
    every = None if policy == "bone" else 1
    policy = ActivationPolicy("layer" if modules else policy, every, modules, cpu_checkpointing=True)
    recomputed = run(tiny.architecture, tiny.loaded(), policy, "col built")
    inputs = [shape for shape in Host.moved if shape[-2:] == (TOKENS, WIDTH)]
    per_layer = {"layer": 1, "bone+layer": 1, "bone": 6 if tiny.name == "llama" else 7}[policy.policy] if not modules else 2
    assert len(inputs) == LAYERS * per_layer
    assert_equal(recomputed, passed(tiny, NONE, "col built"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_with_cpu_checkpointing_the_device_keeps_nothing_of_a_layer(tiny):
    def kept(**changes):
        model = tiny.loaded().cuda()
        trainable = inject(model, tiny.architecture, AdapterConfig(**ADAPTERS["row"]))
        activation.apply(model, tiny.architecture, ActivationPolicy("layer", every=1, **changes))
        before = torch.cuda.memory_allocated()
        loss = tiny.architecture.hidden(model, torch.arange(3, 43, device="cuda")[None], (40,))[0].square().sum()
        kept_bytes = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept_bytes, {name: parameter.grad for name, parameter in trainable.items()}

    (on_device, gradients), (on_host, gradients_from_host) = kept(), kept(cpu_checkpointing=True)
    assert on_host <= on_device - (LAYERS - 1) * TOKENS * WIDTH * 4
    assert all(torch.equal(gradients_from_host[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize(("policy", "says"), [
    (ActivationPolicy("layer", every=5), ["every (train.recompute_every): 5 is more than the model's 4 layers"]),
    (ActivationPolicy("bone+layer", number_checkpoints=5), ["number_checkpoints: 5 is more than the model's 4 layers"]),
    ("llama", ["modules (train.recompute_modules): a layer of llama has no 'mpl', choose among self_attn, ", "did you mean 'mlp'?"]),
    ("rwkv", ["modules (train.recompute_modules): a layer of rwkv has no 'ffnn', choose among ln1, ", "did you mean 'ffn'?"]),
])
def test_layers_and_modules_that_the_model_lacks_are_refused(tiny, policy, says):
    if isinstance(policy, str):
        if policy != tiny.name:
            pytest.skip("the other's names")
        policy = ActivationPolicy("layer", every=1, modules=({"llama": "mpl", "rwkv": "ffnn"}[tiny.name],))
    model = tiny.loaded()
    for attempt in (activation.check, activation.apply):
        with pytest.raises(ConfigError) as caught:
            attempt(model, tiny.architecture, policy)
        assert all(part in str(caught.value) for part in says), caught.value
