"""linear_cross_entropy on GPUs: tiles of logits live in registers, without atomics.

Forward, one product: a program walks over its share of the classes for a block of rows and keeps their largest logit and sums; the shares
are merged. Backward, three products: a wave of columns of the logits' gradient is computed again into a workspace in the dtype of the
operands, then multiplied with the weights and, transposed, with x.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._product import multiply
from .._triton import dot_tile, grouped_tile, operand, precision, processors, upcast
from .rows import Inputs, Rows, coefficients

# The workspace of the backward; within it one wave is all, so that a small gradient fills the device.
WORKSPACE_BYTES = 128 << 20


def config(dtype: torch.dtype, T: int, V: int, device: torch.device) -> dict[str, int]:
    """Block sizes and launch options; smaller tiles where large ones would leave processors idle."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    if triton.cdiv(T, 128) * triton.cdiv(V, 128) < processors(device):
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _logits(
    x_ptr, stride_x, weight_ptr, stride_weight, bias_ptr, first_m, first_n, T, V, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of logits and which of its columns are classes; what is beyond T and V is no logit."""
    S = dot_tile(x_ptr, stride_x, weight_ptr, stride_weight, first_m, first_n, T, V, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    t_n = tl.arange(0, BLOCK_N)
    in_col = t_n < tl.minimum(V - first_n, BLOCK_N).to(tl.int32)
    if bias_ptr is not None:
        S += tl.load(bias_ptr + first_n + t_n, mask=in_col, other=0.0)[None, :]
    return S, in_col


@triton.jit(do_not_specialize=["T", "V", "tiles_of_share"])
def _forward_kernel(
    x_ptr, stride_x, weight_ptr, stride_weight, bias_ptr, targets_ptr, peak_ptr, others_ptr, target_ptr,
    T, V, D, tiles_of_share, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a block of rows and one share of the classes: the largest logit, the sum of exp(logit - it) but for the target's, and the
    target's logit, [shares, T] each."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    share = tl.program_id(1)
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = tl.minimum(first_m + t_m, T - 1)
    b_class = tl.load(targets_ptr + rows)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    target = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    others = tl.zeros((BLOCK_M,), tl.float32)
    start = share.to(tl.int64) * tiles_of_share * BLOCK_N
    first_n = start
    for _ in range(0, tl.cdiv(tl.minimum(V - start, tiles_of_share * BLOCK_N), BLOCK_N)):
        S, in_col = _logits(
            x_ptr, stride_x, weight_ptr, stride_weight, bias_ptr, first_m, first_n, T, V, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
        )
        S = tl.where(in_col[None, :], S, -float("inf"))
        place = tl.maximum(tl.minimum(b_class - first_n, BLOCK_N), -1).to(tl.int32)
        hit = place[:, None] == t_n[None, :]
        target = tl.maximum(target, tl.max(tl.where(hit, S, -float("inf")), 1))
        highest = tl.maximum(peak, tl.max(S, 1))
        reference = tl.where(highest == -float("inf"), 0.0, highest)
        E = tl.where(hit, 0.0, tl.exp(S - reference[:, None]))
        others = others * tl.exp(peak - reference) + tl.sum(E, 1)
        peak = highest
        first_n += BLOCK_N
    out = share.to(tl.int64) * T + first_m + t_m
    inside = first_m + t_m < T
    tl.store(peak_ptr + out, peak, mask=inside)
    tl.store(others_ptr + out, others, mask=inside)
    tl.store(target_ptr + out, target, mask=inside)


@triton.jit(do_not_specialize=["T", "V"])
def _gradient_kernel(
    x_ptr, stride_x, weight_ptr, stride_weight, bias_ptr, targets_ptr, peak_ptr, factor_ptr, uniform_ptr, at_target_ptr,
    G_ptr, sums_ptr, T, V, D, first_class, stride_G, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of G [in whole tiles], the gradient of the logits of V classes from ``first_class``, and its sums by class [tiles, V]."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(V, BLOCK_N), GROUP)
    first_m, first_n = i_m.to(tl.int64) * BLOCK_M, i_n.to(tl.int64) * BLOCK_N
    t_m, t_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = tl.minimum(first_m + t_m, T - 1)
    S, in_col = _logits(
        x_ptr, stride_x, weight_ptr, stride_weight, bias_ptr, first_m, first_n, T, V, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
    )
    place = tl.maximum(tl.minimum(tl.load(targets_ptr + rows) - first_class - first_n, BLOCK_N), -1).to(tl.int32)
    dS = tl.exp(S - tl.load(peak_ptr + rows)[:, None]) * tl.load(factor_ptr + rows)[:, None]
    if uniform_ptr is not None:
        dS -= tl.load(uniform_ptr + rows)[:, None]
    dS = tl.where(place[:, None] == t_n[None, :], tl.load(at_target_ptr + rows)[:, None], dS)
    in_row = t_m < tl.minimum(T - first_m, BLOCK_M).to(tl.int32)
    dS = tl.where(in_row[:, None] & in_col[None, :], dS, 0.0)
    if sums_ptr is not None:
        tl.store(sums_ptr + i_m.to(tl.int64) * V + first_n + t_n, tl.sum(dS, 0), mask=in_col)
    if G_ptr is not None:
        tl.store(G_ptr + (first_m + t_m)[:, None] * stride_G + (first_n + t_n)[None, :], dS.to(G_ptr.dtype.element_ty))


def forward(a: Inputs) -> Rows:
    """Statistics of the rows, [T] float32."""
    T, V = a.x.shape[0], a.weight.shape[0]
    x, weight = operand(a.x, a.dtype), operand(a.weight, a.dtype)
    options = config(a.dtype, T, V, x.device)
    tiles_m, tiles_n = triton.cdiv(T, options["BLOCK_M"]), triton.cdiv(V, options["BLOCK_N"])
    # Two programs for every processor, where there is work for them.
    tiles_of_share = triton.cdiv(tiles_n, min(tiles_n, triton.cdiv(2 * processors(x.device), max(tiles_m, 1))))
    shares = triton.cdiv(tiles_n, tiles_of_share)
    peak, others, target = (x.new_empty(shares, T, dtype=torch.float32) for _ in range(3))
    if T:
        with torch.cuda.device_of(x):
            _forward_kernel[(tiles_m, shares)](
                x, x.stride(0), weight, weight.stride(0), None if a.bias is None else a.bias.float().contiguous(),
                a.targets.contiguous(), peak, others, target, T, V, x.shape[1], tiles_of_share,
                PRECISION=precision(), UPCAST=upcast(), **options,
            )  # fmt: skip
    highest = peak.amax(0)
    reference = highest.masked_fill(highest == -torch.inf, 0.0)
    others = (others * (peak - reference).exp()).sum(0)
    mean = peak.new_empty(0)
    if a.label_smoothing:
        # The mean of logits is the logit of the mean, which costs no registers.
        mean = torch.mv(x.float(), weight.mean(0, dtype=torch.float32)) - reference
        mean = mean if a.bias is None else mean + a.bias.float().mean()
    return Rows(highest, others, target.amax(0) - reference, mean)


def backward(a: Inputs, grad: Tensor, rows: Rows, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in their dtypes, given that of the losses [T]; what ``needs`` leaves out has 0 elements."""
    need_x, need_weight, need_bias = needs
    (T, D), V = a.x.shape, a.weight.shape[0]
    x, weight = operand(a.x, a.dtype), operand(a.weight, a.dtype)
    options = {**config(a.dtype, T, V, x.device), "GROUP": 8}
    bias = None if a.bias is None else a.bias.float().contiguous()
    targets = a.targets.contiguous()
    # The largest coefficient is brought near one, in float16 to 4096, before it is rounded; the products undo that.
    vectors = coefficients(rows, a, grad)
    norm = torch.stack([v.abs().amax() if T else v.new_zeros(()) for v in (grad, vectors[2])]).amax()
    norm = torch.where(norm > 0, norm, 1.0) / (4096.0 if a.dtype == torch.float16 else 1.0)
    factor, uniform, at_target = (v / norm for v in vectors)

    new = torch.zeros if T == 0 else torch.empty
    dx = new((T, D) if need_x else 0, dtype=a.x.dtype, device=x.device)
    dweight = new((V, D) if need_weight else 0, dtype=a.weight.dtype, device=x.device)
    dbias = torch.zeros(V if need_bias else 0, dtype=torch.float32, device=x.device)
    if T == 0:
        return dx, dweight, dbias
    tall = triton.cdiv(T, 128) * 128
    wave = min(max(WORKSPACE_BYTES // (tall * x.element_size()) // 128, 1), triton.cdiv(V, 128)) * 128
    total = x.new_empty(T, D, dtype=torch.float32) if need_x and wave < V else None
    G = x.new_empty((tall, wave) if need_x or need_weight else (0, 0))
    tiles_m = triton.cdiv(T, options["BLOCK_M"])
    with torch.cuda.device_of(x):
        for i in range(0, V, wave):
            classes = slice(i, min(i + wave, V))
            n = classes.stop - i
            sums = x.new_empty(tiles_m, n, dtype=torch.float32) if need_bias else None
            _gradient_kernel[(tiles_m * triton.cdiv(n, options["BLOCK_N"]),)](
                x, x.stride(0), weight[classes], weight.stride(0), None if bias is None else bias[classes], targets,
                rows.peak, factor, uniform if a.label_smoothing else None, at_target, G if G.numel() else None, sums,
                T, n, x.shape[1], i, wave, PRECISION=precision(), UPCAST=upcast(), **options,
            )  # fmt: skip
            if sums is not None:
                torch.mul(sums.sum(0), norm, out=dbias[classes])
            if need_x:
                multiply(G[:T, :n], weight[classes], norm, dx, total, first=i == 0, last=classes.stop == V)
            if need_weight:
                multiply(G[:T, :n].T, x, norm, dweight[classes])
    return dx, dweight, dbias
