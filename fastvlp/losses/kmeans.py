"""Clusters of features: k-means, whose centroids ProtoCLIP takes as prototypes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from fastvlp_kernels import _check, _inputs, similarity_topk

from .across.group import Group, Members
from .proto import back_translate

NAME = "kmeans"


@torch.no_grad()
def kmeans(features: Tensor, clusters: int, iterations: int = 20, restarts: int = 1, seed: int = 0, group: Group = None) -> Tensor:
    """Centroids [clusters, D] of ``features`` [N, D] by Lloyd's iterations from random features, in the dtype of sums, without gradient.

    An empty cluster starts again from one of the features farthest from their centroids; the best of several restarts counts.

    Args:
        features: float32, bfloat16 or float16 (float64 on the CPU), the same on all processes of ``group``, which all get the first's
            result.
        iterations: at most; fewer where nothing moves any more.

    Raises:
        TypeError, ValueError: the inputs do not fit.
    """
    _check.plain_tensors(NAME, features=features)
    if features.ndim != 2 or features.dtype not in _check.FLOATS or 0 in features.shape:
        raise ValueError(f"{NAME}: features are {features.dtype} {tuple(features.shape)}; they must be floats [N, D] with N and D >= 1")
    if not 1 <= clusters <= len(features) or min(iterations, restarts) < 1:
        raise ValueError(f"{NAME}: clusters={clusters}, iterations={iterations}, restarts={restarts}; all are at least 1, and clusters at "
                         f"most the number of features, {len(features)}")
    x = features.to(_inputs.sum_dtype(features.dtype))
    found = [_lloyd(x, clusters, iterations, torch.Generator().manual_seed(seed + number)) for number in range(restarts)]
    centroids = min(found, key=lambda one: float(one[0]))[1]
    members = Members.of(NAME, group)
    if members.size > 1:
        # Sums in another order could assign a feature elsewhere; all processes need the same prototypes.
        dist.broadcast(centroids, members.global_rank(0), group=members.group)
    return centroids


@torch.no_grad()
def nearest_centroid(features: Tensor, centroids: Tensor) -> Tensor:
    """The centroid [K, D] at the smallest Euclidean distance from each of ``features`` [N, D]: int64 [N]; of equal ones the first."""
    return _nearest(features.to(centroids.dtype), centroids)[1]


def _lloyd(x: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sum of squared distances to the centroids, and these."""
    centroids = x[torch.randperm(len(x), generator=generator)[:clusters].to(x.device)]
    distance, assigned = _nearest(x, centroids)
    for _ in range(iterations):
        empty = torch.bincount(assigned, minlength=clusters) == 0
        # The e-th empty cluster takes the e-th farthest feature.
        far = x[distance.topk(clusters).indices[(empty.cumsum(0) - 1).clamp_min(0)]]
        centroids = torch.where(empty[:, None], far, back_translate(x, assigned, clusters))
        before = assigned
        distance, assigned = _nearest(x, centroids)
        if torch.equal(before, assigned):
            break
    return distance.sum(), centroids


def _nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances [N] and places [N]: |x - c|^2 is smallest where <x, c> - |c|^2 / 2 is largest."""
    halves = centroids.square().sum(1, keepdim=True) / -2
    # |c|^2 / 2 rides along as one more feature; in 16 bits it would be rounded by more than centroids differ.
    with torch.autocast(x.device.type, enabled=False):
        best, place = similarity_topk(torch.cat([x, x.new_ones(len(x), 1)], 1), torch.cat([centroids, halves], 1), 1)
    return (x.square().sum(1) - 2 * best[:, 0]).clamp_min(0), place[:, 0]
