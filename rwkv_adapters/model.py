"""A trainable RWKV6 (x060). Its parameters bear the names and shapes of the official .pth files.

Equations: "Eagle and Finch" (arXiv 2404.05892), section 4, and the `rwkv` package's `att_seq_v6_0` and `ffn_seq_v6`.

T tokens in one row of D documents; C width, A attention width = H heads of N, F ffn width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bone_ds.arch import State

MIXES = "wkvrg"
"""What the time mixing reads, in the order of time_maa_w1 and time_maa_w2: decay, key, value, receptance, gate."""
MOST_LOG_RATE = 80.0
LN_X_EPS = 64e-5
"""Of the norm over each head: LayerNorm's 1e-5, times the square of the 8 that upstream divides by."""


@dataclass(frozen=True)
class Sizes:
    """Everything that a model's shapes follow from."""

    layers: int
    width: int
    attention_width: int
    heads: int
    ffn_width: int
    vocabulary: int
    mix_rank: int
    """Of the data-dependent part of the token shift (time_maa_w1, time_maa_w2)."""
    decay_rank: int
    """Of the data-dependent part of the decay (time_decay_w1, time_decay_w2)."""
    initial_state: bool = False
    """Whether every layer has a `time_state` that documents begin with."""

    @property
    def head_size(self) -> int:
        return self.attention_width // self.heads


def parameter_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the model and of the official files."""
    with torch.device("meta"):
        model = Rwkv6(sizes)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


class Rwkv6(nn.Module):
    """Parameters are unset until they are loaded. `hidden` is its forward; the head is applied by the loss alone."""

    def __init__(self, sizes: Sizes, wkv: str = "auto"):
        """wkv: the name of the WKV operator, see `rwkv_adapters.wkv6.resolve`; it is chosen when the device is known."""
        super().__init__()
        self.sizes = sizes
        self.emb = Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, layer, wkv) for layer in range(sizes.layers))
        self.ln_out = nn.LayerNorm(sizes.width)
        self.head = Linear(sizes.width, sizes.vocabulary, bias=False)

    def hidden(self, tokens: Tensor, document_lengths: tuple[int, ...], state: State | None = None,
               keep_state: slice | None = None) -> tuple[Tensor, State | None]:
        """tokens (1, T) -> what the head reads (T, C), and the state of the documents that keep_state takes, detached.

        A state is (shifts, wkv): shifts (D, L, 2, C) the last inputs of time and channel mixing, wkv (D, L, H, N, N) fp32 with
        key before value. One that is given belongs to the first documents of the row; the others begin anew.
        """
        x = self.emb(tokens.squeeze(0))
        assert sum(document_lengths) == len(x) and min(document_lengths) > 0, f"{document_lengths} are no {len(x)} tokens"
        shifts, wkv = self._padded(state, len(document_lengths), x)
        ends = list(accumulate(document_lengths))
        first = torch.tensor([0, *ends[:-1]], device=x.device)
        last = torch.tensor([end - 1 for end in ends], device=x.device)
        kept = []
        for layer, block in enumerate(self.blocks):
            x, *after = block(x, document_lengths, first, last, shifts[:, layer], wkv[:, layer])
            if keep_state is not None:
                kept.append([tensor[keep_state].detach().clone() for tensor in after])
        states = tuple(torch.stack(tensors, 1) for tensors in zip(*kept)) if kept else None
        return self.ln_out(x), states

    def _padded(self, state: State | None, documents: int, x: Tensor) -> State:
        """shifts (D, L, 2, C), zero for documents that begin anew; wkv for those that go on alone (the others: TimeMix)."""
        sizes = self.sizes
        if state is None:
            heads = (sizes.heads, sizes.head_size, sizes.head_size)
            return x.new_zeros(documents, sizes.layers, 2, sizes.width), x.new_zeros(0, sizes.layers, *heads, dtype=wide(x.dtype))
        shifts, wkv = state
        assert len(shifts) == len(wkv) <= documents
        return F.pad(shifts, (0, 0) * 3 + (0, documents - len(shifts))), wkv

    def add_initial_state(self, first_layer: int, last_layer: int) -> dict[str, nn.Parameter]:
        """A trainable `time_state` on layers [first, last), zero at first or as the file had it; by parameter name."""
        return {f"blocks.{layer}.att.time_state": self.blocks[layer].att.add_initial_state()
                for layer in range(first_layer, last_layer)}


class Block(nn.Module):
    """x (T, C) -> x (T, C), and the layer's part of the state after the documents' last tokens.

    Takes and returns tensors (and the lengths), so that it can be recomputed in backward. The rows of `first` and `last` are
    the documents' first and last tokens.
    """

    def __init__(self, sizes: Sizes, layer: int, wkv: str):
        super().__init__()
        self.ln1 = nn.LayerNorm(sizes.width)
        self.ln2 = nn.LayerNorm(sizes.width)
        self.ln0 = nn.LayerNorm(sizes.width) if layer == 0 else None
        self.att = TimeMix(sizes, wkv)
        self.ffn = ChannelMix(sizes)

    def forward(self, x: Tensor, document_lengths: tuple[int, ...], first: Tensor, last: Tensor, shifts: Tensor,
                wkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """shifts (D, 2, C); wkv (D' <= D, H, N, N) of the documents that go on -> x, shifts, wkv (D, H, N, N)"""
        if self.ln0 is not None:
            x = self.ln0(x)
        normed = self.ln1(x)
        time_shift = normed.detach().index_select(0, last)
        mixed, wkv = self.att(normed, document_lengths, first, shifts[:, 0], wkv)
        x = x + mixed
        normed = self.ln2(x)
        channel_shift = normed.detach().index_select(0, last)
        x = x + self.ffn(normed, first, shifts[:, 1])
        return x, torch.stack((time_shift, channel_shift), 1), wkv


class TimeMix(nn.Module):
    """The attention: five mixes of each token with the one before it, and the WKV recurrence per head."""

    def __init__(self, sizes: Sizes, wkv: str):
        super().__init__()
        self.heads, self.head_size, self.mix_rank, self.wkv = sizes.heads, sizes.head_size, sizes.mix_rank, wkv
        width, attention_width = sizes.width, sizes.attention_width
        for mix in "x" + MIXES:
            setattr(self, f"time_maa_{mix}", unset(1, 1, width))
        self.time_maa_w1 = unset(width, len(MIXES) * sizes.mix_rank)
        self.time_maa_w2 = unset(len(MIXES), sizes.mix_rank, width)
        self.time_decay = unset(1, 1, attention_width)
        self.time_decay_w1 = unset(width, sizes.decay_rank)
        self.time_decay_w2 = unset(sizes.decay_rank, attention_width)
        self.time_faaaa = unset(sizes.heads, sizes.head_size)
        self.time_state = unset(sizes.heads, sizes.head_size, sizes.head_size) if sizes.initial_state else None
        self.receptance = Linear(width, attention_width, bias=False)
        self.key = Linear(width, attention_width, bias=False)
        self.value = Linear(width, attention_width, bias=False)
        self.output = Linear(attention_width, width, bias=False)
        self.gate = Linear(width, attention_width, bias=False)
        self.ln_x = nn.GroupNorm(sizes.heads, attention_width, eps=LN_X_EPS)

    def add_initial_state(self) -> nn.Parameter:
        """Registers `time_state` (H, N value, N key), the transpose of a state: the layout of the community's state-tuning files.

        RWKV-PEFT trains it under this name and shape; the `rwkv` package and every script that loads such a file transposes the
        last two dimensions on the way into its [key, value] state (JL-er/RWKV-PEFT rwkvt/rwkv6/att.py at 801e5df;
        `rwkv/model.py`: `w[f'blocks.{i}.att.time_state'].transpose(1,2)`).
        """
        if self.time_state is None:
            size = (self.heads, self.head_size, self.head_size)
            self.time_state = nn.Parameter(torch.zeros(size, dtype=self.time_decay.dtype, device=self.time_decay.device))
        return self.time_state.requires_grad_()

    def forward(self, x: Tensor, document_lengths: tuple[int, ...], first: Tensor, shift: Tensor,
                wkv: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, C); shift (D, C) the input before each document; wkv (D', H, N, N) -> (T, C), (D, H, N, N)"""
        precise = wide(x.dtype)
        xw, xk, xv, xr, xg = self._mixes(x, token_shift(x, first, shift) - x)
        r, k, v = (linear(mixed).view(-1, self.heads, self.head_size).to(precise)
                   for linear, mixed in ((self.receptance, xr), (self.key, xk), (self.value, xv)))
        gate = F.silu(self.gate(xg))
        decay = torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        decay = self.time_decay.to(precise).squeeze(0) + decay.to(precise)  # too coarse in bf16: its exponential is a rate
        log_decay = NegativeExponential.apply(decay).view_as(r)
        state = self._initial_states(wkv, len(document_lengths))
        y, state = operator(self.wkv, x.device)(r, k, v, log_decay, self.time_faaaa.to(precise), state, document_lengths)
        y = self.ln_x(y.flatten(1).to(x.dtype))
        return self.output(y * gate), state

    def _mixes(self, x: Tensor, difference: Tensor) -> tuple[Tensor, ...]:
        """Five times x + difference * (maa + what the token itself asks for), each (T, C)."""
        low = torch.tanh((x + difference * self.time_maa_x.squeeze(0)) @ self.time_maa_w1)
        low = low.view(-1, len(MIXES), self.mix_rank).transpose(0, 1)
        fixed = torch.cat((self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g))
        shares = fixed + torch.bmm(low, self.time_maa_w2)
        return tuple(x + difference * share for share in shares)

    def _initial_states(self, wkv: Tensor, documents: int) -> Tensor:
        """The states of the documents that go on, then of those that begin: (D, H, N, N)."""
        begin = (documents - len(wkv), self.heads, self.head_size, self.head_size)
        if self.time_state is None:
            return torch.cat((wkv, wkv.new_zeros(begin)))
        return torch.cat((wkv, self.time_state.to(wkv.dtype).transpose(1, 2).expand(begin)))


class ChannelMix(nn.Module):
    """The feed-forward part: a gated square of a rectified linear layer."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.time_maa_k = unset(1, 1, sizes.width)
        self.time_maa_r = unset(1, 1, sizes.width)
        self.key = Linear(sizes.width, sizes.ffn_width, bias=False)
        self.receptance = Linear(sizes.width, sizes.width, bias=False)
        self.value = Linear(sizes.ffn_width, sizes.width, bias=False)

    def forward(self, x: Tensor, first: Tensor, shift: Tensor) -> Tensor:
        """x (T, C); shift (D, C) the input before each document -> (T, C)"""
        difference = token_shift(x, first, shift) - x
        key = torch.relu(self.key(x + difference * self.time_maa_k.squeeze(0))) ** 2
        receptance = self.receptance(x + difference * self.time_maa_r.squeeze(0))
        return torch.sigmoid(receptance) * self.value(key)


class NegativeExponential(torch.autograd.Function):
    """-exp(x), which is its own derivative: unlike two operations, one tensor is kept, and it is the one that WKV keeps.

    It stays finite: a decay of exp(-exp(80)) is 0 as much as one of exp(-inf), and its gradient 0 instead of NaN.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clamp(max=MOST_LOG_RATE).exp_().neg_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y


def token_shift(x: Tensor, first: Tensor, shift: Tensor) -> Tensor:
    """Each row's predecessor in its document, (T, C); shift (D, C) precedes the rows `first`."""
    return F.pad(x, (0, 0, 1, -1)).index_copy_(0, first, shift)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 for what is too coarse in a model's bf16; fp64 stays."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def operator(name: str, device: torch.device) -> Callable:
    from rwkv_adapters import wkv6

    return wkv6.resolve(name, device)


def unset(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class Linear(nn.Linear):
    """Unset until it is loaded: filling 7B weights with random numbers first takes minutes."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Unset until it is loaded."""

    def reset_parameters(self) -> None:
        pass
