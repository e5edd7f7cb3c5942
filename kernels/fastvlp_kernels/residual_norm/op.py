"""``residual_norm``: what a block adds to its tokens, and the norm that its next layer reads, in one pass over memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check, _op
from .._inputs import sum_dtype
from . import reference
from .arguments import Inputs, Needs, Saved

OP = "residual_norm"
IMPLEMENTATIONS = ("triton", "cpu", "reference")
KINDS = ("layer", "rms")
# The sums of wider tokens do not fit into the registers of a Triton program.
WIDEST_TRITON = 8192


def _forward(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _op.module(__package__, impl).forward(Inputs(x, branch, gamma, weight, bias, eps, rms, dtype))


_residual_norm = _op.custom_op(OP)(_forward)


@_residual_norm.register_fake
def _(x, branch, gamma, weight, bias, eps, rms, dtype, impl):
    total = torch.promote_types(x.dtype, branch.dtype)
    statistics = (x.new_empty(n, dtype=sum_dtype(total)) for n in (0 if rms else x.shape[0], x.shape[0]))
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=total), *statistics


def _gradients(
    grad: Tensor | None, grad_total: Tensor | None, branch: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor | None,
    total: Tensor, mean: Tensor, rstd: Tensor, x_dtype: torch.dtype, branch_dtype: torch.dtype, rms: bool, impl: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    a = Saved(branch, gamma, weight, bias, total, mean, rstd, x_dtype, branch_dtype, rms)
    # A caller may use total alone; out then has no gradient, as materialising is off.
    grad = torch.zeros_like(total) if grad is None else grad
    dx, dbranch, *vectors = _op.module(__package__, impl).backward(a, grad, grad_total, Needs(*needs))
    dgamma, dweight, dbias = (d if v is None else d.to(v.dtype) for d, v in zip(vectors, (gamma, weight, bias), strict=True))
    return dx, dbranch, dgamma, dweight, dbias


_residual_norm_backward = _op.custom_op(f"{OP}_backward")(_gradients)


@_residual_norm_backward.register_fake
def _(grad, grad_total, branch, gamma, weight, bias, total, mean, rstd, x_dtype, branch_dtype, rms, impl, needs):
    shared = gamma is None and x_dtype == branch_dtype
    wanted = (needs[0] or (needs[1] and shared), needs[1] and not shared, *needs[2:])
    dtypes = (x_dtype, branch_dtype, *((rstd if v is None else v).dtype for v in (gamma, weight, bias)))
    shapes = (*[total.shape] * 2, *[total.shape[1:]] * 3)
    return tuple(total.new_empty(s if w else (0,), dtype=d) for s, w, d in zip(shapes, wanted, dtypes, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gamma, weight, bias, _, rms, _, impl = inputs
    ctx.save_for_backward(None if gamma is None else branch, gamma, weight, bias, *output[1:])
    ctx.rest = (x.dtype, branch.dtype, rms, impl)
    ctx.mark_non_differentiable(*output[2:])
    # Else an unused total would get a tensor of zeros, which backward would read and add.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    given = grad if grad is not None else grad_total
    if given is None:
        return (None,) * 9
    needs = list(ctx.needs_input_grad[:5])
    # A gradient of the gradient has to meet the refusal that is registered with the operator.
    direct = _op.untraced(given) and not torch.is_grad_enabled()
    run: Callable[..., tuple[Tensor, ...]] = _gradients if direct else torch.ops.fastvlp.residual_norm_backward
    dx, dbranch, *vectors = run(grad, grad_total, *ctx.saved_tensors, *ctx.rest, needs)
    # Empty where x and branch share their gradient, which is made and stored once.
    found = (dx, dbranch if dbranch.numel() else dx, *vectors)
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 4)


class _Direct(torch.autograd.Function):
    """The operator without the Python of ``custom_op``, which takes longer than a small batch on a CPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


_op.differentiate(OP, _residual_norm, _residual_norm_backward, _setup, _backward)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-5,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual sum total = x + gamma * branch, and the norm of its rows: out = norm(total) * weight + bias.

    Statistics and products are in float32 (float64 for float64); the sum is rounded once, and normalised as it is returned. The gradients
    of ``weight``, ``bias`` and ``gamma`` are sums over all tokens in a fixed order.

    Args:
        x, branch: [..., C] of one shape, float32, bfloat16, float16 or float64, of one dtype or two; any strides.
        weight: [C]; bias: [C] or None. gamma: [C], LayerScale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239); None: 1.
        kind: "layer": (t - mean) / sqrt(var + eps) (Ba et al. 2016, https://arxiv.org/abs/1607.06450), or "rms": t / sqrt(mean of t^2 +
            eps) (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).
        eps: added to the variance, as in ``torch.nn.LayerNorm``.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device. "triton" takes C up to 8,192; above it None is
            "cpu".

    Returns:
        (out, total), [..., C] each. total has the dtype that x + branch has, out has autocast's dtype where that is on, else total's.
        All inputs get exact first derivatives through both.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or an unknown kind.
        RuntimeError: ``impl`` cannot run here, or not for rows so wide; a second or a forward-mode derivative is asked for.
    """
    _check.plain_tensors(OP, 3, x=x, branch=branch, weight=weight, bias=bias, gamma=gamma)
    for name, tensor in (("x", x), ("branch", branch)):
        if tensor.ndim < 1 or tensor.dtype not in _check.FLOATS or tensor.shape[-1] == 0:
            got = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{OP}: {got}; it must be [..., C], floating point, with C at least 1")
    if x.shape != branch.shape:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)} and branch has shape {tuple(branch.shape)}; they must be equal")
    C = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        _check.vector(OP, name, vector, C)
    if kind not in KINDS:
        raise ValueError(f"{OP}: kind={kind!r} is unknown; allowed: 'layer', 'rms'")
    total_dtype = torch.promote_types(x.dtype, branch.dtype)
    device = x.device.type
    # The sum keeps the precision of the residual stream; only what the next product reads is cast.
    cast = total_dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else total_dtype
    unable = f"takes rows of at most {WIDEST_TRITON} features, not {C}" if C > WIDEST_TRITON else ""
    chosen = _op.choose(OP, impl, x.device, IMPLEMENTATIONS, (total_dtype,), (x, branch, weight, bias, gamma), unable)
    flat = (x.reshape(-1, C), branch.reshape(-1, C))
    if chosen == "reference":
        out, total = reference.residual_norm(Inputs(*flat, gamma, weight, bias, eps, kind == "rms", dtype))
    else:
        run = _Direct.apply if chosen == "cpu" and _op.untraced(x) else torch.ops.fastvlp.residual_norm
        out, total, *_ = run(*flat, gamma, weight, bias, float(eps), kind == "rms", dtype, chosen)
    return out.view(x.shape), total.view(x.shape)
