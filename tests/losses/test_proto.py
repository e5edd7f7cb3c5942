"""Prototypes: against the whole matrices of similarities and targets, and the mean of each cluster by a loop."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import differentiated
from torch.nn import functional as F

from fastvlp.losses import back_translate, proto_clip_loss
from fastvlp_kernels._testing import error, forbid_large_tensors

N, K, WIDTH = 29, 11, 24
CASES = [(7.0, 0.4), (100.0, 0.35), (100.0, 0.46)]  # the last loss is below 0.01 with hard targets


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ASSIGNED = torch.randint(-1, K - 1, (N,), generator=torch.Generator().manual_seed(0))  # some in no cluster, the last cluster empty
HARD, SOFT = {}, {"teacher": F.normalize(random(K, 17, seed=4), dim=1), "teacher_scale": 6.0}


def clustered(scale, likeness, dtype):
    prototypes = F.normalize(random(K, WIDTH, seed=1), dim=1)
    features = likeness * prototypes[ASSIGNED.clamp_min(0)] + (1 - likeness) * F.normalize(random(N, WIDTH, seed=2), dim=1)
    tensors = {"features": F.normalize(features, dim=1).to(dtype), "prototypes": prototypes.to(dtype)}
    return tensors | {"scale": torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)}


def dense(tensors, options, dtype):
    counted = ASSIGNED >= 0
    target = F.one_hot(ASSIGNED.clamp_min(0), K).to(dtype)
    if options:
        teacher = options["teacher"].to(tensors["features"].dtype)
        target = (options["teacher_scale"] * (teacher @ teacher.T).to(dtype)).softmax(1)[ASSIGNED.clamp_min(0)]
    S = tensors["scale"].to(dtype) * (tensors["features"] @ tensors["prototypes"].T).to(dtype)
    return F.cross_entropy(S[counted], target[counted])


def ours(tensors, options):
    return proto_clip_loss(tensors["features"], tensors["prototypes"], ASSIGNED, tensors["scale"], **options)


def of_dtype(options, dtype):
    return options | {"teacher": options["teacher"].to(dtype)} if options else options


@pytest.mark.parametrize("options", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("scale,likeness", CASES)
def test_value_and_gradients(scale, likeness, options):
    exact = assert_exact(ours, dense, clustered(scale, likeness, torch.float64), options)
    assert set(exact) == {"loss", "features", "prototypes", "scale"}
    assert options or likeness != CASES[-1][1] or 1e-5 < exact["loss"] < 0.01


@pytest.mark.parametrize("options", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale,likeness", CASES)
def test_no_worse_than_eager(scale, likeness, dtype, options):
    tol = 4 * torch.finfo(torch.float32).eps * scale
    assert_rounded_like_eager(ours, dense, clustered(scale, likeness, dtype), of_dtype(options, dtype), tol)


@pytest.mark.parametrize("options", [HARD, SOFT], ids=["hard", "soft"])
def test_autocast_rounds_operands_only(options):
    tensors = clustered(50.0, 0.45, torch.float32)
    found = differentiated(ours, tensors, of_dtype(options, torch.float32), autocast=True)
    rounded = {name: (tensor.bfloat16() if tensor.ndim else tensor).double() for name, tensor in tensors.items()}
    for name, value in differentiated(dense, rounded, of_dtype(options, torch.bfloat16), torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 50, name


def test_compiles_into_one_graph():
    tensors, options = clustered(10.0, 0.4, torch.float32), of_dtype(SOFT, torch.float32)
    eager = differentiated(ours, tensors, options)
    for name, value in differentiated(torch.compile(ours, backend="aot_eager", fullgraph=True), tensors, options).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_sharp_teacher_of_orthogonal_prototypes_gives_the_clusters_themselves():
    tensors = clustered(10.0, 0.4, torch.float64)
    sharp = proto_clip_loss(**tensors, assignments=ASSIGNED, teacher=torch.eye(K, dtype=torch.float64), teacher_scale=1e3)
    torch.testing.assert_close(sharp, proto_clip_loss(**tensors, assignments=ASSIGNED), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("soft", [False, True])
def test_no_matrix_of_features_and_prototypes(soft):
    count, clusters = 1800, 1700
    features, prototypes = (F.normalize(torch.randn(n, 4), dim=1).requires_grad_() for n in (count, clusters))
    options = {"teacher": torch.randn(clusters, 5)} if soft else {}
    with forbid_large_tensors(clusters * clusters // 8):
        proto_clip_loss(features, prototypes, torch.arange(count) % clusters, torch.tensor(9.0, requires_grad=True), **options).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_back_translation_is_the_mean_of_each_cluster(dtype):
    features = random(N, WIDTH, seed=3).to(dtype).requires_grad_()
    found = back_translate(features, ASSIGNED, K)
    assert not found.requires_grad and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for k in range(K):
        own = features[ASSIGNED == k].detach().double()
        torch.testing.assert_close(found[k].double(), own.mean(0) if len(own) else torch.zeros(WIDTH).double(), rtol=1e-6, atol=1e-7)


def test_features_in_no_cluster_lose_nothing():
    tensors = clustered(10.0, 0.4, torch.float32)
    nowhere = torch.full((N,), -1)
    for options in (HARD, of_dtype(SOFT, torch.float32)):
        found = differentiated(lambda leaves, rest: proto_clip_loss(**leaves, assignments=nowhere, **rest), tensors, options)
        assert all(not value.any() for value in found.values())


def test_refusals():
    tensors = clustered(10.0, 0.4, torch.float32) | {"assignments": ASSIGNED}
    for change, message in (
        ({"assignments": ASSIGNED[:3]}, r"assignments has shape \(3,\); it must have shape \(29,\)"),
        ({"assignments": ASSIGNED.float()}, "it must be an integer tensor"),
        ({"assignments": ASSIGNED + 4}, "assignments go up to 13, but there are 11 clusters"),
        ({"prototypes": torch.zeros(4, 3)}, r"prototypes have shape \(4, 3\); they must be \[K, 24\]"),
        ({"teacher": torch.zeros(4, 3)}, r"teacher has shape \(4, 3\); it must be \[11, width\]"),
        ({"teacher": torch.zeros(K, 3, dtype=torch.int64)}, "teacher are torch.int64; they must be float32"),
        ({"features": torch.zeros(0, WIDTH), "assignments": ASSIGNED[:0]}, r"features have shape \(0, 24\)"),
        ({"features": torch.zeros(N, WIDTH, dtype=torch.int64)}, "features are torch.int64"),
        ({"scale": torch.ones(2)}, r"scale has shape \(2,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            proto_clip_loss(**(tensors | change))
    for assignments, message in ((ASSIGNED[:3], "assignments has shape"), (ASSIGNED + 4, "assignments go up to 13, but there are 11")):
        with pytest.raises(ValueError, match=f"back_translate: {message}"):
            back_translate(tensors["features"], assignments, K)
    for clusters in (2.0, 0):
        with pytest.raises(ValueError, match=f"back_translate: clusters={clusters}; it must be how many there are"):
            back_translate(tensors["features"], ASSIGNED, clusters)
