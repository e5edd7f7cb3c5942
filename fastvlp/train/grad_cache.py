"""The gradient of a whole contrastive batch, with the activations of one micro-batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fastvlp.models import TwoTower
from fastvlp.train.batches import MicroBatches
from fastvlp_kernels.packed import Packed


class Towers(nn.Module):
    """What one synchronised step needs from a two-tower model, as one ``forward`` that DistributedDataParallel can wrap."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Packed, texts: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Unit features [S_i, D] and [S_t, D], the scale and the bias (or None)."""
        model = self.model
        return model.encode_image(images), model.encode_text(texts), model.scale(), model.logit_bias


def backward(towers: nn.Module, model: TwoTower, batch: MicroBatches, criterion: Callable[..., Tensor],
             amp: Callable[[], AbstractContextManager], scale_loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Accumulate the gradients of ``criterion`` over the whole batch into the parameters.

    With one micro-batch per tower this is a plain forward and backward. Otherwise (GradCache, Gao et al. 2021): features of every
    micro-batch without gradient, the loss and its gradient for those features, then each micro-batch once more with its part of that
    gradient. The last pair of micro-batches goes through ``towers``, so that processes meet once per step.

    Args:
        towers: ``Towers(model)``, wrapped in DistributedDataParallel when there are several processes.
        criterion: (image features [B, D], text features [B, D], scale, bias) -> the loss.
        amp: makes the autocast context. scale_loss: multiplies the loss before its backward (float16), else the identity.

    Returns:
        The loss of this process, 0-d, detached and not multiplied.
    """
    if len(batch.images) == len(batch.texts) == 1:
        with amp():
            image, text, scale, bias = towers(batch.images[0], batch.texts[0])
            loss = criterion(image[batch.image_rows], text[batch.text_rows], scale, bias)
        scale_loss(loss).backward()
        return loss.detach()

    with torch.no_grad(), amp():
        image = torch.cat([model.encode_image(packed) for packed in batch.images]).requires_grad_()
        text = torch.cat([model.encode_text(packed) for packed in batch.texts]).requires_grad_()
    scale = model.scale().detach().requires_grad_()
    bias = None if model.logit_bias is None else model.logit_bias.detach().requires_grad_()
    with amp():
        loss = criterion(image[batch.image_rows], text[batch.text_rows], scale, bias)
    scale_loss(loss).backward()

    image_gradients = _gradient(image).split([len(packed) for packed in batch.images])
    text_gradients = _gradient(text).split([len(packed) for packed in batch.texts])
    for packed, gradient in zip(batch.images[:-1], image_gradients, strict=False):
        with amp():
            features = model.encode_image(packed)
        _backward([features], [gradient])
    for packed, gradient in zip(batch.texts[:-1], text_gradients, strict=False):
        with amp():
            features = model.encode_text(packed)
        _backward([features], [gradient])
    with amp():
        last = towers(batch.images[-1], batch.texts[-1])
    _backward(last, [image_gradients[-1], text_gradients[-1], _gradient(scale), None if bias is None else _gradient(bias)])
    return loss.detach()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _backward(outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Backward of the outputs that carry a graph; a frozen tower has none."""
    pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if output is not None and output.requires_grad]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
