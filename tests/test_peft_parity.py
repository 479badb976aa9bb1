"""Our adapters beside peft's on the same model: Bone col is its MissConfig("bat"), miss its MissConfig(), and LoRA is its LoRA."""

import pytest
import torch
from peft import LoraConfig, MissConfig, get_peft_model
from tiny_llama import tiny_config
from transformers import LlamaForCausalLM

from bone_ds.config import AdapterConfig
from bone_ds.inject import inject
from llama_adapters import ARCHITECTURE

# Raised inside get_peft_model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(3, 43)[None]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def fill(parameters) -> None:
    """The same random tensors for both: by their order."""
    torch.manual_seed(1)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)


def logits_and_gradients(model, trainable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=TOKENS).logits
    logits.float().log_softmax(-1)[0, :-1].gather(1, TOKENS[0, 1:, None]).mean().neg().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in trainable.items()}


def same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert len(ours[1]) == len(theirs[1])
    for (name, gradient), expected in zip(ours[1].items(), theirs[1].values(), strict=True):
        scale = expected.abs().max()
        assert scale > 0 and (gradient - expected).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("strategy", ["auto", "materialized", "checkpointed", "fused"])
def test_col_is_bat(strategy):
    ours = base()
    trainable = inject(ours, ARCHITECTURE, AdapterConfig(grouping="col", rank=8, strategy=strategy))
    fill(trainable.values())

    theirs = get_peft_model(base(), MissConfig(r=8, init_weights="bat", target_modules=list(ARCHITECTURE.targets)))
    named = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert [tuple(p.shape) for p in named.values()] == [tuple(p.shape) for p in trainable.values()]
    fill(named.values())
    same(logits_and_gradients(ours, trainable), logits_and_gradients(theirs, named))
    plain = base()(input_ids=TOKENS).logits
    assert (ours(input_ids=TOKENS).logits - plain).abs().max() > 0.1


@pytest.mark.parametrize("rank", [8, 12])
@pytest.mark.parametrize("strategy", ["auto", "materialized", "checkpointed"])
def test_miss_is_miss(strategy, rank):
    """Of a rank that divides every number of inputs, and of one that divides none."""
    ours = base()
    trainable = inject(ours, ARCHITECTURE, AdapterConfig(grouping="miss", rank=rank, strategy=strategy))
    fill(trainable.values())

    theirs = get_peft_model(base(), MissConfig(r=rank, target_modules=list(ARCHITECTURE.targets)))
    named = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert [tuple(p.shape) for p in named.values()] == [tuple(p.shape) for p in trainable.values()]
    fill(named.values())
    same(logits_and_gradients(ours, trainable), logits_and_gradients(theirs, named))


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_lora_is_lora(alpha):
    ours = base()
    trainable = inject(ours, ARCHITECTURE, AdapterConfig(method="lora", rank=4, alpha=alpha))
    fill(trainable.values())

    theirs = get_peft_model(base(), LoraConfig(r=4, lora_alpha=alpha or 4, target_modules=list(ARCHITECTURE.targets)))
    named = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    fill(named.values())
    same(logits_and_gradients(ours, trainable), logits_and_gradients(theirs, named))
