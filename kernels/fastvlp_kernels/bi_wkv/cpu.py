"""Chunks of tokens: states between them, products within them; plain torch, any device.

Within a chunk pairs of tokens are sorted by the boundary that lies between them, in halves of halves. D(a, b) is then a factor from a to
the boundary times one from there to b, both at most 1 however strong the decay, and the factor of a token is the same in both directions.
A factor is exp of a sum of log decays over some tokens of the chunk; all those sums are one product with a matrix of ones and zeros.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._ragged import batches

CHUNK = 16
ELEMENTS = 1 << 22  # of states and factors at once
LARGEST = 1e4  # of exp(w): exp(-LARGEST) is 0


class Factors(NamedTuple):
    """``before`` and ``after`` [..., L, K]: decay by the tokens of the chunk before and after each. ``all`` [..., K]: by all of them.
    ``halves`` [levels, ..., L, K]: between each token and the middle of its block of 2, 4, ..., L tokens."""

    before: Tensor
    after: Tensor
    all: Tensor
    halves: Tensor


@functools.cache
def levels(chunk: int) -> tuple[Tensor, Tensor]:
    """sums [2 + levels, L, L]: 1 where the decay of token j is part of a factor of token i (before, after, halves).
    pairs [levels, L, L]: 1 where i and j lie in one block but on both sides of its middle."""
    i, j = torch.arange(chunk)[:, None], torch.arange(chunk)
    sums, pairs, half = [j < i, j > i], [], 1
    # Pairs of a chunk by the smallest block that holds both: split in its middle, the decay between them is a product of two factors
    # below 1, one of each token. A quotient of decays from the chunk's start would overflow.
    while half < chunk:
        middle = i // (2 * half) * 2 * half + half
        sums.append(((i < j) & (j < middle)) | ((middle <= j) & (j < i)))
        pairs.append((i // (2 * half) == j // (2 * half)) & (i // half != j // half))
        half *= 2
    return torch.stack(sums).double(), torch.stack(pairs).double()


def _factors(g: Tensor) -> Factors:
    """From log decays g [..., L, K]."""
    sums = levels(g.shape[-2])[0].to(g)
    before, after, *halves = (sums.view(len(sums), *[1] * (g.ndim - 2), *sums.shape[1:]) @ g).exp_()
    return Factors(before, after, g.sum(-2).exp(), torch.stack(halves) if halves else g[None, :0])


def _both(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.cat((x * first, x * second), -1)


def _states(k: Tensor, v: Tensor, f: Factors) -> Tensor:
    """[..., chunks, 2 K, V]: sum over the tokens s before each chunk, then over those after it, of k_s v_s decayed up to the chunk."""
    sums = _both(k, f.after, f.before).mT @ v
    first, second = sums.chunk(2, -2)
    states, decay = torch.empty_like(sums), f.all[..., None]
    left, right = states.chunk(2, -2)
    chunks = k.shape[-3]
    left[..., 0, :, :] = 0
    right[..., -1, :, :] = 0
    # The only loop over time: one step a chunk, each way, all segments and heads together.
    for c in range(1, chunks):
        left[..., c, :, :] = torch.addcmul(first[..., c - 1, :, :], left[..., c - 1, :, :], decay[..., c - 1, :, :])
        right[..., -c - 1, :, :] = torch.addcmul(second[..., -c, :, :], right[..., -c, :, :], decay[..., -c, :, :])
    return states


def _products(r: Tensor, k: Tensor, u: Tensor, f: Factors) -> Tensor:
    """[..., L, L]: what r_t makes of k_s within a chunk."""
    pairs = levels(r.shape[-2])[1].to(r)
    # A token reads itself with weight u, and no decay.
    A = torch.diag_embed((r * u * k).sum(-1))
    for pair, half in zip(pairs, f.halves, strict=True):
        A.addcmul_((r * half) @ (k * half).mT, pair)
    return A


def _cut(lengths: Tensor, like: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of segments in whole chunks: tokens int64 [B, chunks * L], inside bool [B, chunks * L, 1, 1], and the tokens [n] inside."""
    for batch in batches(lengths, like.device, max(1, ELEMENTS // width)):
        missing = -batch.tokens.shape[1] % CHUNK
        inside, tokens = pad(batch.inside, (0, missing)), pad(batch.tokens, (0, missing))
        yield tokens, inside[..., None, None], tokens[inside]


def _width(k: Tensor, v: Tensor) -> int:
    """Elements per token, about."""
    H, K = k.shape[1:]
    return H * (2 * K * v.shape[2] // CHUNK + 8 * K)


def _gather(x: Tensor, tokens: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, chunks, L, width] with 0 beyond the segments."""
    x = x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).to(dtype).masked_fill_(~inside, 0)
    return x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4).contiguous()


def _scatter(out: Tensor, values: Tensor, inside: Tensor, tokens: Tensor) -> None:
    values = values.permute(0, 2, 3, 1, 4).flatten(1, 2)[inside[..., 0, 0]]
    out.index_copy_(0, tokens, values.to(out.dtype))


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """out [T, H, V]."""
    dtype, out = sum_dtype(v.dtype), torch.empty_like(v, memory_format=torch.contiguous_format)
    # Bounded, since exp(w) overflows where exp(-exp(w)) is 0 anyway, and inf * 0 would be NaN.
    u, rates = u.to(dtype)[:, None, None], w.to(dtype).exp().clamp_max_(LARGEST)
    for tokens, inside, rows in _cut(lengths, v, _width(k, v)):
        b_r, b_k, b_v = (_gather(x, tokens, inside, dtype) for x in (r, k, v))
        f = _factors(_gather(rates, tokens, inside, dtype).neg_())
        y = _products(b_r, b_k, u, f) @ b_v
        y += _both(b_r, f.before, f.after) @ _states(b_k, b_v, f)
        _scatter(out, y.mul_(scale), inside, rows)
    return out


def backward(
    grad: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, lengths: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w and u; [0] where ``needs`` says no."""
    dtype = sum_dtype(v.dtype)
    wide_u, du = u.to(dtype)[:, None, None], torch.zeros_like(u, dtype=dtype)
    results = [x.new_empty(x.shape if need else (0,)) for x, need in zip((r, k, v, w, u), needs, strict=True)]
    sums, pairs = (x.to(v.device, dtype) for x in levels(CHUNK))
    rates = w.to(dtype).exp().clamp_max_(LARGEST)
    need_states, need_adjoint = needs[0] or needs[3], needs[1] or needs[2] or needs[3]
    for tokens, inside, rows in _cut(lengths, v, 2 * _width(k, v)):
        b_r, b_k, b_v, b_y = (_gather(x, tokens, inside, dtype) for x in (r, k, v, grad))
        rate = _gather(rates, tokens, inside, dtype)
        b_y *= scale
        f = _factors(-rate)
        dA = b_y @ b_v.mT
        diagonal = dA.diagonal(dim1=-2, dim2=-1)[..., None]
        du += (diagonal * b_r * b_k).sum((0, 2, 3))
        dr, dk, dlog = diagonal * wide_u * b_k, diagonal * wide_u * b_r, torch.zeros_like(b_k)
        for pair, half, members in zip(pairs, f.halves, sums[2:], strict=True):
            across = dA * pair
            to_r, to_k = half * (across @ (b_k * half)), half * (across.mT @ (b_r * half))
            dlog += members.T @ (b_r * to_r + b_k * to_k)
            dr += to_r
            dk += to_k
        if need_states:
            left, right = _states(b_k, b_v, f).chunk(2, -2)
            to_r, to_r_ = f.before * (b_y @ left.mT), f.after * (b_y @ right.mT)
            dlog += sums[0].T @ (b_r * to_r) + sums[1].T @ (b_r * to_r_)
            dr += to_r + to_r_
        if need_adjoint:
            # The states of (r, dy) are the gradients of those of (k, v), each of the other direction's.
            d_right, d_left = (adjoint := _states(b_r, b_y, f)).chunk(2, -2)
            to_k, to_k_ = f.before * (b_v @ d_right.mT), f.after * (b_v @ d_left.mT)
            dlog += sums[0].T @ (b_k * to_k) + sums[1].T @ (b_k * to_k_)
            dk += to_k + to_k_
            if needs[2]:
                dv = _products(b_k, b_r, wide_u, f) @ b_y + _both(b_k, f.before, f.after) @ adjoint
                _scatter(results[2], dv, inside, rows)
        if needs[3]:
            # A state that passes the chunk is decayed by all of its tokens, so that each gets value times gradient.
            through = (left * d_left).sum(-1) + (right * d_right).sum(-1)
            dlog += (f.all * through)[..., None, :]
        for i, values in ((0, dr), (1, dk), (3, -rate * dlog)):
            if needs[i]:
                _scatter(results[i], values, inside, rows)
    if needs[4]:
        results[4] = du.to(u.dtype)
    return results[0], results[1], results[2], results[3], results[4]
