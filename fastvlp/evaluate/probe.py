"""A linear probe: how well classes can be read off frozen features."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp.data.shards import Shards
from fastvlp.evaluate.features import Encoder, Features, features
from fastvlp.evaluate.knn import labelled

PENALTIES = tuple(10.0**power for power in range(-4, 4))  # relative to the mean variance of a feature times the number of samples


def probe(model: Encoder, shards: Shards, train: Shards, batch_size: int = 256) -> dict[str, float]:
    """Top-1 and top-5 accuracy of ridge regression from the features of ``train`` to its classes, with an intercept.

    It has a closed form, so that the score has no seed, learning rate or stopping time. The penalty is chosen on ``train`` alone, by
    generalised cross-validation (Golub, Heath and Wahba 1979). Samples without a class take no part; one whose class ``train`` does not
    have cannot be right, and counts.

    Features that are no numbers score nothing.

    Returns:
        top1, top5 in 0..1; penalty: the one chosen; n: samples; classes: of ``train``; skipped: samples that could not be used.

    Raises:
        FileNotFoundError: a shard list matches nothing. ValueError: no sample of one of the two names its class.
    """
    return read_off(features(model, shards, batch_size, texts=False), features(model, train, batch_size, texts=False))


def read_off(found: Features, train: Features) -> dict[str, float]:
    """``probe`` of features that there are already."""
    classes = sorted({name for name in train.classes if name is not None})
    images, targets = labelled(found, classes)
    known, labels = labelled(train, classes)
    real = images.isfinite().all(1)
    if not known.isfinite().all():  # a model that broke in training
        known, real = torch.zeros_like(known), torch.zeros_like(real)
    weight, bias, penalty = ridge(known, labels, len(classes))
    best = (images.double() @ weight + bias).argsort(dim=1, descending=True, stable=True)[:, :5]
    right = (best == targets[:, None]) & real[:, None]
    return {"top1": right[:, 0].double().mean().item(), "top5": right.any(1).double().mean().item(), "penalty": penalty, "n": len(images),
            "classes": len(classes), "skipped": sum(found.skipped.values()) + sum(train.skipped.values())}


def ridge(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
    """Weight [D, C], bias [C] and penalty of the ridge regression of one-hot labels on features.

    Memory: D x D and D x C; the n x C targets are never made. Of the penalties, the smallest GCV score counts:
    (residual sum of squares / n) / (1 - degrees of freedom / n)^2.

    Args:
        x: [n, D]. labels: int64 [n].
    """
    n = len(x)
    mean, share = x.double().mean(0), torch.bincount(labels, minlength=classes).double() / n
    x = x.double() - mean
    cross = x.new_zeros(x.shape[1], classes).index_add_(1, labels, x.T)  # centred x makes the centring of the targets drop out
    # One eigendecomposition serves all penalties, whose solutions differ only in the shrinking of each direction.
    values, vectors = torch.linalg.eigh(x.T @ x)
    values = values.clamp_min(0)
    rotated = vectors.T @ cross
    total = n * (1 - share.square().sum())  # sum of squares of the centred targets
    chosen, lowest = 0.0, torch.inf
    for relative in PENALTIES:
        penalty = relative * max(values.mean().item(), torch.finfo(torch.float64).tiny)
        shrunk = 1 / (values + penalty)
        power = rotated.square().sum(1)
        residual = total - 2 * (power * shrunk).sum() + (power * values * shrunk.square()).sum()
        # Generalised cross-validation: leave-one-out without leaving anything out, so that no part of the training set is held back.
        freedom = 1 + (values * shrunk).sum()
        score = (residual / n / (1 - freedom / n).square()).item() if freedom < n else torch.inf
        if score < lowest or not chosen:
            chosen, lowest = penalty, score
    weight = vectors @ (rotated / (values + chosen)[:, None])
    return weight, share - mean @ weight, chosen
