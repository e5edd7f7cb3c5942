"""Llip's objective: the image's feature is mixed for each text it is compared with (Lavoie et al. 2024, arXiv:2405.00740)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels import _check, _inputs
from fastvlp_kernels._op import refuse_forward_mode

from .softmax_terms import SHORTEST

NAME = "llip_loss"
LAYOUTS = {"keys": "MKHC", "values": "MKHE", "queries": "NHC", "output_projection": "FD", "text": "ND"}
# Elements of the largest tensor of a tile: few on the CPU, for its caches (2 MiB), many elsewhere, to fill the device.
TILE, DEVICE_TILE = 1 << 19, 1 << 24


def llip_loss(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    text: Tensor,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    *,
    output_projection: Tensor | None = None,
    temperature: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The pairwise sigmoid loss of images that are K mixture tokens each, mixed by attention of the text, for the pairs of this process.

        p_mnhk = softmax over k of <queries_nh, keys_mkh> / temperature
        o_mn = (sum_k p_mnhk values_mkh, heads side by side) @ output_projection
        S_mn = <o_mn / |o_mn|, text_n>

    and the loss is the sum over pairs of softplus(-z_mn (scale * S_mn + bias)), z = 1 for m = n, else -1, over the number of pairs (m, m);
    beyond the shorter side all is negative. One sweep makes the gradients, too, a tile at a time.

    Args:
        keys: [M, K, H, C] and values: [M, K, H, E], mixture tokens; float32, bfloat16 or float16 (float64 on the CPU).
        queries: [N, H, C]. text: [N, D], normalised. output_projection: [H * E, D]; None: D = H * E. scale, bias: numbers, 0-d or [1].
        temperature: positive (1 / C ** 0.5 is not included); to learn it, divide the queries by a tensor.
        compute_dtype: what inputs are rounded to; None: autocast's, else their own. The rest is float32, by
            ``torch.get_float32_matmul_precision()``.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit. RuntimeError: a second derivative is asked for.
    """
    given = {"keys": keys, "values": values, "queries": queries, "output_projection": output_projection, "text": text}
    _check_inputs({name: tensor for name, tensor in given.items() if tensor is not None}, compute_dtype)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{NAME}: temperature is {type(temperature).__name__}; it must be a number (to learn it, divide the queries by it)")
    if not temperature > 0:
        raise ValueError(f"{NAME}: temperature={temperature}; it must be positive")
    dtype = _inputs.product_dtype(NAME, keys, compute_dtype)
    sums = _inputs.sum_dtype(dtype)
    scale, bias = (_inputs.scalar(NAME, name, value, keys, sums) for name, value in (("scale", scale), ("bias", bias)))
    inputs = (keys, values, queries, text, output_projection, scale, bias)
    refuse_forward_mode(NAME, *inputs)
    return _forward(*inputs, float(temperature), dtype, _inputs.needs_grad(*inputs))[0]


def _check_inputs(given: dict[str, Tensor], compute_dtype: torch.dtype | None) -> None:
    """Refuse tensors whose layouts, dtypes or devices do not fit together."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} is {type(tensor).__name__}; it must be a tensor [{', '.join(LAYOUTS[name])}]")
    _check.plain_tensors(NAME, **given)
    sizes: dict[str, int] = {}
    for name, tensor in given.items():
        if name == "output_projection" or (name == "text" and "output_projection" not in given):
            sizes["F" if name == "output_projection" else "D"] = sizes["H"] * sizes["E"]
        layout, shape = f"[{', '.join(LAYOUTS[name])}]", tuple(tensor.shape)
        if tensor.dtype not in _check.FLOATS:
            raise TypeError(f"{NAME}: {name} is {tensor.dtype}; it must be float32, bfloat16 or float16 (or float64 on the CPU)")
        if len(shape) != len(LAYOUTS[name]) or 0 in shape:
            raise ValueError(f"{NAME}: {name} has shape {shape}; it must be {layout}, and nothing empty")
        for symbol, size in zip(LAYOUTS[name], shape, strict=True):
            if sizes.setdefault(symbol, size) != size:
                rule = "F is H * E, and so is D without output_projection"
                raise ValueError(f"{NAME}: {name} has shape {shape}, which is {layout}, but {symbol} = {sizes[symbol]} elsewhere ({rule})")
    dtypes = {tensor.dtype for tensor in given.values()}
    if len(dtypes) > 1 and compute_dtype is None and not torch.is_autocast_enabled(given["keys"].device.type):
        said = ", ".join(f"{name} {str(tensor.dtype)[6:]}" for name, tensor in given.items())
        raise TypeError(f"{NAME}: the dtypes differ ({said}); cast the inputs to one, use autocast, or give compute_dtype")


class _Pairs(NamedTuple):
    """Images [m] and texts [n] of a tile, in the dtype of sums."""

    keys: Tensor  # [m, K, H, C]
    values: Tensor  # [m, K, H, E]
    queries: Tensor  # [n, H, C], divided by the temperature
    text: Tensor  # [n, D]
    projection: Tensor | None  # [H * E, D]


class _Mixed(NamedTuple):
    """What the pairs of a tile are compared by."""

    weights: Tensor  # [H, n, m, K]
    heads: Tensor  # [m, n, H * E]
    features: Tensor  # [m, n, D], of length 1
    length: Tensor  # [m, n], before that
    S: Tensor  # [m, n]


def _mix(pairs: _Pairs) -> _Mixed:
    weights = torch.einsum("nhc,mkhc->hnmk", pairs.queries, pairs.keys).softmax(-1)
    heads = torch.einsum("hnmk,mkhe->mnhe", weights, pairs.values).flatten(2)
    features = heads if pairs.projection is None else heads @ pairs.projection
    length = torch.linalg.vector_norm(features, dim=2).clamp_min(SHORTEST)
    features = features / length[..., None]
    return _Mixed(weights, heads, features, length, torch.einsum("mnd,nd->mn", features, pairs.text))


def _add_gradients(dS: Tensor, pairs: _Pairs, mixed: _Mixed, totals: Sequence[Tensor | None]) -> None:
    """Add to the gradients of keys, values, queries, text and output projection of a tile, where they are wanted, those that dS gives."""
    of_keys, of_values, of_queries, of_text, of_projection = totals
    if of_text is not None:
        of_text += torch.einsum("mn,mnd->nd", dS, mixed.features)
    if of_keys is None and of_values is None and of_queries is None and of_projection is None:
        return
    # A feature has no gradient along itself; what is shorter than SHORTEST was not brought to length 1 but multiplied by a constant.
    along = torch.where(mixed.length > SHORTEST, mixed.S, 0.0)
    grad = (pairs.text - along[..., None] * mixed.features) * (dS / mixed.length)[..., None]
    if pairs.projection is not None:
        if of_projection is not None:
            of_projection += mixed.heads.flatten(0, 1).T @ grad.flatten(0, 1)
        grad = grad @ pairs.projection.T
    grad = grad.unflatten(2, pairs.values.shape[2:])
    if of_values is not None:
        of_values += torch.einsum("hnmk,mnhe->mkhe", mixed.weights, grad)
    if of_keys is None and of_queries is None:
        return
    of_weights = torch.einsum("mnhe,mkhe->hnmk", grad, pairs.values)
    # The softmax's derivative.
    logits = mixed.weights * (of_weights - torch.linalg.vecdot(mixed.weights, of_weights)[..., None])
    if of_keys is not None:
        of_keys += torch.einsum("hnmk,nhc->mkhc", logits, pairs.queries)
    if of_queries is not None:
        of_queries += torch.einsum("hnmk,mkhc->nhc", logits, pairs.keys)


def _tile_sides(keys: Tensor, values: Tensor, text: Tensor) -> tuple[int, int]:
    """Images and texts of a tile: at most a third of each side, so that a tile is never a large part of all pairs."""
    heads = keys.shape[2]
    largest = max(heads * keys.shape[1], heads * values.shape[3], text.shape[1])
    pairs = max(1, (TILE if keys.device.type == "cpu" else DEVICE_TILE) // largest)
    n = min(-(-len(text) // 3), 2 * isqrt(pairs))
    return min(-(-len(keys) // 3), max(1, pairs // n)), n


@torch.library.custom_op("fastvlp::llip_loss", mutates_args=())
def _forward(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    text: Tensor,
    projection: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    temperature: float,
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of the first seven arguments that ``needs`` names, in the dtype of sums; the others have no elements.

    One operator, so that compilation does not unroll its loops.
    """
    sums = _inputs.sum_dtype(dtype)

    def exact(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(sums)

    M, N = len(keys), len(text)
    tile_m, tile_n = _tile_sides(keys, values, text)
    features = zip((keys, values, queries, text, projection), needs[:5], strict=True)
    totals = [None if tensor is None or not need else tensor.new_zeros(tensor.shape, dtype=sums) for tensor, need in features]
    loss, of_scale, of_bias = (scale.new_zeros((), dtype=torch.float64) for _ in range(3))
    factor = 1 / min(M, N)
    with torch.autocast(keys.device.type, enabled=False):
        asked, compared = exact(queries) / temperature, exact(text)
        projected = None if projection is None else exact(projection)
        for i in range(0, M, tile_m):
            rows = slice(i, min(i + tile_m, M))
            images = exact(keys[rows]), exact(values[rows])
            for j in range(0, N, tile_n):
                cols = slice(j, min(j + tile_n, N))
                pairs = _Pairs(*images, asked[cols], compared[cols], projected)
                mixed = _mix(pairs)
                negated = scale * mixed.S + bias  # -z * logits
                # -z * logit: negative pairs as they are, the pair itself turned round. Off the diagonal the view is empty.
                negated.diagonal(i - j).neg_()
                loss -= F.logsigmoid(-negated).sum() * factor
                if not any(needs):
                    continue
                g = torch.sigmoid(negated).mul_(factor)
                g.diagonal(i - j).neg_()
                of_scale += torch.linalg.vecdot(g, mixed.S).sum()
                of_bias += g.sum()
                places = zip(totals, (rows, rows, cols, cols, slice(None)), strict=True)
                _add_gradients(scale * g, pairs, mixed, [None if total is None else total[where] for total, where in places])
        if totals[2] is not None:
            totals[2] /= temperature
    scalars = (total.to(sums) if need else None for total, need in zip((of_scale, of_bias), needs[5:], strict=True))
    of_keys, of_values, of_queries, of_text, of_projection, of_scale, of_bias = (
        scale.new_empty(0, dtype=sums) if total is None else total for total in (*totals, *scalars)
    )
    return loss.to(sums), of_keys, of_values, of_queries, of_text, of_projection, of_scale, of_bias


@_forward.register_fake
def _(keys, values, queries, text, projection, scale, bias, temperature, dtype, needs):
    sums, inputs = _inputs.sum_dtype(dtype), (keys, values, queries, text, projection, scale, bias)
    gradients = (keys.new_empty(tensor.shape if need else 0, dtype=sums) for tensor, need in zip(inputs, needs, strict=True))
    return keys.new_empty((), dtype=sums), *gradients


@torch.library.custom_op("fastvlp::llip_loss_backward", mutates_args=())
def _backward(grad: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [(gradient * grad).to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True)]


@_backward.register_fake
def _(grad, gradients, inputs):
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needed = [i for i, need in enumerate(inputs[9]) if need]
    ctx.save_for_backward(*(output[1 + i] for i in ctx.needed), *(inputs[i] for i in ctx.needed))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * 10
    if grad is not None:
        half = len(ctx.needed)
        for i, scaled in zip(ctx.needed, _backward(grad, ctx.saved_tensors[:half], ctx.saved_tensors[half:]), strict=True):
            result[i] = scaled
    return tuple(result)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(f"{NAME}: second derivatives are not available")


_forward.register_autograd(_scale, setup_context=_setup)
_backward.register_autograd(_refuse)
