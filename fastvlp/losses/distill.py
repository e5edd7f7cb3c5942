"""CLIP's loss with a teacher: cross-entropy against the softmax of the teacher's similarities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlp_kernels import _check, _inputs
from fastvlp_kernels.similarity_attend import similarity_attend
from fastvlp_kernels.similarity_logsumexp import LogSumExp, logsumexp_results

from .across.distill_ring import DistillRing
from .across.gather import GatherRows, gather_texts, merge_columns
from .autograd import apply
from .clip import ClipLoss
from .drop_in import Given
from .inputs import align, check
from .softmax_terms import symmetric_softmax

Statistics = tuple[LogSumExp, LogSumExp, Tensor, Tensor, Tensor]


class DistillClipLoss(ClipLoss):
    """CLIP's loss, and the cross-entropy of the student's similarities against the teacher's (as in CLIP-KD, arXiv:2307.12732).

    With S the student's matrix and T the teacher's softmax over rows, that of images to texts is 1/N * sum_i (logsumexp_j S_ij - sum_j T_ij
    S_ij); the mean of both directions is returned. As sum_j T_ij S_ij = logit_scale * <image_i, (T text)_i>, neither matrix is stored.

    Arguments and call of ``open_clip.DistillClipLoss`` 3.3, exact across processes as :class:`ClipLoss`; the teacher gets no gradient.

    Args:
        strategy: memory as there, with D + E for a teacher of width E; "ring" and "grouped" also keep three numbers per pair.
        The others, and what is raised: as there.
    """

    name = "DistillClipLoss"
    hooks = ()
    unused = ("get_logits", "get_ground_truth", "dist_loss")

    def forward(  # type: ignore[override]  # as in open_clip, a ClipLoss that is called with a teacher too
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
        *,
        local_sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """This process's shares of both losses, 0-d, float32 (float64 for float64).

        Args:
            dist_image_features, dist_text_features: [b, E] of the teacher. dist_logit_scale: its scale.
            output_dict: ``{"contrastive_loss": ..., "distill_loss": ...}`` instead of both. The others: as in :class:`ClipLoss`.

        Raises:
            TypeError, ValueError, RuntimeError: as there; or the teacher's features do not fit the student's.
        """
        try:
            check(self.name, image_features, text_features)
            teacher = self._teacher(dist_image_features, dist_text_features, image_features)
            sums = _inputs.sum_dtype(image_features.dtype)
            temperature = _inputs.scalar(self.name, "dist_logit_scale", dist_logit_scale, image_features, sums).detach()
        except (TypeError, ValueError):
            self._tell_refusal(local_sizes)
            raise
        width = {"width of the teacher's features": teacher[0].shape[1]}
        given = self._given(image_features, text_features, logit_scale, None, local_sizes, **width)
        batch = given.batch
        teacher = teacher[0].to(batch.sums), teacher[1].to(batch.sums)
        if batch.members.size > 1 and self.strategy != "gather":
            contrastive, distill = apply(DistillRing, given.image, given.text, given.scale, *teacher, temperature, batch, given.trains)
        else:
            terms = self._alone_terms if batch.members.size == 1 else self._across_terms
            row, column, positive, of_row, of_column = terms(given, teacher, temperature)
            contrastive = symmetric_softmax(row, column, positive, positive, batch.factor)
            distill = symmetric_softmax(row, column, of_row, of_column, batch.factor)
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)

    def _teacher(self, image: Tensor, text: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        check(f"{self.name}, teacher", image, text)
        if len(image) != len(student):
            raise ValueError(f"{self.name}: {len(student)} pairs of the student, {len(image)} of the teacher; both must see the same batch")
        _check.plain_tensors(self.name, image_features=student, dist_image_features=image)
        image, text = align(f"{self.name}, teacher", image, text)
        return image.detach(), text.detach()

    def _alone_terms(self, given: Given, teacher: tuple[Tensor, Tensor], temperature: Tensor) -> Statistics:
        """Row and column log-sum-exps, positives, and the means of rows and of columns under the teacher's softmax; each [N]."""
        image, text, dtype = given.image.to(given.batch.sums), given.text.to(given.batch.sums), given.batch.dtype
        found = logsumexp_results(image, text, given.scale, offset=0, compute_dtype=dtype, stash_bytes=self.stash_bytes)
        of_row = _mean_similarity(image, text, given.scale, teacher[0], teacher[1], temperature, dtype)
        of_column = _mean_similarity(text, image, given.scale, teacher[1], teacher[0], temperature, dtype)
        return found.row, found.col, found.positive, of_row, of_column

    def _across_terms(self, given: Given, teacher: tuple[Tensor, Tensor], temperature: Tensor) -> Statistics:
        """The same of this process's pairs, among those of all processes; each [b]."""
        batch = given.batch
        image, text = given.image.to(batch.sums), given.text.to(batch.sums)
        images, texts = (apply(GatherRows, rows, batch) for rows in (image, text))
        teacher_images, teacher_texts = (gather_texts(rows, batch).to(batch.sums) for rows in teacher)
        start = batch.start(batch.members.rank)
        found = logsumexp_results(image, texts, given.scale, offset=start, compute_dtype=batch.dtype)
        column = merge_columns(LogSumExp(*(part[None] for part in found.col)), batch)
        of_row = _mean_similarity(image, texts, given.scale, teacher[0], teacher_texts, temperature, batch.dtype)
        of_column = _mean_similarity(text, images, given.scale, teacher[1], teacher_images, temperature, batch.dtype)
        return found.row, LogSumExp(column.reference[0], column.log[0]), found.positive, of_row, of_column


def _mean_similarity(
    x: Tensor, y: Tensor, scale: Tensor, teacher_x: Tensor, teacher_y: Tensor, temperature: Tensor, dtype: torch.dtype
) -> Tensor:
    """[M]: the mean over j of scale * <x_i, y_j> with the weights softmax_j(temperature * <teacher_x_i, teacher_y_j>)."""
    # sum_j p_j S_ij = scale * <x_i, sum_j p_j y_j>: attention over the texts, without the teacher's matrix of probabilities.
    mean, _ = similarity_attend(teacher_x, teacher_y, y, temperature, compute_dtype=dtype)
    return scale * (x * mean).sum(1)
