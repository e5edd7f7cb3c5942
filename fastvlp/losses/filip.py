"""The token-wise contrastive loss of FILIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels import _inputs
from fastvlp_kernels.maxsim import maxsim
from fastvlp_kernels.packed import Packed, check_packed
from fastvlp_kernels.segment_pool import segment_pool
from fastvlp_kernels.token_select import token_select

from .inputs import align
from .softmax_terms import softplus

NAME = "filip_loss"


def filip_loss(
    image: Packed,
    text: Packed,
    scale: float | Tensor = 1.0,
    *,
    compute_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """The symmetric softmax loss over late interactions of image tokens and text tokens (FILIP, Yao et al. 2021, arXiv:2111.07783).

    s_ij is the mean over the tokens of image i of the largest product with a token of text j, t_ij that of the tokens of text j. The loss
    is the mean of the cross-entropies of rows of scale * s and columns of scale * t, [N, N]; products of tokens are not stored.

    Args:
        image, text: N segments of tokens [., D], i of both a pair, normalised; float32, bfloat16 or float16 (float64 on the CPU). Pairs
            with an empty side have no loss and are no candidates. Sizes of merged tokens weigh the means, for a second product.
        scale: number, 0-d or [1]. compute_dtype, impl: see :func:`fastvlp.ops.maxsim`.

    Returns:
        0-d, float32 (float64 for float64); 0 if no pair has tokens on both sides.

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    check_packed(NAME, image=image, text=text)
    if len(image) != len(text) or len(image) == 0:
        raise ValueError(f"{NAME}: {len(image)} images and {len(text)} texts; segments i of both are a pair, and at least one is needed")
    x, y = align(NAME, image.x, text.x)
    dtype = _inputs.product_dtype(NAME, x, compute_dtype)
    factor = _inputs.scalar(NAME, "scale", scale, x, _inputs.sum_dtype(dtype))
    options: dict[str, Any] = {"max_seqlen_x": image.max_seqlen, "compute_dtype": dtype, "impl": impl}
    if image.size is None and text.size is None:
        of_images, of_texts = maxsim(x, image.cu_seqlens, y, text.cu_seqlens, **options)
    else:
        of_images = maxsim(_weighed(x, image), image.cu_seqlens, y, text.cu_seqlens, directions="x_to_y", **options)
        of_texts = maxsim(x, image.cu_seqlens, _weighed(y, text), text.cu_seqlens, directions="y_to_x", **options)
    images, texts = (packed.cu_seqlens.diff() > 0 for packed in (image, text))
    with torch.autocast(x.device.type, enabled=False):
        found = _direction(factor * of_images, images, texts) + _direction(factor * of_texts.T, texts, images)
    return found / 2


def nearest_tokens(tokens: Packed, others: Packed, keep: float) -> Packed:
    """The share ``keep`` (rounded up) of each segment's tokens whose largest product with a token of the same segment of ``others`` is
    highest: what FILIP compares and sends to other processes (its section 3.1). No gradient goes through the choice."""
    mine, own = tokens.to_padded()
    theirs, real = others.to_padded()
    # Products of unit features are at least -1, so that padding at -2 is never the nearest.
    best = (mine @ theirs.transpose(1, 2)).masked_fill(~real[:, None], -2.0).amax(2)
    counts = (tokens.lengths * keep).ceil().long()
    return token_select(best[own].detach(), tokens.cu_seqlens, counts, lengths=tokens.lengths).apply(tokens)


def _weighed(x: Tensor, packed: Packed) -> Tensor:
    """x times each token's size over the mean size of its segment, because max_j <w x, y_j> = w max_j <x, y_j> for w >= 0."""
    if packed.size is None:
        return x
    size = packed.size.to(_inputs.sum_dtype(x.dtype))
    means = segment_pool(size[:, None], packed.cu_seqlens, "mean", lengths=packed.lengths)[:, 0]
    each = means.repeat_interleave(packed.cu_seqlens.diff(), output_size=len(x))
    return x * (size / each.clamp_min(torch.finfo(each.dtype).tiny)).to(x.dtype)[:, None]


def _direction(S: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
    """Mean cross-entropy of S [N, N] against its diagonal, of ``rows`` [N] among ``candidates`` [N].

    The positive is left out of the sum, so that no term of a confident pair cancels against another.
    """
    pairs = torch.eye(len(S), dtype=torch.bool, device=S.device)
    counted = rows & candidates
    loss = softplus(S.masked_fill(pairs | ~candidates, -torch.inf).logsumexp(1) - S.diagonal())
    return torch.where(counted, loss, 0.0).sum() / counted.sum().clamp_min(1)
