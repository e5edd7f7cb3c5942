"""Cross-entropy of a linear classifier in plain PyTorch: all logits are stored, autograd does the rest."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .._inputs import sum_dtype
from .rows import IGNORED, UNLISTED, Inputs


def row_losses(a: Inputs) -> Tensor:
    """[T] losses in float32 (float64 for float64), see ``op.linear_cross_entropy``; ``a.dtype`` is what the operands are rounded to."""
    acc = sum_dtype(a.dtype)
    logits = a.x.to(a.dtype).to(acc) @ a.weight.to(a.dtype).to(acc).T
    if a.bias is not None:
        logits = logits + a.bias.to(acc)
    unlisted = a.targets == UNLISTED
    targets = a.targets.masked_fill(unlisted, 0)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=a.label_smoothing, reduction="none")
    if a.z_loss:
        loss = loss + a.z_loss * logits.logsumexp(1).square().masked_fill(targets == IGNORED, 0.0)
    return torch.where(unlisted, torch.inf, loss)
