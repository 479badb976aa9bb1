"""Packed documents against the same samples run one by one in plain transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from bone_ds.arch import Source
from llama_adapters import ARCHITECTURE, attention

VOCAB = 97
LENGTHS = (7, 1, 12, 3)


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64} | changes)


def tiny_model(attn: str, **changes) -> LlamaForCausalLM:
    config = tiny_config(**changes)
    config._attn_implementation = attn
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def tokens_of(lengths) -> torch.Tensor:
    return torch.randint(VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))


def one_by_one(model, tokens, lengths) -> torch.Tensor:
    return torch.cat([model.model(input_ids=document).last_hidden_state[0] for document in tokens.split(lengths, dim=1)])


@pytest.mark.parametrize("plain", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (23,), (1, 1, 5)])
def test_packed_documents_equal_single_ones(plain, kv_heads, lengths):
    ours, theirs = (tiny_model(attn, num_key_value_heads=kv_heads) for attn in (attention.NAME, plain))
    tokens = tokens_of(lengths)
    packed = attention.hidden(ours, tokens, lengths)
    single = one_by_one(theirs, tokens, lengths)
    assert packed.shape == (sum(lengths), 32)
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-5)

    direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    (packed * direction).sum().backward()
    (single * direction).sum().backward()
    theirs_grads = dict(theirs.model.named_parameters())
    for name, param in ours.model.named_parameters():
        torch.testing.assert_close(param.grad, theirs_grads[name].grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_changed_document_leaves_the_others_bitwise_alone():
    model = tiny_model(attention.NAME)
    tokens = tokens_of(LENGTHS)
    changed = tokens.clone()
    changed[0, 8:20] = (changed[0, 8:20] + 1) % VOCAB
    before, after = (attention.hidden(model, row, LENGTHS) for row in (tokens, changed))
    assert torch.equal(before[:8], after[:8]) and torch.equal(before[20:], after[20:])
    assert not torch.equal(before[8:20], after[8:20])


def test_no_mask_is_built(monkeypatch):
    """transformers inspects position ids and builds masks only for attentions in its registry of masks."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: pytest.fail("inspected"))
    attention.hidden(tiny_model(attention.NAME), tokens_of(LENGTHS), LENGTHS)


def test_without_document_lengths_it_refuses():
    with pytest.raises(TypeError, match="document_lengths"):
        tiny_model(attention.NAME)(input_ids=tokens_of((5,)))


def test_positions_restart_and_bounds_close():
    assert attention.position_ids((3, 1, 2)).tolist() == [[0, 1, 2, 0, 0, 1]]
    assert attention.document_bounds((3, 1, 2)).tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_on_fake_tensors(tmp_path, dtype, tied):
    tiny_config(tie_word_embeddings=tied).save_pretrained(tmp_path)
    source = Source(path=tmp_path, origin=str(tmp_path), revision=None, fingerprint="")
    with FakeTensorMode():
        model = ARCHITECTURE.build(source, dtype)
        hidden, _ = ARCHITECTURE.hidden(model, torch.zeros(1, sum(LENGTHS), dtype=torch.int64), LENGTHS)
        (hidden @ ARCHITECTURE.head(model).T).sum().backward()
    assert hidden.shape == (sum(LENGTHS), 32) and hidden.dtype == dtype
    assert model.model.embed_tokens.weight.grad.shape == (VOCAB, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_the_gpu_path_hands_documents_to_varlen_attention(monkeypatch):
    """The kernel needs a GPU; a stand-in with its documented layout checks what it is given and what is made of it."""
    def stand_in(q, k, v, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
        assert starts is key_starts and starts.dtype == torch.int32 and longest == longest_key == max(LENGTHS)
        assert window_size == (-1, 0) and enable_gqa
        assert q.shape == (sum(LENGTHS), 4, 8) and k.shape == v.shape == (sum(LENGTHS), 2, 8)
        rows = [F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True,
                                               scale=scale, enable_gqa=True)[0].transpose(0, 1)
                for a, b in zip(starts[:-1], starts[1:])]
        return torch.cat(rows)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    flash = attention.attend_flash(q, k, v, attention.document_bounds(LENGTHS), max(LENGTHS), 0.3)
    torch.testing.assert_close(flash, attention.attend_each(q, k, v, LENGTHS, 0.3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flash_equals_the_loop_on_a_gpu(kv_heads):
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for heads in (4, kv_heads, kv_heads))
    flash = attention.attend_flash(q, k, v, attention.document_bounds(LENGTHS).cuda(), max(LENGTHS), 0.125)
    each = attention.attend_each(q, k, v, LENGTHS, 0.125)
    torch.testing.assert_close(flash, each, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(torch.autograd.grad(flash.sum(), (q, k, v)), torch.autograd.grad(each.sum(), (q, k, v))):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def test_the_core_finds_blocks_and_head():
    model = tiny_model(attention.NAME, tie_word_embeddings=True)
    names = [name for name, _ in ARCHITECTURE.layers(model)]
    assert names == ["model.layers.0", "model.layers.1"]
    assert all(model.get_submodule(name) is layer for name, layer in ARCHITECTURE.layers(model))
    assert ARCHITECTURE.head(model) is model.model.embed_tokens.weight
    linear = {name.rsplit(".")[-1] for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == set(ARCHITECTURE.targets)
