"""Packed attention through dense products, on any device: segments of equal lengths are views of one batch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlp_kernels._inputs import sum_dtype

from .runs import Order, Run, plan
from .types import pairs

SCORES = {"cpu": 1 << 19}  # scores held at once: on a CPU what its cache takes
SCORES_ELSEWHERE = 1 << 26
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_softmax_backward = torch.ops.aten._softmax_backward_data.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Inputs(NamedTuple):
    """The inputs in the order of the runs; bias: float32 (or float64) [1 or H, Tk], with the logarithms of the sizes in it."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    prefix_len: Tensor | None
    causal: bool
    scale: float
    seen: Tensor | None
    kind: Tensor | None


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Tensor, lengths_k: Tensor, key_size: Tensor | None, key_bias: Tensor | None,
    prefix_len: Tensor | None, causal: bool, scale: float, with_mass: bool, seen: Tensor | None = None, kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, e], lse [Tq * H] in the order of the runs (where the fused kernel makes and needs it, else 0), mass [Tk] or [0]."""
    runs, order = _plan(q, lengths_q, lengths_k)
    x = _arrange(_Inputs(q, k, v, _bias(key_size, key_bias, k), prefix_len, causal, scale, seen, kind), order)
    outs, lses, masses = [], [], []
    for run in runs:
        fused = _flashes(x, run)
        if with_mass or not fused:
            out, mass = _dense(x, run)
            masses += [mass] if with_mass else []
            lse = out.new_zeros(out.shape[:3], dtype=sum_dtype(q.dtype))
        if fused:
            out, lse = _flash(*_operands(x, run), 0.0, causal, attn_mask=_mask(x, run), scale=scale)
            # The fused kernel turns NaN scores into a log-sum-exp of 0; a NaN must come out as NaN.
            if lse.count_nonzero() < lse.numel() and _may_be_nan(x, run):
                out, _ = _dense(x, run)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.flatten())
    out = _join(outs, q.new_empty(0, q.shape[1], v.shape[2]))
    lse = _join(lses, q.new_empty(0, dtype=sum_dtype(q.dtype)))
    mass = _join(masses, q.new_empty(0, dtype=torch.float32))
    if order is not None:
        out = _scatter(out, order.q)
        mass = _scatter(mass, order.k) if with_mass else mass
    return out, lse, mass


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths_q: Tensor, lengths_k: Tensor, key_size: Tensor | None,
    key_bias: Tensor | None, prefix_len: Tensor | None, causal: bool, scale: float, needs: list[bool], seen: Tensor | None = None,
    kind: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias; [0] where ``needs`` says no."""
    runs, order = _plan(q, lengths_q, lengths_k)
    x = _arrange(_Inputs(q, k, v, _bias(key_size, key_bias, k), prefix_len, causal, scale, seen, kind), order)
    grad = grad.contiguous()
    if order is not None:
        grad, out = grad.index_select(0, order.q), out.index_select(0, order.q)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    parts: tuple[list[Tensor], ...] = ([], [], [], [])
    for run in runs:
        g, o = _view(grad, run.queries, run.batch), _view(out, run.queries, run.batch)
        # The fused backward has no gradient of the mask, which is what a bias is.
        if _flashes(x, run) and not needs[3]:
            log_sums = lse[run.queries.start * heads : run.queries.stop * heads].view(run.batch, heads, run.n)
            grads = _flash_backward(g, *_operands(x, run), o, log_sums, 0.0, causal, attn_mask=_mask(x, run), scale=scale)
        else:
            grads = _dense_backward(g, x, run, needs)
        for index, part in enumerate(grads):
            if not needs[index]:
                continue
            # A key head was repeated for its group of query heads: its gradient is their sum.
            if index in (1, 2) and group > 1:
                part = part.unflatten(1, (-1, group)).sum(2)
            parts[index].append(part.transpose(1, 2).flatten(0, 1) if index < 3 else part)
    dq, dk, dv = (
        _join(part, tensor.new_empty(0, *tensor.shape[1:] if need else ()))
        for part, tensor, need in zip(parts, (q, k, v), needs, strict=False)
    )
    dbias = _join(parts[3], lse.new_empty((0, heads) if needs[3] else 0))
    if order is not None:
        places = (order.q, order.k, order.k, order.k)
        dq, dk, dv, dbias = (_scatter(x, at) if need else x for x, at, need in zip((dq, dk, dv, dbias), places, needs, strict=True))
    if key_bias is not None and needs[3]:
        dbias = (dbias.sum(1) if key_bias.ndim == 1 else dbias.t().contiguous()).to(key_bias.dtype)
    return dq, dk, dv, dbias


def _plan(q: Tensor, lengths_q: Tensor, lengths_k: Tensor) -> tuple[tuple[Run, ...], Order | None]:
    counts = tuple(lengths_q.tolist())
    runs, order = plan(counts, counts if lengths_k is lengths_q else tuple(lengths_k.tolist()))
    return runs, order if order is None else Order(*(index.to(q.device) for index in order))


def _bias(key_size: Tensor | None, key_bias: Tensor | None, k: Tensor) -> Tensor | None:
    bias = None if key_bias is None else torch.atleast_2d(key_bias.to(sum_dtype(k.dtype)))
    if key_size is None:
        return bias
    # A token of size n counts as n equal keys: exp(score + log n).
    log_size = key_size.to(sum_dtype(k.dtype)).log()[None]
    return log_size if bias is None else bias + log_size


def _arrange(x: _Inputs, order: Order | None) -> _Inputs:
    if order is None:
        return x
    return x._replace(
        q=x.q.index_select(0, order.q), k=x.k.index_select(0, order.k), v=x.v.index_select(0, order.k),
        bias=None if x.bias is None else x.bias.index_select(1, order.k),
        prefix_len=None if x.prefix_len is None else x.prefix_len.index_select(0, order.segments),
        seen=None if x.seen is None else x.seen.index_select(0, order.q),
        kind=None if x.kind is None else x.kind.index_select(0, order.k),
    )


def _scatter(x: Tensor, index: Tensor) -> Tensor:
    # Nothing stays unwritten, since the order is a permutation.
    return torch.empty_like(x).index_copy_(0, index, x)


def _join(parts: list[Tensor], nothing: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else nothing


def _view(x: Tensor, tokens: slice, count: int) -> Tensor:
    """[batch, H, n, d] of the segments in ``tokens``."""
    n, (row, head, feature) = (tokens.stop - tokens.start) // count, x.stride()
    return x.as_strided((count, x.shape[1], n, x.shape[2]), (n * row, head, row, feature), x.storage_offset() + tokens.start * row)


def _operands(x: _Inputs, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """q [batch, H, n, d], k and v [batch, H, m, d]: a key head is repeated for its group of query heads."""
    # Views by strides: segments of one length lie one behind the other, and nothing is copied.
    q, k, v = _view(x.q, run.queries, run.batch), _view(x.k, run.keys, run.batch), _view(x.v, run.keys, run.batch)
    group = q.shape[1] // k.shape[1]
    return (q, k, v) if group == 1 else (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _flashes(x: _Inputs, run: Run) -> bool:
    """Whether PyTorch's fused attention for CPUs computes this run.

    It knows no types, aligns causality at the start, takes no bias beside it, and hides keys before it scales their scores, where a scale
    of 0 or less would show them again.
    """
    masked = x.seen is not None or (x.causal and (x.prefix_len is not None or run.n != run.m or x.bias is not None or x.scale <= 0))
    biased = x.bias is not None and x.bias.dtype != x.q.dtype
    dense_rows = all(t.stride(2) == 1 for t in (x.q, x.k, x.v))
    return not (masked or biased) and dense_rows and x.q.device.type == "cpu" and min(run.n, run.m) > 0 and x.q.shape[2] == x.v.shape[2]


def _may_be_nan(x: _Inputs, run: Run) -> bool:
    """Whether scores of a run can be NaN: no product exceeds that of the norms.

    The fused attention takes a short row of nothing but NaN for one that sees no key: out and lse are 0.
    """
    q, k = (torch.linalg.vector_norm(t, dtype=sum_dtype(t.dtype)) for t in (x.q[run.queries], x.k[run.keys]))
    bound = q * k * x.scale
    return not bool((bound if x.bias is None else bound + x.bias[:, run.keys].exp().sum()).isfinite())


def _mask(x: _Inputs, run: Run) -> Tensor | None:
    """The bias of a run as the fused attention takes it: [batch, 1 or H, n, m], one row for all queries."""
    if x.bias is None:
        return None
    return x.bias[:, run.keys].unflatten(1, (run.batch, run.m)).transpose(0, 1)[:, :, None].expand(-1, -1, run.n, -1)


def _pieces(run: Run, heads: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """(segments, rows) of a run whose scores fit the cache."""
    if run.n == 0 or run.m == 0:
        return
    limit = SCORES.get(device.type, SCORES_ELSEWHERE)
    # Whole segments while they fit, else rows of one: the products read scores again before they leave the cache.
    segments = max(1, limit // (heads * run.n * run.m))
    rows = run.n if segments > 1 else min(run.n, max(1, limit // (heads * run.m)))
    for first in range(0, run.batch, segments):
        for row in range(0, run.n, rows):
            yield slice(first, min(first + segments, run.batch)), slice(row, min(row + rows, run.n))


def _probabilities(q: Tensor, k: Tensor, x: _Inputs, run: Run, segments: slice, rows: slice) -> Tensor:
    """softmax(scale * q k^T + bias) for some segments and rows of a run: [segments, H, rows, m]; 0 for a query that sees no key."""
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(x.scale)
    if x.bias is not None:
        scores += x.bias[:, run.keys].unflatten(1, (run.batch, run.m))[:, segments].transpose(0, 1)[:, :, None]
    if x.causal:
        # Aligned at the end: the last query sees all keys.
        place = torch.arange(run.m, device=q.device)
        hidden = place > torch.arange(rows.start, rows.stop, device=q.device)[:, None] + (run.m - run.n)
        if x.prefix_len is not None:
            first = run.segment + segments.start
            hidden = hidden & (place >= x.prefix_len[first : first + scores.shape[0], None, None, None])
        scores.masked_fill_(hidden, -torch.inf)
    if x.seen is not None and x.kind is not None:
        queries, keys = x.seen[run.queries].view(run.batch, run.n), x.kind[run.keys].view(run.batch, run.m)
        scores.masked_fill_(~pairs(queries[segments, rows], keys[segments])[:, None], -torch.inf)
    probabilities = torch.softmax(scores, 3)
    if x.bias is not None or x.seen is not None or (x.causal and run.m < run.n):
        # A softmax over nothing is NaN; a query without keys gives 0.
        probabilities.masked_fill_(torch.isneginf(scores).all(3, keepdim=True), 0)
    return probabilities


def _dense(x: _Inputs, run: Run) -> tuple[Tensor, Tensor]:
    """out [batch, H, n, e] with the memory of [batch, n, H, e]; mass [batch * m]."""
    out = x.q.new_zeros(run.batch, run.n, x.q.shape[1], x.v.shape[2]).transpose(1, 2)
    mass = x.q.new_zeros(run.batch, run.m, dtype=torch.float32)
    operands = _operands(x, run)
    for segments, rows in _pieces(run, out.shape[1], out.device):
        q, k, v = _batch(operands, x.q.dtype, segments, rows)
        p = _probabilities(q, k, x, run, segments, rows)
        out[segments, :, rows] = torch.matmul(p, v).to(out.dtype)
        mass[segments] += p.sum((1, 2))
    return out, mass.flatten()


def _dense_backward(grad: Tensor, x: _Inputs, run: Run, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq [batch, H, n, d], dk and dv [batch, H, m, d] with the memory of [batch, tokens, H, d]; dbias [batch * m, H]."""
    dtype, heads = sum_dtype(x.q.dtype), x.q.shape[1]
    operands = _operands(x, run)
    dq, dk, dv = (torch.zeros_like(t.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2) for t in operands)
    dbias = x.q.new_zeros(run.batch, run.m, heads, dtype=dtype)
    for segments, rows in _pieces(run, heads, grad.device):
        q, k, v = _batch(operands, x.q.dtype, segments, rows)
        g = grad[segments, :, rows].to(dtype).contiguous()
        p = _probabilities(q, k, x, run, segments, rows)
        if needs[2]:
            dv[segments] += torch.matmul(p.transpose(2, 3), g)
        if not (needs[0] or needs[1] or needs[3]):
            continue
        # Through p * (dp - sum(p * dp)), a query that sees one key has exactly no gradient.
        ds = _softmax_backward(torch.matmul(g, v.transpose(2, 3)), p, 3, dtype)
        if needs[3]:
            dbias[segments] += ds.sum(2).transpose(1, 2)
        ds.mul_(x.scale)
        if needs[0]:
            dq[segments, :, rows] = torch.matmul(ds, k)
        if needs[1]:
            dk[segments] += torch.matmul(ds.transpose(2, 3), q)
    return dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), dbias.flatten(0, 1)


def _batch(operands: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, segments: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of one piece in the dtype of sums, each one batch of matrices."""
    q, k, v = operands
    q, k, v = (t.to(sum_dtype(dtype)).contiguous() for t in (q[segments, :, rows], k[segments], v[segments]))
    return q, k, v
