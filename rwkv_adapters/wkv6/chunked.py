"""WKV6 in plain torch: documents are cut into chunks, and what happens inside a chunk is matrix products.

Inside a chunk, y_t gains sum_{i<t} (r_t * d_ti . k_i) v_i, where d_ti is the product of the decays strictly between i and t. The
pairs (i, t) are split by halving: for two neighbouring blocks of m steps, i in the first and t in the second,

    d_ti = suffix_i * prefix_t      suffix: decays from after i to the end of its block; prefix: from the start of its block to before t

so that each pair of blocks is one product of (m, N) by (N, m). Every factor is a product of decays, at most 1: nothing overflows,
nothing is divided, and a factor that underflows belongs to a pair whose own decay does. The gradient of log_decay is gathered the
same way, by sums over the pairs that cross a step; there is no difference of large sums in it.

Between chunks the state is carried, over the number of the chunk and for all documents at once.

Suffixes of names: X tokens of all chunks and heads (J H L), J chunks, H heads, L steps of a chunk, N channels of a head, D documents;
P pairs of neighbouring blocks of M steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_adapters.wkv6.arguments import check

CHUNK = 64


def wkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor,
         document_lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keeps its inputs and one state a chunk for backward."""
    check(r, k, v, log_decay, bonus, state, document_lengths)
    return _Chunked.apply(r, k, v, log_decay, bonus, state, tuple(document_lengths))


@dataclass(frozen=True)
class _Cut:
    """How documents are cut into chunks of `steps`.

    Chunks are numbered by their place in their document first, and by document, the one with most chunks first: the chunks that the
    scan takes at once lie side by side, and the documents that still have one are the first of `order`.
    """

    steps: int
    """L, a power of two"""
    running: tuple[int, ...]
    """How many documents have a first, second, ... chunk; sums to J."""
    order: tuple[int, ...]
    """Documents, the one with most chunks first."""
    chunk: tuple[int, ...]
    """The chunk of each token, (T,)."""
    step: tuple[int, ...]
    """The place of each token in its chunk, (T,)."""

    @property
    def chunks(self) -> int:
        return sum(self.running)


@lru_cache(maxsize=64)
def _cut(document_lengths: tuple[int, ...]) -> _Cut:
    steps = min(CHUNK, 1 << (max(document_lengths) - 1).bit_length())
    counts = [-(-length // steps) for length in document_lengths]
    order = sorted(range(len(counts)), key=lambda document: -counts[document])
    running = [sum(count > number for count in counts) for number in range(max(counts))]
    first = [sum(running[:number]) for number in range(len(running))]
    rank = {document: place for place, document in enumerate(order)}
    places = [(first[t // steps] + rank[document], t % steps) for document, length in enumerate(document_lengths) for t in range(length)]
    return _Cut(steps, tuple(running), tuple(order), *zip(*places))


class _Places:
    """Moves tokens to the chunks and back; steps that pad a chunk are zero."""

    def __init__(self, cut: _Cut, heads: int, device: torch.device):
        tokens = len(cut.chunk)
        self.padded = cut.chunks * cut.steps > tokens
        chunk, step = (torch.tensor(places, device=device)[:, None] for places in (cut.chunk, cut.step))
        self.rows = ((chunk * heads + torch.arange(heads, device=device)) * cut.steps + step).flatten()
        # Padding takes the row after the last one.
        self.sources = torch.full((cut.chunks * heads * cut.steps,), tokens * heads, device=device)
        self.sources[self.rows] = torch.arange(tokens * heads, device=device)

    def cut(self, x_THN: Tensor) -> Tensor:
        N = x_THN.shape[-1]
        x = x_THN.reshape(-1, N)
        return (torch.cat((x, x.new_zeros(1, N))) if self.padded else x).index_select(0, self.sources)

    def join(self, x_XN: Tensor, heads: int) -> Tensor:
        return x_XN.index_select(0, self.rows).view(-1, heads, x_XN.shape[-1])


@dataclass
class _Decays:
    """Products of decays over blocks of M steps."""

    prefix_XN: Tensor
    """From the start of a step's block to before the step."""
    suffix_XN: Tensor
    """From after the step to the end of its block."""
    total_BN: Tensor
    """Over the whole block, for each of the B = X / M blocks."""

    @classmethod
    def of_steps(cls, decay_XN: Tensor) -> _Decays:
        return cls(torch.ones_like(decay_XN), torch.ones_like(decay_XN), decay_XN)

    def merge(self, M: int) -> None:
        """Blocks of M become blocks of 2 M."""
        N = self.total_BN.shape[-1]
        total_P2N = self.total_BN.view(-1, 2, N)
        self.prefix_XN.view(-1, 2, M, N)[:, 1] *= total_P2N[:, :1]
        self.suffix_XN.view(-1, 2, M, N)[:, 0] *= total_P2N[:, 1:]
        self.total_BN = total_P2N[:, 0] * total_P2N[:, 1]


def _block_sizes(steps: int) -> list[int]:
    return [1 << level for level in range(steps.bit_length() - 1)]


class _Chunked(torch.autograd.Function):

    @staticmethod
    def forward(ctx, r_THN: Tensor, k_THN: Tensor, v_THN: Tensor, log_decay_THN: Tensor, bonus_HN: Tensor, state_DHNN: Tensor,
                document_lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        H, N = bonus_HN.shape
        cut = _cut(document_lengths)
        places = _Places(cut, H, r_THN.device)
        r, k, v, log_decay = map(places.cut, (r_THN, k_THN, v_THN, log_decay_THN))
        y = torch.zeros_like(v)
        decays = _Decays.of_steps(log_decay.exp())
        for M in _block_sizes(cut.steps):
            q_PMN = _second(r, M) * _second(decays.prefix_XN, M)
            p_PMN = _first(k, M) * _first(decays.suffix_XN, M)
            _second(y, M).add_(_product(torch.bmm(q_PMN, p_PMN.mT), _first(v, M)))
            decays.merge(M)
        k_to_end, r_from_start = k.mul_(decays.suffix_XN), r.mul_(decays.prefix_XN)
        kv = torch.bmm(k_to_end.view(-1, cut.steps, N).mT, v.view(-1, cut.steps, N)).view(-1, H, N, N)
        states_JHNN, final_DHNN = _scan(cut, state_DHNN, decays.total_BN.view(-1, H, N, 1), kv)
        y += torch.bmm(r_from_start.view(-1, cut.steps, N), states_JHNN.view(-1, N, N)).view(-1, N)
        y_THN = places.join(y, H)
        y_THN += (r_THN * bonus_HN * k_THN).sum(-1, keepdim=True) * v_THN
        ctx.save_for_backward(r_THN, k_THN, v_THN, log_decay_THN, bonus_HN, states_JHNN)
        ctx.document_lengths = document_lengths
        return y_THN, final_DHNN

    @staticmethod
    @once_differentiable
    def backward(ctx, g_THN: Tensor, g_final_DHNN: Tensor):
        r_THN, k_THN, v_THN, log_decay_THN, bonus_HN, states_JHNN = ctx.saved_tensors
        H, N = bonus_HN.shape
        cut = _cut(ctx.document_lengths)
        L = cut.steps
        places = _Places(cut, H, r_THN.device)
        r, k, v, g, log_decay = map(places.cut, (r_THN, k_THN, v_THN, g_THN, log_decay_THN))

        decays = _Decays.of_steps(log_decay.exp())
        factors = []  # of each level
        for M in _block_sizes(L):
            factors.append((_second(decays.prefix_XN, M).clone(), _first(decays.suffix_XN, M).clone()))
            decays.merge(M)

        # Between chunks.
        r_from_start, k_to_end, total_JHN1 = r * decays.prefix_XN, k * decays.suffix_XN, decays.total_BN.view(-1, H, N, 1)
        rg = torch.bmm(r_from_start.view(-1, L, N).mT, g.view(-1, L, N)).view(-1, H, N, N)
        g_ends_JHNN, g_state_DHNN = _scan_back(cut, g_final_DHNN, total_JHN1, rg)
        ends, starts = g_ends_JHNN.view(-1, N, N), states_JHNN.view(-1, N, N)
        gr = torch.bmm(g.view(-1, L, N), starts.mT).view(-1, N).mul_(decays.prefix_XN)
        gk = torch.bmm(v.view(-1, L, N), ends.mT).view(-1, N).mul_(decays.suffix_XN)
        gv = torch.bmm(k_to_end.view(-1, L, N), ends).view(-1, N)
        # Gradients of the logarithms of prefix, suffix and total, which are sums of log_decay.
        g_prefix, g_suffix = r * gr, k * gk
        g_total = (g_ends_JHNN * states_JHNN).sum(-1).view(-1, N).mul_(decays.total_BN)

        # Inside chunks, from the largest blocks to the smallest.
        for M, (prefix_PMN, suffix_PMN) in zip(reversed(_block_sizes(L)), reversed(factors)):
            g_total = _split_total(g_total, g_prefix, g_suffix, M)
            q_PMN, p_PMN, g_PMN = _second(r, M) * prefix_PMN, _first(k, M) * suffix_PMN, _second(g, M)
            g_products = torch.bmm(g_PMN, _first(v, M).mT)
            _first(gv, M).add_(_product(torch.bmm(p_PMN, q_PMN.mT), g_PMN))
            gq, gp = _product(g_products, p_PMN), _product(g_products.mT, q_PMN)
            _second(gr, M).addcmul_(gq, prefix_PMN)
            _first(gk, M).addcmul_(gp, suffix_PMN)
            _second(g_prefix, M).addcmul_(gq, q_PMN)
            _first(g_suffix, M).addcmul_(gp, p_PMN)

        gr, gk, gv, g_log_decay = (places.join(x, H) for x in (gr, gk, gv, g_total))
        # The bonus: y_t += (r_t * bonus . k_t) v_t.
        gv += (r_THN * bonus_HN * k_THN).sum(-1, keepdim=True) * g_THN
        g_weight = (g_THN * v_THN).sum(-1, keepdim=True)
        g_rk = g_weight * bonus_HN
        g_bonus = (g_weight * r_THN * k_THN).sum(0)
        return gr.addcmul_(g_rk, k_THN), gk.addcmul_(g_rk, r_THN), gv, g_log_decay, g_bonus, g_state_DHNN, None


def _first(x_XN: Tensor, M: int) -> Tensor:
    """(P, M, N): the first block of each pair of blocks of M steps."""
    return x_XN.view(-1, 2, M, x_XN.shape[-1])[:, 0]


def _second(x_XN: Tensor, M: int) -> Tensor:
    return x_XN.view(-1, 2, M, x_XN.shape[-1])[:, 1]


def _product(weights_PMM: Tensor, x_PMN: Tensor) -> Tensor:
    """torch.bmm, which is slow for many tiny matrices."""
    if weights_PMM.shape[1] > 2:
        return torch.bmm(weights_PMM, x_PMN)
    product = weights_PMM[:, :, :1] * x_PMN[:, :1]
    return product if weights_PMM.shape[1] == 1 else product.addcmul_(weights_PMM[:, :, 1:], x_PMN[:, 1:])


def _split_total(g_total_PN: Tensor, g_prefix_XN: Tensor, g_suffix_XN: Tensor, M: int) -> Tensor:
    """Undoes `_Decays.merge`: a block's total is in the pair's total, in the prefixes after it and the suffixes before it."""
    g_first = g_total_PN + _second(g_prefix_XN, M).sum(1)
    g_second = g_total_PN + _first(g_suffix_XN, M).sum(1)
    return torch.stack((g_first, g_second), 1).flatten(0, 1)


def _scan(cut: _Cut, state_DHNN: Tensor, total_JHN1: Tensor, kv_JHNN: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and after each document."""
    starts = torch.empty_like(kv_JHNN)
    state = state_DHNN[list(cut.order)]
    first = 0
    for running in cut.running:
        chunks = slice(first, first + running)
        starts[chunks] = state[:running]
        torch.addcmul(kv_JHNN[chunks], state[:running], total_JHN1[chunks], out=state[:running])
        first += running
    return starts, _unordered(state, cut)


def _scan_back(cut: _Cut, g_final_DHNN: Tensor, total_JHN1: Tensor, rg_JHNN: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the state after each chunk, and before each document."""
    ends = torch.empty_like(rg_JHNN)
    g_state = g_final_DHNN[list(cut.order)]
    last = cut.chunks
    for running in reversed(cut.running):
        chunks = slice(last - running, last)
        ends[chunks] = g_state[:running]
        torch.addcmul(rg_JHNN[chunks], g_state[:running], total_JHN1[chunks], out=g_state[:running])
        last -= running
    return ends, _unordered(g_state, cut)


def _unordered(x_DHNN: Tensor, cut: _Cut) -> Tensor:
    unordered = torch.empty_like(x_DHNN)
    unordered[list(cut.order)] = x_DHNN
    return unordered
