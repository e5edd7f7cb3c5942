"""k-means against Lloyd's iterations by loops, and on clusters that are known."""

import pytest
import torch
from torch.nn import functional as F

from fastvlp.losses import kmeans, nearest_centroid


def blobs(clusters=6, each=7, width=5, spread=0.02):
    made = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(clusters, width, generator=made, dtype=torch.float64), dim=1)
    x = centres.repeat_interleave(each, 0)
    return centres, x + spread * torch.randn(*x.shape, generator=made, dtype=torch.float64)


def by_loops(x, start, iterations):
    """Each iteration: the nearest centroid of every feature, then the mean of every cluster; and an empty one's farthest feature."""
    centroids = [x[i] for i in start]
    for step in range(iterations + 1):
        far = [[float((one - c).square().sum()) for c in centroids] for one in x]
        owner = [row.index(min(row)) for row in far]
        if step == iterations:
            return torch.stack(centroids), owner, sum(min(row) for row in far)
        farthest = sorted(range(len(x)), key=lambda i: -min(far[i]))
        centroids = [torch.stack([x[i] for i in range(len(x)) if owner[i] == k]).mean(0) if k in owner else x[farthest.pop(0)]
                     for k in range(len(centroids))]


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_iterations(iterations):
    _, x = blobs(spread=0.4)
    start = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))[:6].tolist()
    centroids, owner, _ = by_loops(x, start, iterations)
    found = kmeans(x, 6, iterations, seed=4)
    torch.testing.assert_close(found, centroids, rtol=1e-12, atol=1e-12)
    assert nearest_centroid(x, found).tolist() == owner


def test_empty_clusters_start_again():
    """Among copies of few features most clusters are empty at first; in the end no feature is far from its centroid."""
    x = torch.eye(4, dtype=torch.float64).repeat(10, 1)
    start = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:4]
    assert len((start % 4).unique()) < 4
    found = kmeans(x, 4, seed=1)
    torch.testing.assert_close(found[nearest_centroid(x, found)], x)


def test_restarts_keep_the_best():
    centres, x = blobs()
    sums = [by_loops(x, torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:6].tolist(), 20)[2] for seed in range(8)]
    assert max(sums) > 2 * min(sums), "some starts end badly"
    found = kmeans(x, 6, restarts=8)
    assert (x - found[nearest_centroid(x, found)]).square().sum() == pytest.approx(min(sums))
    assert nearest_centroid(centres, found).unique().numel() == 6


def test_halves_are_summed_in_float32():
    _, x = blobs()
    found = kmeans(x.bfloat16(), 6, seed=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kmeans(x.bfloat16().float(), 6, seed=2))


@pytest.mark.parametrize("wrong", [{"clusters": 0}, {"clusters": 43}, {"iterations": 0}, {"restarts": 0}])
def test_refusals(wrong):
    _, x = blobs()
    with pytest.raises(ValueError, match="at most the number of features, 42"):
        kmeans(x, **{"clusters": 6, **wrong})
    with pytest.raises(ValueError, match=r"they must be floats \[N, D\]"):
        kmeans(x[0], 1)
