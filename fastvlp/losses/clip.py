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
    """Softmax cross-entropy over all pairs, images to texts and texts to images (Radford et al. 2021, arXiv:2103.00020).

    With S = logit_scale * image_features @ text_features.T over the N pairs of the whole batch, the loss is
    1/(2N) * sum_i (logsumexp_j S_ij + logsumexp_j S_ji - 2 S_ii). S is never stored, and one product gives both directions.

    Takes the arguments and the call of ``open_clip.ClipLoss`` 3.3. Where it differs:

    * The mean over processes of the returned losses is the loss of the whole batch, and once DDP has averaged, every gradient is that of
      one process with the whole batch; local batches may differ in size. Of open_clip's settings only ``gather_with_grad=True`` is right
      there: others give the towers 1/world_size of their gradient, or another direction.
    * ``local_loss``, ``gather_with_grad`` and ``cache_labels`` change nothing: no product is made twice, and there are no labels.
    * ``logit_bias`` cancels in a softmax: its gradient is exactly 0.
    * A subclass may override ``get_logits`` and ``get_ground_truth`` (strategy "gather"); its loss is then dense, as open_clip's.
    * The batch is that of ``group``, also when ``rank`` and ``world_size`` are left out.

    Args:
        local_loss, gather_with_grad, cache_labels: see above.
        rank, world_size: of this process, in the group or in the world; checked against the group if given.
        use_horovod: must be False.
        strategy: "gather": the texts of all processes at once, memory O(N * D). "ring": block after block from neighbour to neighbour, the
            next one in flight while this one is computed, memory O(b * D) for b local pairs, and two numbers per pair of the batch.
            "grouped": a ring of nodes, whose blocks are handed round inside each node: memory O(g * b * D) for nodes of g processes, and
            each text crosses the slow links once per node (M2-Encoder, Guo et al. 2024, arXiv:2401.15896, groups likewise).
        node_size: g, for "grouped": how many consecutive processes of the group share fast links; None: as torchrun started them.
        stash_bytes: memory that the forward may leave for the backward, on one process (see :func:`fastvlp.ops.similarity_logsumexp`).
        group: the processes that share a batch; None: all; ``ALONE``: this one. When it is a part of the processes that DDP averages over,
            the objective is the mean over groups, each with the weight of its number of processes.

    Raises:
        ValueError: ``strategy`` is unknown, ``node_size`` does not go with it, or ``use_horovod`` is True. TypeError: a subclass
            overrides what this strategy does not call.
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
