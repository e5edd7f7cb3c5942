"""CLIP-CID (Yang et al. 2024, arXiv:2408.09441) needs no loss of its own: its cluster and instance discrimination are two that exist."""

import torch
from agreement import assert_exact
from torch.nn import functional as F

from fastvlp.losses import DistillClipLoss, proto_clip_loss

N, K = 23, 9


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


TEACHER = {"image": unit(N, 40, seed=1), "text": unit(N, 40, seed=2)}
CLUSTERS = (TEACHER["image"] @ unit(K, 40, seed=3).T).argmax(1)  # of the teacher's images


def ours(tensors, _):
    """The student's images among the prototypes of the teacher's clusters, and its similarities against the teacher's."""
    clusters = proto_clip_loss(tensors["image"], tensors["prototypes"], CLUSTERS, tensors["scale"])
    pairs = tensors["image"], tensors["text"], tensors["scale"]
    contrastive, instances = DistillClipLoss()(*pairs, TEACHER["image"], TEACHER["text"], 30.0)
    return contrastive + 2.0 * instances + 0.5 * clusters


def dense(tensors, _, dtype):
    image, text, prototypes, scale = tensors.values()
    S, T, labels = scale * image @ text.T, 30.0 * TEACHER["image"] @ TEACHER["text"].T, torch.arange(N)
    contrastive = (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2
    instances = (F.cross_entropy(S, T.softmax(1)) + F.cross_entropy(S.T, T.T.softmax(1))) / 2
    return contrastive + 2.0 * instances + 0.5 * F.cross_entropy(scale * image @ prototypes.T, CLUSTERS)


def test_cluster_and_instance_discrimination():
    tensors = {"image": unit(N, 12, seed=4), "text": unit(N, 12, seed=5), "prototypes": unit(K, 12, seed=6)}
    exact = assert_exact(ours, dense, tensors | {"scale": torch.tensor(12.0).double()}, {})
    assert set(exact) == {"loss", "image", "text", "prototypes", "scale"}
