"""Rank consistency: against Plackett-Luce written out, rank by rank."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import PAIRS, WIDTH, differentiated, make
from torch.nn import functional as F

from fastvlp.losses import contrastive_loss, rank_clip_loss
from fastvlp_kernels._testing import error, forbid_large_tensors

BOTH = {"in_modal": 0.3, "cross_modal": 0.7}


def list_mle(scores, reference):
    """Mean over rows and ranks of -log of the probability that what is next in the order of ``reference`` is drawn next."""
    total = scores.new_zeros(())
    for row, order in zip(scores, reference.argsort(dim=1, descending=True, stable=True), strict=True):
        for d in range(len(order)):
            total = total - row[order[d:]].log_softmax(0)[0]
    return total / scores.numel()


def dense(tensors, options, dtype):
    x, y, scale = tensors["image"], tensors["text"], tensors["scale"].to(dtype)
    S, of_images, of_texts = (scale * product.to(dtype) for product in (x @ y.T, x @ x.T, y @ y.T))
    labels = torch.arange(len(S))
    loss = (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2
    in_modal = list_mle(of_images, of_texts) + list_mle(of_texts, of_images)
    return loss + options["in_modal"] * in_modal + options["cross_modal"] * (list_mle(S, S.T) + list_mle(S.T, S))


def ours(tensors, options):
    return rank_clip_loss(**tensors, **options)


@pytest.mark.parametrize("scale,likeness", [(7.0, 0.4), (100.0, 0.45), (80.0, 0.8)])
def test_value_and_gradients(scale, likeness):
    tensors, _ = make("clip", scale, likeness, torch.float64)
    assert set(assert_exact(ours, dense, tensors, BOTH)) == {"loss", "image", "text", "scale"}


@pytest.mark.parametrize(
    "options", [BOTH | {"impl": "reference"}, {"in_modal": 0.5, "cross_modal": 0.0}, {"in_modal": 0.0, "cross_modal": 0.5}]
)
def test_each_consistency_alone_and_the_reference(options):
    tensors, _ = make("clip", 10.0, 0.4, torch.float64)
    assert_exact(ours, dense, tensors, options)


def test_small_losses():
    """Orders that both matrices share and that are sure: little is left of the rank loss, and expm1 keeps its digits."""
    angles = torch.linspace(0, 0.6, 5, dtype=torch.float64) ** 2
    tensors = {name: torch.stack([angles.cos(), angles.sin()], 1) * 100 for name in ("image", "text")}
    tensors["scale"] = torch.tensor(2.0, dtype=torch.float64)
    options = {"in_modal": 1.0, "cross_modal": 1.0}
    exact = assert_exact(ours, dense, tensors, options, rtol=1e-6)
    assert 1e-4 < exact["loss"] - contrastive_loss(**tensors) < exact["loss"] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale,likeness", [(7.0, 0.4), (100.0, 0.45), (80.0, 0.8)])
def test_no_worse_than_eager(scale, likeness, dtype):
    tensors, _ = make("clip", scale, likeness, dtype)
    assert_rounded_like_eager(ours, dense, tensors, BOTH, 4 * torch.finfo(torch.float32).eps * scale)


def test_without_weights_it_is_clip():
    tensors, _ = make("clip", 100.0, 0.45, torch.float32)
    clip = differentiated(lambda leaves, _: contrastive_loss(**leaves), tensors, {})
    for name, value in differentiated(ours, tensors, {"in_modal": 0.0, "cross_modal": 0.0}).items():
        assert torch.equal(value, clip[name]), name


def test_modalities_that_rank_alike_lose_less():
    image, text = (make("clip", 10.0, 0.4, torch.float64)[0][name] for name in ("image", "text"))
    term = [rank_clip_loss(image, y, 10.0, in_modal=1.0, cross_modal=0.0) - contrastive_loss(image, y, 10.0) for y in (image, text)]
    assert term[0] < term[1]


def test_equal_similarities_keep_the_order_of_columns():
    image, text = torch.ones(4, 3, dtype=torch.float64), F.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1)
    assert_exact(ours, dense, {"image": image, "text": text, "scale": torch.tensor(5.0).double()}, BOTH)


def test_chunks_of_rows():
    """700 rows are two chunks: the same as one row at a time by another formula."""
    N = 700
    generator = torch.Generator().manual_seed(1)
    image, text = (F.normalize(torch.randn(N, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    tensors = {"image": image, "text": text, "scale": torch.tensor(9.0).double()}

    def chunked(leaves, options, dtype):
        x, y, scale = leaves.values()
        loss = contrastive_loss(x, y, scale)
        for weight, A, B in ((0.3, scale * x @ x.T, scale * y @ y.T), (0.7, scale * x @ y.T, scale * y @ x.T)):
            for scores, reference in ((A, B), (B, A)):
                ranked = scores.gather(1, reference.argsort(dim=1, descending=True, stable=True))
                loss = loss + weight * (ranked.flip(1).logcumsumexp(1).flip(1) - ranked).mean()
        return loss

    assert_exact(ours, chunked, tensors, BOTH)


def test_no_matrix_of_all_pairs():
    N = 1800
    image, text = (F.normalize(torch.randn(N, 4), dim=1).requires_grad_() for _ in range(2))
    with forbid_large_tensors(N * N // 8):
        rank_clip_loss(image, text, torch.tensor(10.0, requires_grad=True)).backward()


def test_autocast_rounds_operands_only():
    tensors, _ = make("clip", 50.0, 0.45, torch.float32)
    found = differentiated(ours, tensors, BOTH, autocast=True)
    rounded = {name: (tensor.bfloat16() if tensor.ndim else tensor).double() for name, tensor in tensors.items()}
    for name, value in differentiated(dense, rounded, BOTH, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 50, name


def test_compiles_into_one_graph():
    tensors, _ = make("clip", 10.0, 0.4, torch.float32)
    eager = differentiated(ours, tensors, BOTH)
    for name, value in differentiated(torch.compile(ours, backend="aot_eager", fullgraph=True), tensors, BOTH).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_refusals():
    tensors, _ = make("clip", 10.0, 0.4, torch.float32)
    for change, message in (
        ({"in_modal": -0.1}, "in_modal=-0.1; it must be 0"),
        ({"in_modal": float("nan")}, "in_modal=nan; it must be 0"),
        ({"cross_modal": -0.1}, "cross_modal=-0.1; it must be 0"),
        ({"text": torch.zeros(5, WIDTH)}, f"{PAIRS} images but 5 texts"),
        ({"scale": torch.ones(2)}, r"scale has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_clip_loss(**(tensors | change))


def test_eps_of_the_authors_code():
    """log(sum of exp(A - max) + eps), written out; at scale 100 it is far from the likelihood."""
    image, text = (F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64), dim=1) for k in (0, 1))
    scale, eps = torch.tensor(100.0, dtype=torch.float64), 1e-10
    leaves = [side.requires_grad_() for side in (image, text, scale)]

    def one(A, B):
        ranked = A.gather(1, B.argsort(dim=1, descending=True))
        ranked = ranked - ranked.max(1, keepdim=True).values
        return ((ranked.exp().flip(1).cumsum(1).flip(1) + eps).log() - ranked).mean()

    S = scale * image @ text.T
    exact = contrastive_loss(image, text, scale) + (one(S, S.T) + one(S.T, S)) / 16
    found = rank_clip_loss(image, text, scale, in_modal=0.0, eps=eps)
    assert abs(found - rank_clip_loss(image, text, scale, in_modal=0.0)) > 1e-2
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)
    for mine, want in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-8, atol=1e-10)
