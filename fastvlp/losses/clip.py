"""The symmetric softmax loss of CLIP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels.similarity_logsumexp import logsumexp_results

from .across.gather import SoftmaxGather
from .across.group import Group
from .across.ring import SoftmaxRing
from .across.split_batch import SplitBatch
from .autograd import apply
from .dense import dense_softmax, pays
from .drop_in import ContrastiveLoss, Given
from .softmax_terms import symmetric_softmax


class ClipLoss(ContrastiveLoss):
    """Softmax cross-entropy over all pairs, in both directions (Radford et al. 2021, arXiv:2103.00020).

    S = logit_scale * image_features @ text_features.T over the N pairs of the whole batch; the loss is
    1/(2N) * sum_i (logsumexp_j S_ij + logsumexp_j S_ji - 2 S_ii). S is not stored, but on
    the CPU for up to 724 pairs of one process, whose loss is made faster from it (then ``stash_bytes`` changes nothing).

    Arguments and call of ``open_clip.ClipLoss`` 3.3. Where it differs:

    * The mean of the losses is the whole batch's, and DDP averages to one process's gradients, also for unequal local batches; open_clip's
      towers get 1/world_size of theirs, or another direction, without ``gather_with_grad=True``.
    * ``local_loss``, ``gather_with_grad``, ``cache_labels`` change nothing; ``logit_bias`` cancels, with gradient 0.
    * A subclass may override ``get_logits`` and ``get_ground_truth`` (strategy "gather"); its loss is then dense.

    Args:
        rank, world_size: checked against the group if given. use_horovod: must be False.
        strategy: "gather": all texts at once, memory O(N * D). "ring": from neighbour to neighbour while computing, O(b * D) for b local
            pairs. "grouped": a ring of nodes of g processes, O(g * b * D); a text crosses the slow links once per node (M2-Encoder,
            Guo et al. 2024, arXiv:2401.15896).
        node_size: g; None: as torchrun started them.
        stash_bytes: see :func:`fastvlp.ops.similarity_logsumexp`; on one process.
        group: the processes that share a batch; None: all; ``ALONE``: this one. Smaller than DDP's group: the mean over groups.

    Raises:
        ValueError: unknown ``strategy``, ``node_size`` without "grouped", ``use_horovod=True``. TypeError: an override that this strategy
            does not call.
    """

    name = "ClipLoss"

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        strategy: str = "gather",
        node_size: int | None = None,
        group: Group = None,
        stash_bytes: int = 0,
    ) -> None:
        super().__init__(rank, world_size, strategy, node_size, group)
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod=True is not supported; start the processes with torchrun and leave use_horovod=False")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod
        self.stash_bytes = stash_bytes

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The places of the positives, as in open_clip: int64 [num_logits]; with ``local_loss`` those of this process's rows."""
        members = self._members()
        return torch.arange(num_logits, device=device) + (num_logits * members.rank if self.local_loss else 0)

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Similarities of images with texts and of texts with images, as in open_clip: of all processes, [N, N]; with ``local_loss``
        those of this process's rows, [b, N]. The loss makes them only if a subclass overrides this method or ``get_ground_truth``.
        """
        images, texts = self._whole(image_features, text_features)
        if self.local_loss:
            found = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
        else:
            logits = logit_scale * images @ texts.T
            found = logits, logits.T
        return found if logit_bias is None else (found[0] + logit_bias, found[1] + logit_bias)

    def _from_logits(self, given: Given) -> Tensor:
        # open_clip's labels count rank * num_logits, which only equal batches make true.
        if self.local_loss and len(set(given.batch.sizes)) > 1:
            sizes = list(given.batch.sizes)
            raise ValueError(f"{self.name}: local_loss=True with overridden methods needs equally many pairs on all processes, not {sizes}")
        by_images, by_texts = self.get_logits(given.image, given.text, given.scale, logit_bias=given.bias)
        labels = self.get_ground_truth(by_images.device, len(by_images))
        return (F.cross_entropy(by_images, labels) + F.cross_entropy(by_texts, labels)) / 2

    def _alone(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if pays(image):
            return _with_bias(dense_softmax(image, text, scale), bias)
        found = logsumexp_results(image, text, scale, offset=0, stash_bytes=self.stash_bytes)
        return _with_bias(symmetric_softmax(found.row, found.col, found.positive, found.positive, 1 / image.shape[0]), bias)

    def _across(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, batch: SplitBatch, trains: list[bool]) -> Tensor:
        function = SoftmaxGather if self.strategy == "gather" else SoftmaxRing
        return _with_bias(apply(function, image, text, scale, batch, trains), bias)


def _with_bias(loss: Tensor, bias: Tensor | None) -> Tensor:
    """The loss, with the zero gradient that the bias has (DDP looks for one), and its NaN or infinity."""
    return loss if bias is None else loss + 0.0 * bias
