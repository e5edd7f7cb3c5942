"""Classification by the nearest neighbours among the features of a training set (Wu et al. 2018, arXiv:1805.01978)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp.data.shards import Shards
from fastvlp.evaluate.features import Encoder, Features, features

NEIGHBOURS, TEMPERATURE = 20, 0.07


def knn(model: Encoder, shards: Shards, train: Shards, batch_size: int = 256) -> dict[str, float]:
    """Top-1 and top-5 accuracy of a vote of the 20 nearest pictures of ``train``, each with the weight exp(similarity / 0.07).

    Samples without a class take no part. One whose class ``train`` does not have cannot be right, and counts. Of classes with equal votes
    the one that comes first in the alphabet is nearer.

    Returns:
        top1, top5 in 0..1; n: samples; bank: samples of ``train``; classes: how many it has; skipped: samples that could not be used.

    Raises:
        FileNotFoundError: a shard list matches nothing. ValueError: no sample of one of the two names its class.
    """
    return vote(features(model, shards, batch_size, texts=False), features(model, train, batch_size, texts=False), batch_size)


def vote(found: Features, bank: Features, batch_size: int) -> dict[str, float]:
    """``knn`` of features that there are already."""
    classes = sorted({name for name in bank.classes if name is not None})
    images, targets = labelled(found, classes)
    known, labels = labelled(bank, classes)
    hits = torch.zeros(2, dtype=torch.float64)
    for queries, target in zip(images.split(batch_size), targets.split(batch_size), strict=True):
        # topk takes NaN for the largest of all.
        near = (queries @ known.T).nan_to_num(nan=-torch.inf).topk(min(NEIGHBOURS, len(known)))
        # In float64, since votes are exponentials that differ by orders of magnitude.
        votes = torch.zeros(len(queries), len(classes), dtype=torch.float64)
        votes.scatter_add_(1, labels[near.indices], (near.values.double() / TEMPERATURE).exp())
        best = votes.sort(dim=1, descending=True, stable=True)
        right = (best.indices[:, :5] == target[:, None]) & (best.values[:, :5] > 0)  # a class without a vote is no answer
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (hits / len(images)).tolist()
    return {"top1": top1, "top5": top5, "n": len(images), "bank": len(known), "classes": len(classes),
            "skipped": sum(found.skipped.values()) + sum(bank.skipped.values())}


def labelled(found: Features, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Features of the samples that name a class, and its place among ``classes``, -1 where it is not there.

    Raises:
        ValueError: no sample names one.
    """
    place = {name: number for number, name in enumerate(classes)}
    rows = [row for row, name in enumerate(found.classes) if name is not None]
    if not rows:
        raise ValueError(f"no sample of {found.shards!r} names its class; write \"class\" into the JSON beside each picture")
    return found.images[rows], torch.tensor([place.get(found.classes[row] or "", -1) for row in rows])
