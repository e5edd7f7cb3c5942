"""The losses of CLIP and SigLIP for a small batch on the CPU: S is stored, where visiting tiles would take longer than the arithmetic.

S of ``PAIRS`` pairs takes 2 MiB. Loss and gradients come from the same formulas, and are made together:
three products, and one function of S each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels import _cpu_products
from fastvlp_kernels._cpu_products import bf16_products
from fastvlp_kernels._inputs import needs_grad, product_dtype, sum_dtype
from fastvlp_kernels.pairwise_sigmoid.cpu import LIMIT, LN2, sum_log1p

from .autograd import apply, no_second_derivatives

PAIRS, FEW = 1 << 19, 1 << 14


def pays(image: Tensor) -> bool:
    """Whether this is the faster way: a small batch on the CPU that nothing traces, transforms or counts."""
    if torch.compiler.is_compiling() or type(image) is not Tensor or image.device.type != "cpu" or len(image) ** 2 > PAIRS:
        return False
    return not torch._C._are_functorch_transforms_active() and torch._C._len_torch_dispatch_stack() == 0


def dense_softmax(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The loss of :class:`ClipLoss` of [N, D] features; ``scale``: 0-d, in the dtype of sums."""
    loss: Tensor = apply(_Dense, image, text, scale, None, needs_grad(image, text, scale, None))
    return loss


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of :class:`SigLipLoss` of [N, D] features; ``scale`` and ``bias``: 0-d, in the dtype of sums."""
    loss: Tensor = apply(_Dense, image, text, scale, bias, needs_grad(image, text, scale, bias))
    return loss


class _Dense(torch.autograd.Function):
    """Either loss, and what its gradients are proportional to."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, needs: list[bool]) -> Tensor:
        dtype = product_dtype("", image, None)
        # The casts are made below, once; autocast would make them again in each product.
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return _Dense._forward(ctx, image, text, scale, bias, needs, dtype)
        return _Dense._forward(ctx, image, text, scale, bias, needs, dtype)

    @staticmethod
    def _forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, needs: list[bool], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        N, D = image.shape
        # On the CPU reading a number waits for nothing, and as alpha it costs no pass over S.
        acc, factor = sum_dtype(dtype), scale.item()
        # Rounded as products ask, then widened: S and everything made of it are in the dtype of sums.
        x, y = image.to(dtype).to(acc), text.to(dtype).to(acc)
        # Not ctx's, which say under no_grad what would need a gradient without it.
        need_image, need_text, need_scale, need_bias = needs
        with bf16_products(_cpu_products.pays(image.device, dtype, N * N * D)):
            shift = scale if bias is None else bias
            S = torch.addmm(shift, x, y.T, beta=0 if bias is None else 1, alpha=factor)
            loss, dS = _softmax(S) if bias is None else _sigmoid(S)
            # The scale's gradient needs one of both products; the image's is made for it only where the text's is not made anyway.
            by_image = need_image or (need_scale and not need_text)
            of_image = torch.mm(dS, y) if by_image else None
            of_text = torch.mm(dS.T, x) if need_text else None
        of_scale = None
        if need_scale:  # <x, dS y> and <y, dS^T x> are the same number
            side, of_side = (x, of_image) if of_image is not None else (y, of_text)
            of_scale = torch.linalg.vecdot(side, of_side).sum()
        made = of_image if need_image else None, of_text, of_scale, dS.sum() if need_bias else None
        # Gradients are kept, of N D numbers, and not S, which has N^2.
        ctx.save_for_backward(*(None if one is None else one.mul_(by) for one, by in zip(made, (factor, factor, 1, 1), strict=True)))
        ctx.dtypes, ctx.count = (image.dtype, text.dtype), N
        return loss.div_(N)

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, *scalars = ctx.saved_tensors
        weight = gradient / ctx.count
        features = (None if one is None else (one * weight).to(dtype) for one, dtype in zip((image, text), ctx.dtypes, strict=True))
        return *features, *(None if one is None else one * weight for one in scalars), None


def _softmax(S: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the halves of both cross-entropies, and its gradient by S. At the pairs p - 1 keeps its digits."""
    rows, cols = S.log_softmax(1), S.log_softmax(0)
    of_pairs = torch.stack((rows.diagonal(), cols.diagonal()))
    loss = of_pairs.sum() / -2
    dS = rows.exp_().add_(cols.exp_())
    dS.diagonal().copy_(of_pairs.expm1_().sum(0))
    return loss, dS.div_(2)


def _sigmoid(S: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of softplus(-z S), and its gradient by S; pairs are negated before and after, so that neither end loses digits."""
    pairs = S.diagonal()
    pairs.neg_()
    # A logarithm for four numbers, where no product of four (1 + e) overflows and they are worth the passes.
    if S.numel() > FEW and S.amax().item() <= LIMIT[S.dtype] * LN2:
        e = S.exp_()
        total = e + 1
        loss, dS = sum_log1p(e.view(-1), total.view(-1), e.new_empty(e.numel() // 2)), e.div_(total)
    else:
        loss, dS = F.softplus(S, threshold=40.0).sum(), S.sigmoid_()
    dS.diagonal().neg_()
    return loss, dS
