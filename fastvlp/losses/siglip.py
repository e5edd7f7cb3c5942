"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid

from .across.gather import SigmoidGather
from .across.group import Group
from .across.ring import SigmoidRing
from .across.split_batch import SplitBatch
from .autograd import apply
from .dense import dense_sigmoid, pays
from .drop_in import ContrastiveLoss, Given

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(ContrastiveLoss):
    """Sigmoid cross-entropy of every pair of the batch (Zhai et al. 2023, arXiv:2303.15343).

    1/N * sum_ij softplus(-z_ij * S_ij) with S = logit_scale * image_features @ text_features.T + logit_bias over the whole batch, z = 1 for
    i = j, else -1. One sweep; S is not stored, but on the CPU for up to 724 pairs of one process.

    Arguments and call of ``open_clip.SigLipLoss`` 3.3, and ``chunk_size``. Where it differs:

    * Exact across processes as :class:`ClipLoss`; memory does not grow with their number (``strategy="ring"``).
    * ``cache_labels``, ``dist_impl``, ``chunk_size`` change nothing. An override of ``get_logits`` or ``get_ground_truth`` ("gather") is
      dense.

    Args:
        dist_impl: None, "bidir", "shift", "reduce" or "gather".
        strategy: as there; with "ring" and "grouped" all processes must give their losses the same weight. The others: as there.

    Raises:
        ValueError: unknown ``strategy`` or ``dist_impl``, or ``node_size`` does not fit. TypeError: an override that is not called.
    """

    name = "SigLipLoss"
    unused = ("_loss",)

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        strategy: str = "gather",
        node_size: int | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(rank, world_size, strategy, node_size, group)
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: dist_impl={dist_impl!r} is unknown; allowed: None, {', '.join(DIST_IMPLS)}")
        if not isinstance(chunk_size, int) or chunk_size < 0:
            raise ValueError(f"SigLipLoss: chunk_size={chunk_size!r}; it must be an int, 0 or more (it changes nothing here)")
        self.chunk_size = chunk_size
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl or "bidir"

    def get_ground_truth(self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False) -> Tensor:
        """1 for pairs and -1 for all others, as in open_clip: [num_logits, num_logits]."""
        negative = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return negative if negative_only else negative.fill_diagonal_(1.0)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None = None
    ) -> Tensor:
        """logit_scale * image_features @ text_features.T + logit_bias, as in open_clip. The loss makes them only if a subclass overrides
        this method or ``get_ground_truth``, and then of the whole batch at once, on every process.
        """
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _from_logits(self, given: Given) -> Tensor:
        images, texts = self._whole(given.image, given.text)
        logits = self.get_logits(images, texts, given.scale, given.bias)
        labels = self.get_ground_truth(logits.device, logits.dtype, len(logits))
        return -F.logsigmoid(labels * logits).sum() / len(logits)

    def _alone(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        bias = scale.new_zeros(()) if bias is None else bias
        if pays(image):
            return dense_sigmoid(image, text, scale, bias)
        if torch.compiler.is_compiling():  # a number that follows from the batch would be a constant of the graph
            return pairwise_sigmoid(image, text, scale, bias, offset=0) / image.shape[0]
        return pairwise_sigmoid(image, text, scale, bias, offset=0, factor=1 / image.shape[0])

    def _across(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, batch: SplitBatch, trains: list[bool]) -> Tensor:
        function = SigmoidGather if self.strategy == "gather" else SigmoidRing
        return apply(function, image, text, scale, scale.new_zeros(()) if bias is None else bias, batch, trains)
