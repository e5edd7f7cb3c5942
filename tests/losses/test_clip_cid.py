"""Clusters and instances of a teacher: against the sum of cross-entropies over whole matrices."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import PAIRS, WIDTH, differentiated, make
from torch.nn import functional as F

from fastvlp.losses import cluster_instance_loss, contrastive_loss
from fastvlp_kernels._testing import error, forbid_large_tensors

K = 11
CASES = [(7.0, 0.4), (100.0, 0.45), (80.0, 0.56)]


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


CLUSTERS = torch.arange(PAIRS) % K
CLUSTERS[-2:] = -1  # in no cluster


def drawn(scale, likeness, dtype):
    """Prototypes and teachers have as much in common with a pair's features as these have with one another."""
    tensors, _ = make("clip", scale, likeness, dtype)
    image, text = tensors["image"].double(), tensors["text"].double()
    near = {name: F.normalize(side + 0.3 * unit(PAIRS, WIDTH, seed=seed), dim=1) for name, side, seed in
            (("teacher_image", image, 1), ("teacher_text", text, 2))}  # fmt: skip
    means = torch.zeros(K, WIDTH, dtype=torch.float64).index_add_(0, CLUSTERS[:-2], image[:-2])
    tensors["prototypes"] = F.normalize(means, dim=1).to(dtype)
    return tensors, {name: side.to(dtype) for name, side in near.items()} | {"cluster": 0.5, "instance": 2.0}


def dense(tensors, options, dtype):
    image, text, scale = tensors["image"], tensors["text"], tensors["scale"].to(dtype)

    def both(x, y):
        S, labels = scale * (x @ y.T.to(x.dtype)).to(dtype), torch.arange(PAIRS)
        return (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2

    clusters = F.cross_entropy(scale * (image @ tensors["prototypes"].T).to(dtype), CLUSTERS, ignore_index=-1)
    instances = (both(image, options["teacher_image"]) + both(text, options["teacher_text"])) / 2
    return both(image, text) + options["cluster"] * clusters + options["instance"] * instances


def ours(tensors, options):
    return cluster_instance_loss(**tensors, **options, assignments=CLUSTERS)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case):
    exact = assert_exact(ours, dense, *drawn(*case, torch.float64))
    assert set(exact) == {"loss", "image", "text", "prototypes", "scale"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_eager(case, dtype):
    assert_rounded_like_eager(ours, dense, *drawn(*case, dtype), 4 * torch.finfo(torch.float32).eps * case[0])


def test_a_small_loss_keeps_its_digits():
    """Every feature is near its own teacher and far from the others, and there is a cluster for each."""
    tensors, options = drawn(80.0, 0.56, torch.float64)
    tensors["prototypes"] = tensors["image"].clone()
    own = {"assignments": torch.arange(PAIRS), **options}
    loss = cluster_instance_loss(**tensors, **own)
    S = {name: 80.0 * tensors["image"] @ other.T for name, other in (("text", tensors["text"]), ("clusters", tensors["prototypes"]))}
    S |= {name: 80.0 * tensors[name[8:]] @ options[name].T for name in ("teacher_image", "teacher_text")}
    wrong = {name: (M - M.diagonal()[:, None]).fill_diagonal_(-torch.inf).logsumexp(1).exp().log1p().mean() for name, M in S.items()}
    back = {name: (M.T - M.diagonal()[:, None]).fill_diagonal_(-torch.inf).logsumexp(1).exp().log1p().mean() for name, M in S.items()}
    both = {name: (wrong[name] + back[name]) / 2 for name in S}
    want = both["text"] + 0.5 * wrong["clusters"] + both["teacher_image"] + both["teacher_text"]
    assert 0 < want < 0.01
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0.0)


def test_autocast_rounds_operands_only():
    tensors, options = drawn(50.0, 0.45, torch.float32)
    found = differentiated(ours, tensors, options, autocast=True)
    rounded = {name: (tensor.bfloat16() if tensor.ndim else tensor).double() for name, tensor in tensors.items()}
    of_teacher = {name: value.bfloat16().double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    for name, value in differentiated(dense, rounded, of_teacher, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 50, name


def test_without_clusters_and_instances_it_is_clip():
    tensors, options = drawn(10.0, 0.4, torch.bfloat16)
    found = cluster_instance_loss(**tensors, **(options | {"cluster": 0.0, "instance": 0.0}), assignments=CLUSTERS)
    assert torch.equal(found, contrastive_loss(tensors["image"], tensors["text"], tensors["scale"]))


def test_no_matrix_of_pairs_nor_of_prototypes():
    count, clusters = 1800, 1700
    image, text, prototypes = (F.normalize(torch.randn(n, 4), dim=1).requires_grad_() for n in (count, count, clusters))
    teacher = [F.normalize(torch.randn(count, 4), dim=1) for _ in range(2)]
    scale = torch.tensor(9.0, requires_grad=True)
    with forbid_large_tensors(clusters * clusters // 8):
        cluster_instance_loss(image, text, *teacher, prototypes, torch.arange(count) % clusters, scale).backward()


def test_compiles_into_one_graph():
    tensors, options = drawn(10.0, 0.4, torch.float32)
    eager = differentiated(ours, tensors, options)
    for name, value in differentiated(torch.compile(ours, backend="aot_eager", fullgraph=True), tensors, options).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_refusals():
    tensors, options = drawn(10.0, 0.4, torch.float32)
    for change, message in (
        ({"cluster": -1.0}, "cluster=-1.0; it must be 0"),
        ({"teacher_text": torch.zeros(PAIRS, 3)}, r"teacher_text has shape \(29, 3\), the student's features \(29, 40\)"),
        ({"teacher_image": options["teacher_image"].long()}, "teacher_image is torch.int64; it must be floating point"),
        ({"teacher_image": options["teacher_image"].tolist()}, "teacher_image is list; it must be a torch.Tensor"),
        ({"text": torch.zeros(5, WIDTH)}, f"{PAIRS} images but 5 texts"),
        ({"prototypes": torch.zeros(4, 3)}, r"prototypes have shape \(4, 3\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cluster_instance_loss(**(tensors | options | {"assignments": CLUSTERS} | change))
