"""Encoders that follow others with momentum, and the loss against their features and a queue of them (MoCo, BriVL)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp_kernels import _check, _inputs
from fastvlp_kernels.similarity_logsumexp import logsumexp_results, merge

from .inputs import align, check
from .queue import NegativeQueue
from .softmax_terms import operand, softplus

NAME = "queue_contrastive_loss"
NARROW = (torch.bfloat16, torch.float16)


class MomentumEncoder(nn.Module):
    """A copy of an encoder that follows it: weights <- m * weights + (1 - m) * the encoder's (He et al. 2020, arXiv:1911.05722).

    Averages of 16-bit weights are kept in float32 (buffers ``average_0``, ...): at m = 0.999 their steps are below half a unit.

    Args:
        encoder: any module; the copy takes no gradient. momentum: m.

    Raises:
        ValueError: ``momentum`` is not in [0, 1].
    """

    def __init__(self, encoder: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"MomentumEncoder: momentum={momentum}; it must be from 0 (a plain copy) to 1 (never moves)")
        self.momentum = momentum
        self.module = copy.deepcopy(encoder).requires_grad_(False)
        for place, weight in enumerate(self.module.parameters()):
            # A step of 0.001 of the way is lost in 16 bits: the average would never move.
            if weight.dtype in NARROW:
                self.register_buffer(f"average_{place}", weight.detach().float())

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy gives, without gradient."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, encoder: nn.Module) -> None:
        """Move towards ``encoder``, after each step of its optimizer. Buffers (statistics of batch norm) are copied.

        Raises:
            ValueError: its parameters or buffers are not of the shapes and dtypes of the copy's.
        """
        for part in (nn.Module.parameters, nn.Module.buffers):
            own, other = ([(tensor.shape, tensor.dtype) for tensor in part(module)] for module in (self.module, encoder))
            if own != other:
                raise ValueError(
                    f"MomentumEncoder: update got a {type(encoder).__name__} whose {part.__name__} differ from the copy's in number, shape "
                    "or dtype; pass the encoder it was made of"
                )
        weights = list(self.module.parameters())
        averages = [getattr(self, f"average_{place}", weight) for place, weight in enumerate(weights)]
        theirs = [new.to(old.dtype) for old, new in zip(averages, encoder.parameters(), strict=True)]
        # All weights in one call, as a launch for each would take longer than the arithmetic.
        torch._foreach_lerp_(averages, theirs, 1 - self.momentum)
        for weight, average in zip(weights, averages, strict=True):
            if average is not weight:
                weight.copy_(average)
        for kept, new in zip(self.module.buffers(), encoder.buffers(), strict=True):
            kept.copy_(new)

    def _apply(self, fn: Any, recurse: bool = True) -> MomentumEncoder:
        """As ``nn.Module``, with averages for weights that have become 16-bit, and in float32 whatever the weights are cast to."""
        before = [self._buffers.get(f"average_{place}", weight.detach()) for place, weight in enumerate(self.module.parameters())]
        super()._apply(fn, recurse)
        for place, (weight, old) in enumerate(zip(self.module.parameters(), before, strict=True)):
            self._buffers.pop(f"average_{place}", None)
            if weight.dtype in NARROW and old is not None:
                self.register_buffer(f"average_{place}", old.to(weight.device, torch.float32))
        return self


def queue_contrastive_loss(
    image: Tensor,
    text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    image_queue: NegativeQueue,
    text_queue: NegativeQueue,
    scale: float | Tensor = 1.0,
    *,
    batch_negatives: bool = False,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
) -> Tensor:
    """InfoNCE of each tower's features against the other tower's momentum features, with negatives from queues (BriVL, Huo et al. 2021,
    arXiv:2103.06561).

    With s = scale * <., .>, the images' part is the mean over i of -log(exp(s(image_i, text_key_i)) / (exp(s(image_i, text_key_i)) + sum
    over q in text_queue of exp(s(image_i, q)))); the loss is the mean of both. Nothing B x Q is stored; keys and queues get no gradient::

        keys = image_momentum(pixels), text_momentum(tokens)
        queue_contrastive_loss(image, text, *keys, image_queue, text_queue, scale).backward()
        image_queue.enqueue(keys[0]); text_queue.enqueue(keys[1])

    Across processes take all four from :func:`gather_batch`.

    Args:
        image, text, image_keys, text_keys: [B, D], row i of all is one sample; float32, bfloat16 or float16 (float64 on the CPU).
        image_queue, text_queue: of width D; places never filled do not count. scale: number, 0-d or [1].
        batch_negatives: the batch's other keys are negatives, too (ALBEF, Li et al. 2021, arXiv:2107.07651).
        compute_dtype, stash_bytes, impl: see :func:`fastvlp.ops.similarity_logsumexp`.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    check(NAME, image, text)
    image, text = align(NAME, image, text)
    _check.plain_tensors(NAME, 3, image=image, image_keys=image_keys, text_keys=text_keys)
    for name, keys in (("image_keys", image_keys), ("text_keys", text_keys)):
        if keys.shape != image.shape or keys.dtype not in _check.FLOATS:
            got = f"{keys.dtype} {tuple(keys.shape)}"
            raise ValueError(f"{NAME}: {name} are {got}; they must be floating point and like the features, {tuple(image.shape)}")
    for name, queue in (("image_queue", image_queue), ("text_queue", text_queue)):
        if not isinstance(queue, NegativeQueue):
            raise TypeError(f"{NAME}: {name} is {type(queue).__name__}; it must be a NegativeQueue, which knows how full it is")
        if queue.features.shape[1] != image.shape[1]:
            raise ValueError(f"{NAME}: {name} has width {queue.features.shape[1]}, the features have {image.shape[1]}")
    _check.plain_tensors(NAME, image=image, image_queue=image_queue.features, text_queue=text_queue.features)
    dtype = _inputs.product_dtype(NAME, image, compute_dtype)
    factor = _inputs.scalar(NAME, "scale", scale, image, _inputs.sum_dtype(dtype))
    how = {"compute_dtype": dtype, "stash_bytes": stash_bytes, "impl": impl}
    # ``compute_dtype`` says what is rounded; autocast would round sums as well.
    with torch.autocast(image.device.type, enabled=False):
        of_images = _against_queue(image, text_keys, text_queue, factor, batch_negatives, how)
        of_texts = _against_queue(text, image_keys, image_queue, factor, batch_negatives, how)
        return (of_images + of_texts) / 2


def _against_queue(
    features: Tensor, keys: Tensor, queue: NegativeQueue, scale: Tensor, batch_negatives: bool, how: dict[str, Any]
) -> Tensor:
    """One direction. The positive is left out of every sweep, so that no term cancels against another."""
    x, positives, kept = (operand(rows, how["compute_dtype"]) for rows in (features, keys.detach(), queue.features))
    negatives = logsumexp_results(x, kept, scale, col_bias=queue.log_weight, **how).row
    if batch_negatives:
        places = torch.arange(len(x), device=x.device)
        batch = logsumexp_results(x, positives, scale, row_ids=places, col_ids=places, offset=0, **how)
        negatives, positive = merge(negatives, batch.row), batch.positive
    else:
        positive = scale * torch.linalg.vecdot(x, positives)
    return softplus(negatives.minus(positive)).mean()
