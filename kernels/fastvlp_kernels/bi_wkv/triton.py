"""bi_wkv on GPUs: a program per segment, head and direction walks the chunks and leaves the state before each; then every chunk is a
program of its own. See ``cpu`` for the arithmetic.

Segment s has the chunk slots from cu_seqlens[s] // CHUNK + s on, so that no list of chunks is made and nothing is asked of the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import precision, span, upcast
from .cpu import LARGEST

RATE = tl.constexpr(LARGEST)


def config(dtype: torch.dtype, K: int, V: int) -> dict[str, int]:
    """Tokens of a chunk, block sizes and launch options for heads of widths K and V."""
    k, v = (max(16, triton.next_power_of_2(width)) for width in (K, V))
    half = dtype == torch.bfloat16
    return {"CHUNK": 32 if half else 16, "BLOCK_K": min(k, 64 if half else 32), "BLOCK_V": v, "num_warps": 8, "num_stages": 1}


@triton.jit
def _load(x_ptr, tokens, end, head, H, width, cols):
    """[tokens, cols] of one head of x [T, H, width]; 0 from token ``end`` and column ``width`` on."""
    at = (tokens * H + head)[:, None] * width + cols[None, :]
    return tl.load(x_ptr + at, mask=(tokens < end)[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def _store(x_ptr, values, tokens, end, head, H, width, cols):
    at = (tokens * H + head)[:, None] * width + cols[None, :]
    tl.store(x_ptr + at, values.to(x_ptr.dtype.element_ty), mask=(tokens < end)[:, None] & (cols < width)[None, :])


@triton.jit
def _rate(w_ptr, tokens, end, head, H, K, cols):
    """exp(w), float32 [tokens, cols], 0 where there is none."""
    # Bounded, since an infinite rate times a 0 among the members would be NaN.
    rate = tl.minimum(tl.exp(_load(w_ptr, tokens, end, head, H, K, cols).to(tl.float32)), RATE)
    # What was not loaded is a w of 0, whose rate would be 1.
    return tl.where((tokens < end)[:, None] & (cols < K)[None, :], rate, 0.0)


@triton.jit
def _dot(a, b, DTYPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b of operands rounded to DTYPE, in float32."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _sum(members, x, PRECISION: tl.constexpr):
    """members @ x of a matrix of ones and zeros, which tf32 holds exactly."""
    return tl.dot(members.to(tl.float32), x, input_precision=PRECISION)


@triton.jit
def _halves(level, CHUNK: tl.constexpr):
    """members [i, j]: token j is between i and the middle of its block of 2 << level; pairs [i, j]: the middle is between i and j."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    middle = ((i >> level) | 1) << level
    members = ((i < j) & (j < middle)) | ((middle <= j) & (j < i))
    return members, ((i >> level) ^ (j >> level)) == 1


@triton.jit
def _chunk(cu_ptr, S, T, CHUNK: tl.constexpr):
    """The tokens of this program's chunk slot and where its segment ends; no token lies before that if the slot is not used."""
    slot = tl.program_id(0)
    low, high, bits = 0, S, S
    while bits > 0:
        middle = (low + high) // 2
        after = tl.load(cu_ptr + middle).to(tl.int32) // CHUNK + middle > slot
        high = tl.where(after, middle, high)
        low = tl.where(after, low, middle)
        bits = bits // 2
    start = tl.load(cu_ptr + low).to(tl.int64)
    first = (slot - low - start.to(tl.int32) // CHUNK) * CHUNK
    return start + first + tl.arange(0, CHUNK), tl.minimum(tl.load(cu_ptr + low + 1).to(tl.int64), T)


@triton.jit
def _state(states_ptr, slot, side, head, H, K, V, rows, cols):
    """Where the state of a slot is, [rows, cols] of [K, V], that comes from the left (side 0) or right (1); and which of it there is."""
    at = ((slot * 2 + side) * H + head) * K * V
    return states_ptr + at + rows[:, None] * V + cols[None, :], (rows < K)[:, None] & (cols < V)[None, :]


@triton.jit(do_not_specialize=["T"])
def _states_kernel(
    k_ptr, v_ptr, w_ptr, cu_ptr, states_ptr, T, H, K, V,
    DTYPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """states [slots, 2, H, K, V]: sum of k_s v_s decayed up to the chunk, over the tokens s before it, and over those after it."""
    # Only states depend on the chunk before; products inside chunks run afterwards, all at once.
    segment, head, side = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    start, n = span(cu_ptr, segment, T)
    start = start.to(tl.int64)
    end, chunks = start + n, tl.cdiv(n, CHUNK)
    cols_k, cols_v = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    # A token decays by what lies between it and the end of its chunk, in the direction of the walk.
    members = tl.where(side == 0, j > i, j < i)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for step in range(0, chunks):
        chunk = tl.where(side == 0, step, chunks - 1 - step)
        at, inside = _state(states_ptr, start // CHUNK + segment + chunk, side, head, H, K, V, cols_k, cols_v)
        tl.store(at, state.to(states_ptr.dtype.element_ty), mask=inside)
        tokens = start + chunk * CHUNK + tl.arange(0, CHUNK)
        rate = _rate(w_ptr, tokens, end, head, H, K, cols_k)
        k = _load(k_ptr, tokens, end, head, H, K, cols_k).to(tl.float32) * tl.exp(-_sum(members, rate, PRECISION))
        v = _load(v_ptr, tokens, end, head, H, V, cols_v)
        state = state * tl.exp(-tl.sum(rate, 0))[:, None] + _dot(tl.trans(k), v, DTYPE, UPCAST, PRECISION)


@triton.jit(do_not_specialize=["S", "T"])
def _forward_kernel(
    r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, cu_ptr, states_ptr, out_ptr, S, T, H, K, V, scale,
    DTYPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens, end = _chunk(cu_ptr, S, T, CHUNK)
    # There are as many slots as there could be chunks; some are not used.
    if tl.min(tokens, 0) >= end:
        return
    i, j, cols_v = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :], tl.arange(0, BLOCK_V)
    A, y = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for first in range(0, K, BLOCK_K):
        cols_k = first + tl.arange(0, BLOCK_K)
        r = _load(r_ptr, tokens, end, head, H, K, cols_k)
        k = _load(k_ptr, tokens, end, head, H, K, cols_k)
        rate = _rate(w_ptr, tokens, end, head, H, K, cols_k)
        u = tl.load(u_ptr + head * K + cols_k, mask=cols_k < K, other=0.0).to(tl.float32)
        A += tl.where(i == j, tl.sum(r.to(tl.float32) * u[None, :] * k, 1)[:, None], 0.0)
        for level in range(LEVELS):
            members, pairs = _halves(level, CHUNK)
            factor = tl.exp(-_sum(members, rate, PRECISION))
            A += tl.where(pairs, _dot(r * factor, tl.trans(k * factor), DTYPE, UPCAST, PRECISION), 0.0)
        for side in range(2):
            members = tl.where(side == 0, j < i, j > i)
            at, inside = _state(states_ptr, slot, side, head, H, K, V, cols_k, cols_v)
            state = tl.load(at, mask=inside, other=0.0)
            y += _dot(r * tl.exp(-_sum(members, rate, PRECISION)), state, DTYPE, UPCAST, PRECISION)
    y += _dot(A, _load(v_ptr, tokens, end, head, H, V, cols_v), DTYPE, UPCAST, PRECISION)
    _store(out_ptr, scale * y, tokens, end, head, H, V, cols_v)


@triton.jit(do_not_specialize=["S", "T"])
def _backward_kernel(
    grad_ptr, r_ptr, k_ptr, v_ptr, w_ptr, u_ptr, cu_ptr, states_ptr, adjoint_ptr, dr_ptr, dk_ptr, dw_ptr, du_ptr, S, T, H, K, V,
    DTYPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """du [slots, H, K] is that of the chunk; the other gradients are whole. adjoint: the states of (r, dy), which are the gradients of
    those of (k, v), each of the other direction's."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens, end = _chunk(cu_ptr, S, T, CHUNK)
    if tl.min(tokens, 0) >= end:
        return
    cols_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    r = _load(r_ptr, tokens, end, head, H, K, cols_k)
    k = _load(k_ptr, tokens, end, head, H, K, cols_k)
    rate = _rate(w_ptr, tokens, end, head, H, K, cols_k)
    dr, dk = tl.zeros((CHUNK, BLOCK_K), tl.float32), tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dlog = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    for side in range(2):
        # What passes on the left of a token (0) is decayed by those before it, and on the right (1) by those after it.
        factor = tl.exp(-_sum(tl.where(side == 0, j < i, j > i), rate, PRECISION))
        to_r, to_k = tl.zeros((CHUNK, BLOCK_K), tl.float32), tl.zeros((CHUNK, BLOCK_K), tl.float32)
        through = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, V, BLOCK_V):
            cols_v = first + tl.arange(0, BLOCK_V)
            if states_ptr is not None:
                at, inside = _state(states_ptr, slot, side, head, H, K, V, cols_k, cols_v)
                state = tl.load(at, mask=inside, other=0.0)
                dy = _load(grad_ptr, tokens, end, head, H, V, cols_v)
                to_r += _dot(dy, tl.trans(state), DTYPE, UPCAST, PRECISION)
            if adjoint_ptr is not None:
                at, inside = _state(adjoint_ptr, slot, side, head, H, K, V, cols_k, cols_v)
                v = _load(v_ptr, tokens, end, head, H, V, cols_v)
                to_k += _dot(v, tl.trans(tl.load(at, mask=inside, other=0.0)), DTYPE, UPCAST, PRECISION)
            if dw_ptr is not None:
                at, inside = _state(adjoint_ptr, slot, 1 - side, head, H, K, V, cols_k, cols_v)
                through += tl.sum(state.to(tl.float32) * tl.load(at, mask=inside, other=0.0), 1)
        to_r, to_k = factor * to_r, factor * to_k
        dr += to_r
        dk += to_k
        if dw_ptr is not None:
            # By the transposed matrix token i adds to the decays that it is decayed by.
            dlog += _sum(tl.where(side == 0, j > i, j < i), r * to_r + k * to_k, PRECISION)
            dlog += (tl.exp(-tl.sum(rate, 0)) * through)[None, :]
    dA = tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, V, BLOCK_V):
        cols_v = first + tl.arange(0, BLOCK_V)
        v = _load(v_ptr, tokens, end, head, H, V, cols_v)
        dA += _dot(_load(grad_ptr, tokens, end, head, H, V, cols_v), tl.trans(v), DTYPE, UPCAST, PRECISION)
    for level in range(LEVELS):
        members, pairs = _halves(level, CHUNK)
        factor = tl.exp(-_sum(members, rate, PRECISION))
        across = tl.where(pairs, dA, 0.0)
        to_r = factor * _dot(across, k * factor, DTYPE, UPCAST, PRECISION)
        to_k = factor * _dot(tl.trans(across), r * factor, DTYPE, UPCAST, PRECISION)
        if dw_ptr is not None:
            dlog += _sum(tl.trans(members.to(tl.float32)), r * to_r + k * to_k, PRECISION)
        dr += to_r
        dk += to_k
    u = tl.load(u_ptr + head * K + cols_k, mask=cols_k < K, other=0.0).to(tl.float32)
    diagonal = tl.sum(tl.where(i == j, dA, 0.0), 1)[:, None]
    if du_ptr is not None:
        tl.store(du_ptr + (slot * H + head) * K + cols_k, tl.sum(diagonal * r * k, 0), mask=cols_k < K)
    if dr_ptr is not None:
        _store(dr_ptr, dr + diagonal * u[None, :] * k, tokens, end, head, H, K, cols_k)
    if dk_ptr is not None:
        _store(dk_ptr, dk + diagonal * u[None, :] * r, tokens, end, head, H, K, cols_k)
    if dw_ptr is not None:
        _store(dw_ptr, -rate * dlog, tokens, end, head, H, K, cols_k)


def _options(v: Tensor, K: int) -> dict[str, Any]:
    half = v.dtype == torch.bfloat16
    # float16 states could overflow: float16 is computed as float32. "ieee" products run on no tensor core; three of tf32 are as exact.
    exact = not half and precision() == "ieee"
    options = config(v.dtype, K, v.shape[2])
    return options | {"DTYPE": tl.bfloat16 if half else tl.float32, "UPCAST": upcast(), "PRECISION": "tf32x3" if exact else "tf32"}


def _states(k: Tensor, v: Tensor, w: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[slots, 2, H, K, V]; what slots without a chunk hold is undefined."""
    (T, H, K), V, S, options = k.shape, v.shape[2], cu_seqlens.shape[0] - 1, _options(v, k.shape[2])
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    states = torch.empty(T // options["CHUNK"] + S, 2, H, K, V, dtype=dtype, device=v.device)
    _states_kernel[(S * H, 2, triton.cdiv(K, options["BLOCK_K"]))](k, v, w, cu_seqlens, states, T, H, K, V, **options)
    return states


def _new(like: Tensor, whole: bool) -> Tensor:
    """For results of which kernels write the tokens of segments: zeros unless these are known to be all."""
    return torch.empty_like(like) if whole else torch.zeros_like(like)


def _outputs(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor, whole: bool, states: Tensor, scale: float
) -> Tensor:
    (T, H, K), V, options, out = k.shape, v.shape[2], _options(v, k.shape[2]), _new(v, whole)
    levels = options["CHUNK"].bit_length() - 1
    _forward_kernel[(len(states), H)](
        r, k, v, w, u, cu_seqlens, states, out, len(cu_seqlens) - 1, T, H, K, V, scale, LEVELS=levels, **options
    )
    return out


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor, whole: bool, scale: float) -> Tensor:
    """out [T, H, V]. ``whole``: cu_seqlens is known to end at T."""
    r, k, v, w, u = (x.contiguous() for x in (r, k, v, w, u))
    if not len(v):
        return torch.empty_like(v)
    with torch.cuda.device_of(v):
        return _outputs(r, k, v, w, u, cu_seqlens, whole, _states(k, v, w, cu_seqlens), scale)


def backward(
    grad: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor, whole: bool, scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w and u; [0] where ``needs`` says no."""
    r, k, v, w, u, grad = (x.contiguous() for x in (r, k, v, w, u, grad if scale == 1 else grad * scale))
    (T, H, K), S, options = k.shape, len(cu_seqlens) - 1, _options(v, k.shape[2])
    dr, dk, dv, dw, du = (_new(x, whole) if need else x.new_empty(0) for x, need in zip((r, k, v, w, u), needs, strict=True))
    slots = T // options["CHUNK"] + S
    # Slots without a chunk add nothing.
    parts = torch.zeros(slots if needs[4] else 0, H, K, dtype=torch.float32, device=u.device)
    if T:
        outputs = [x if need else None for x, need in zip((dr, dk, dw, parts), (*needs[:2], *needs[3:]), strict=True)]
        with torch.cuda.device_of(v):
            states = _states(k, v, w, cu_seqlens) if needs[0] or needs[3] else None
            adjoint = _states(r, grad, w, cu_seqlens) if needs[1] or needs[2] or needs[3] else None
            if needs[2] and adjoint is not None:
                dv = _outputs(k, r, grad, w, u, cu_seqlens, whole, adjoint, 1.0)
            if any(output is not None for output in outputs):
                levels = options["CHUNK"].bit_length() - 1
                options["BLOCK_V"] = min(options["BLOCK_V"], 64 if options["PRECISION"] == "tf32" else 32)
                _backward_kernel[(slots, H, triton.cdiv(K, options["BLOCK_K"]))](
                    grad, r, k, v, w, u, cu_seqlens, states, adjoint, *outputs, S, T, H, K, v.shape[2], LEVELS=levels, **options
                )
    return dr, dk, dv, dw, parts.sum(0).to(u.dtype) if needs[4] else du
