"""Packed attention on any device through dense products: segments of equal lengths are computed together, as views where they lie together."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = 1 << 19  # scores computed at once: what stays in the cache
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Run(NamedTuple):
    """``count`` segments that lie together, each of ``n`` queries and ``m`` keys; the first tokens and segment of the run."""

    q_start: int
    k_start: int
    segment: int
    count: int
    n: int
    m: int


class Order(NamedTuple):
    """Where the tokens and segments of the sorted order come from: int64 on the CPU."""

    q: Tensor
    k: Tensor
    segments: Tensor


@functools.lru_cache(maxsize=64)
def plan(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> tuple[list[Run], Order | None]:
    """Runs of segments of equal lengths, and the order that makes them (None: they lie as they are)."""
    pairs = list(zip(lengths_q, lengths_k, strict=True))
    changes = sum(a != b for a, b in zip(pairs, pairs[1:], strict=False))
    if changes < 2 * len(set(pairs)):
        return _runs(pairs), None
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    q_order, k_order = _tokens(lengths_q, order), _tokens(lengths_k, order)
    return _runs([pairs[i] for i in order]), Order(q_order, k_order, torch.tensor(order))


def _runs(pairs: list[tuple[int, int]]) -> list[Run]:
    runs: list[Run] = []
    q_start = k_start = first = 0
    for segment, (n, m) in enumerate(pairs):
        if segment + 1 == len(pairs) or pairs[segment + 1] != (n, m):
            count = segment + 1 - first
            runs.append(Run(q_start, k_start, first, count, n, m))
            q_start, k_start, first = q_start + count * n, k_start + count * m, segment + 1
    return runs


def _tokens(lengths: tuple[int, ...], order: list[int]) -> Tensor:
    counts = torch.tensor(lengths)
    starts = counts.cumsum(0) - counts
    order_ = torch.tensor(order)
    counts, starts = counts[order_], starts[order_]
    return torch.arange(int(counts.sum())) + (starts - (counts.cumsum(0) - counts)).repeat_interleave(counts)


class _Arguments(NamedTuple):
    """The inputs in the order of the runs."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None  # [1 or H, Tk] float32 or float64, sizes included
    prefix_len: Tensor | None


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, key_size: Tensor | None, key_bias: Tensor | None, prefix_len: Tensor | None, order: Order | None
) -> _Arguments:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = None if key_bias is None else key_bias.to(dtype).reshape(-1, k.shape[0])
    if key_size is not None:
        log_size = key_size.to(dtype).log()[None]
        bias = log_size if bias is None else bias + log_size
    if order is not None:
        q_order, k_order, segments = (index.to(q.device) for index in order)
        q, k, v = q.index_select(0, q_order), k.index_select(0, k_order), v.index_select(0, k_order)
        bias = None if bias is None else bias.index_select(1, k_order)
        prefix_len = None if prefix_len is None else prefix_len.index_select(0, segments)
    return _Arguments(q, k, v, bias, prefix_len)


def _view(x: Tensor, start: int, count: int, n: int) -> Tensor:
    """[count, H, n, d] of the segments that start at token ``start``."""
    return x[start : start + count * n].unflatten(0, (count, n)).transpose(1, 2)


def _bias(a: _Arguments, run: Run, causal: bool) -> Tensor | None:
    """What is added to the scores [count, H, n, m]; -inf where a key is not seen."""
    bias = None
    if a.key_bias is not None:
        bias = a.key_bias[:, run.k_start : run.k_start + run.count * run.m].unflatten(1, (run.count, run.m)).transpose(0, 1)[:, :, None]
    if causal:
        place = torch.arange(run.m, device=a.q.device)
        seen = place <= torch.arange(run.m - run.n, run.m, device=a.q.device)[:, None]
        if a.prefix_len is not None:
            seen = seen | (place < a.prefix_len[run.segment : run.segment + run.count, None, None, None])
        hidden = torch.zeros(seen.shape, dtype=torch.float32, device=a.q.device).masked_fill_(~seen, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    return bias


def _chunks(runs: list[Run], heads: int) -> list[Run]:
    """The same runs, cut so that the scores of one piece stay in the cache."""
    pieces = []
    for run in runs:
        step = max(1, SCORES // max(1, heads * run.n * run.m))
        for i in range(0, run.count, step):
            count = min(step, run.count - i)
            pieces.append(Run(run.q_start + i * run.n, run.k_start + i * run.m, run.segment + i, count, run.n, run.m))
    return pieces


def _flashes(run: Run, a: _Arguments, causal: bool) -> bool:
    plain = a.key_bias is None and a.prefix_len is None and (not causal or run.n == run.m)
    return plain and a.q.device.type == "cpu" and run.n > 0 and run.m > 0 and a.q.shape[2] == a.v.shape[2] and a.q.stride(2) == 1


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor, lengths_k: Tensor, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, d], the log of each query's denominator (float32 [H * Tq] in the order of the runs, inf for a query without keys), mass [Tk] or [0]."""
    runs, order = plan(tuple(lengths_q.tolist()), tuple(lengths_k.tolist()))
    a = _arguments(q, k, v, key_size, key_bias, prefix_len, order)
    heads = q.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = q.new_empty(q.shape[0], heads, v.shape[2]), q.new_empty(heads * q.shape[0], dtype=dtype)
    mass = q.new_zeros(k.shape[0] if with_mass else 0, dtype=torch.float32)
    if len(runs) == 1 and not with_mass and _flashes(runs[0], a, causal):
        run = runs[0]
        o, l = _flash(*_operands(a, run), 0.0, causal, scale=scale)
        out, lse = o.transpose(1, 2).flatten(0, 1), l.flatten()
        return out.contiguous(), lse, mass
    for run in _chunks(runs, heads):
        qs, ks, vs = _operands(a, run)
        o, l = _view(out, run.q_start, run.count, run.n), _lse(lse, run, heads)
        if not with_mass and _flashes(run, a, causal):
            part, part_lse = _flash(qs, ks, vs, 0.0, causal, scale=scale)
            o.copy_(part)
            l.copy_(part_lse[..., None])
            continue
        if run.m == 0:
            o.zero_()
            l.fill_(torch.inf)
            continue
        p = _scores(qs, ks, _bias(a, run, causal), scale, dtype)
        torch.logsumexp(p, 3, keepdim=True, out=l) if run.n else None
        l.masked_fill_(l == -torch.inf, torch.inf)
        p.sub_(l).exp_()
        o.copy_(torch.matmul(p, vs.to(dtype)))
        if with_mass:
            mass[run.k_start : run.k_start + run.count * run.m] = p.sum((1, 2)).flatten()
    if order is None:
        return out, lse, mass
    restored = torch.empty_like(out).index_copy_(0, order.q.to(q.device), out)
    return restored, lse, torch.empty_like(mass).index_copy_(0, order.k.to(q.device), mass) if with_mass else mass


def _operands(a: _Arguments, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """q [count, H, n, d], k and v [count, H, m, d]; each key head is repeated for its group of query heads."""
    q = _view(a.q, run.q_start, run.count, run.n)
    k, v = (_view(x, run.k_start, run.count, run.m) for x in (a.k, a.v))
    group = q.shape[1] // k.shape[1]
    return (q, k, v) if group == 1 else (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _lse(lse: Tensor, run: Run, heads: int) -> Tensor:
    """[count, H, n, 1]"""
    return lse[run.q_start * heads : (run.q_start + run.count * run.n) * heads].view(run.count, heads, run.n, 1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    scores = torch.matmul(q.to(dtype), k.to(dtype).transpose(2, 3)).mul_(scale)
    return scores if bias is None else scores.add_(bias)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths_q: Tensor, lengths_k: Tensor, key_size: Tensor | None,
    key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, key_bias in their shapes; [0] where ``needs`` says no."""
    runs, order = plan(tuple(lengths_q.tolist()), tuple(lengths_k.tolist()))
    a = _arguments(q, k, v, key_size, key_bias, prefix_len, order)
    heads, kv_heads = q.shape[1], k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if order is not None:
        grad, out = grad.index_select(0, order.q.to(q.device)), out.index_select(0, order.q.to(q.device))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0) for x, need in zip((q, k, v), needs, strict=False))
    dbias = q.new_empty(heads, k.shape[0], dtype=dtype) if needs[3] else q.new_empty(0, dtype=dtype)
    for run in _chunks(runs, heads):
        qs, ks, vs = _operands(a, run)
        keys = slice(run.k_start, run.k_start + run.count * run.m)
        g, o, l = _view(grad, run.q_start, run.count, run.n), _view(out, run.q_start, run.count, run.n), _lse(lse, run, heads)
        if not needs[3] and _flashes(run, a, causal):
            parts = _flash_backward(g, qs, ks, vs, o, l.squeeze(3), 0.0, causal, scale=scale)
        else:
            g, qs, ks, vs = g.to(dtype), qs.to(dtype), ks.to(dtype), vs.to(dtype)
            p = _scores(qs, ks, _bias(a, run, causal), scale, dtype).sub_(l).exp_()
            part_v = torch.matmul(p.transpose(2, 3), g) if needs[2] else None
            if any(needs[i] for i in (0, 1, 3)):
                ds = torch.matmul(g, vs.transpose(2, 3)).sub_((g * o).sum(3, keepdim=True)).mul_(p)
            if needs[3]:
                dbias[:, keys] = ds.sum(2).transpose(0, 1).flatten(1)
            parts = (torch.matmul(ds, ks).mul_(scale) if needs[0] else None, torch.matmul(ds.transpose(2, 3), qs).mul_(scale) if needs[1] else None, part_v)
        if needs[0]:
            _view(dq, run.q_start, run.count, run.n).copy_(parts[0])
        for target, part, need in ((dk, parts[1], needs[1]), (dv, parts[2], needs[2])):
            if need:
                folded = part if kv_heads == heads else part.unflatten(1, (kv_heads, -1)).sum(2)
                _view(target, run.k_start, run.count, run.m).copy_(folded)
    if order is not None:
        dq, dk, dv = (_restore(x, order[i], need) for x, i, need in zip((dq, dk, dv), (0, 1, 1), needs, strict=False))
        dbias = torch.empty_like(dbias).index_copy_(1, order.k.to(q.device), dbias) if needs[3] else dbias
    if needs[3] and key_bias is not None:
        dbias = (dbias.sum(0) if key_bias.ndim == 1 else dbias).to(key_bias.dtype)
    return dq, dk, dv, dbias


def _restore(x: Tensor, order: Tensor, need: bool) -> Tensor:
    return torch.empty_like(x).index_copy_(0, order.to(x.device), x) if need else x
