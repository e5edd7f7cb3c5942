"""A softmax objective over a batch that processes share: each sweeps its own images against all texts, and columns merge.

All processes together make the products that one process would make. Texts travel; images only where a term reads their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvlp_kernels._inputs import needs_grad, sum_dtype

from ..queue import NegativeQueue
from ..softmax_terms import Side, Terms, make_side, number_groups
from .gather import gather_rows
from .group import Members
from .split_batch import SplitBatch, agree, features_alike

Two = tuple[Tensor | None, Tensor | None]  # for images and for texts
Negatives = Tensor | NegativeQueue | None


@dataclass(frozen=True)
class SideBatches:
    """The images, the texts and the shared negatives of either of one loss, each with numbers of its own on every process."""

    images: SplitBatch
    texts: SplitBatch
    text_negatives: SplitBatch
    image_negatives: SplitBatch

    @classmethod
    def of(
        cls, name: str, members: Members, image: Tensor, text: Tensor, negatives: Sequence[Negatives], rest: Sequence[Tensor | None],
        dtype: torch.dtype, keywords: dict[str, object],
    ) -> SideBatches:  # fmt: skip
        """What all members bring, after one collective that makes sure that all do the same.

        Args:
            rest: what may need a gradient beside features. keywords: what else must be alike.

        Raises:
            RuntimeError, ValueError: another member refused its input, or the members differ.
        """
        shared = [extra.shape[0] if isinstance(extra, Tensor) and extra.ndim == 2 else 0 for extra in negatives]
        sizes = [image.shape[0], text.shape[0], *shared]
        everyone = [sizes]
        if members.size > 1:
            tensors = [extra for extra in negatives if isinstance(extra, Tensor)]
            kinds = [f"{extra.ndim} dimensions" if isinstance(extra, Tensor) else type(extra).__name__ for extra in negatives]
            alike = {"loss or strategy": name, **features_alike(image, dtype, needs_grad(image, text, *rest, *tensors))}
            everyone = agree(name, members, sizes, alike | {"kinds of negatives": kinds} | keywords)
        return cls(*(SplitBatch(members, tuple(numbers), dtype, sum_dtype(dtype)) for numbers in zip(*everyone, strict=True)))


def numbers_of_all(numbers: Tensor | None, batch: SplitBatch) -> Tensor | None:
    """The numbers [N] of all members, unrounded: integers, or what is added to similarities."""
    if numbers is None or batch.members.size == 1:
        return numbers
    # A bias is added to similarities: it must not be rounded as features are.
    if numbers.is_floating_point():
        return gather_rows(numbers[:, None], replace(batch, dtype=batch.sums))[:, 0]
    return batch.members.gather_rows(numbers[:, None].long(), batch.sizes)[:, 0]


def shared_negatives(extra: Negatives, batch: SplitBatch) -> Negatives:
    """Negatives [J, D], which are for all anchors, of all members; others as they are."""
    return gather_rows(extra, batch) if isinstance(extra, Tensor) and extra.ndim == 2 else extra


def gather_sides(
    image: Tensor, text: Tensor, bias: Two, ids: Two, terms: Terms, shared: bool, spread: SideBatches
) -> tuple[Side, Side, Side, Side]:
    """Images and texts of this member, and of all members what ``terms`` reads of them; alone they are the same.

    Args:
        bias, ids: for images and for texts. shared: see ``make_side``.
    """
    batches = spread.images, spread.texts
    ends = [sum(batch.sizes) for batch in batches]
    groups = [numbers_of_all(side, batch) for side, batch in zip(ids, batches, strict=True)]
    of_images, of_texts = groups
    # Images and texts of equal id must get equal numbers, and so are numbered together.
    if terms.averages and of_images is not None and of_texts is not None:
        groups = list(number_groups(torch.cat([of_images, of_texts]).long()).split(ends))
    elif terms.excludes:
        groups = [torch.arange(ends[1], device=text.device) if of_texts is None else number_groups(of_texts.long())] * 2

    own, everyone = [], []
    for features, add, numbers, batch, needed in zip((image, text), bias, groups, batches, (terms.label_smoothing, True), strict=True):
        add = None if add is None else add.to(batch.sums)
        here = None if numbers is None else numbers.split(batch.sizes)[batch.members.rank]
        side = every = make_side(features, terms.sweep, shared, add, here, sum(ends))
        if batch.members.size > 1:
            every = side._replace(groups=numbers)
            if needed:
                add = numbers_of_all(add, batch)
                every = make_side(gather_rows(features, batch), terms.sweep, shared, add, numbers, sum(ends))
        own.append(side)
        everyone.append(every)
    images, texts = own
    all_images, all_texts = everyone
    return images, texts, all_images, all_texts
