"""FILIP: against all products of tokens, pair by pair."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import differentiated
from torch.nn import functional as F

from fastvlp.losses import filip_loss
from fastvlp_kernels._testing import error, forbid_large_tensors
from fastvlp_kernels.packed import Packed

IMAGES, TEXTS, WIDTH = (5, 1, 9, 4, 7, 3, 6), (3, 2, 1, 6, 4, 2, 5), 24
EMPTY = {"image_lengths": (5, 0, 9, 4, 0, 3, 6), "text_lengths": (3, 2, 1, 0, 0, 2, 5)}
SMALL = 0.54  # the likeness that brings the loss below 0.01 at scale 100


def tokens(scale, likeness, dtype, image_lengths=IMAGES, text_lengths=TEXTS):
    """Normalised tokens of pairs that have ``likeness`` in common."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(len(image_lengths), WIDTH, generator=generator, dtype=torch.float64)
    tensors = {}
    for name, lengths in (("image", image_lengths), ("text", text_lengths)):
        noise = torch.randn(sum(lengths), WIDTH, generator=generator, dtype=torch.float64)
        shared = common.repeat_interleave(torch.tensor(lengths), 0)
        tensors[name] = F.normalize(likeness * shared + (1 - likeness) * noise, dim=1).to(dtype)
    return tensors | {"scale": torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)}


def dense(tensors, options, dtype):
    """Scores by two loops, cross-entropies row by row among those who have tokens."""
    images, texts = (tensors[name].split(options.get(f"{name}_lengths", default)) for name, default in (("image", IMAGES), ("text", TEXTS)))
    scale, N = tensors["scale"].to(dtype), len(images)
    parts = []
    for rows, columns in ((images, texts), (texts, images)):
        filled = [n for n in range(N) if len(columns[n])]
        losses = []
        for m in range(N):
            if len(rows[m]) and len(columns[m]):
                scores = torch.stack([(rows[m] @ columns[n].T).to(dtype).amax(1).mean() for n in filled])
                losses.append(F.cross_entropy(scale * scores[None], torch.tensor([filled.index(m)])))
        parts.append(sum(losses) / len(losses))
    return (parts[0] + parts[1]) / 2


def packed(tensors, options):
    image = Packed.of(tensors["image"], options.get("image_lengths", IMAGES))
    return image, Packed.of(tensors["text"], options.get("text_lengths", TEXTS))


def ours(tensors, options):
    return filip_loss(*packed(tensors, options), tensors["scale"])


@pytest.mark.parametrize("options", [{}, EMPTY], ids=["all", "empty segments"])
@pytest.mark.parametrize("scale,likeness", [(7.0, 0.3), (100.0, 0.4), (100.0, SMALL)])
def test_value_and_gradients(scale, likeness, options):
    exact = assert_exact(ours, dense, tokens(scale, likeness, torch.float64, **options), options)
    assert set(exact) == {"loss", "image", "text", "scale"}
    assert likeness != SMALL or 1e-5 < exact["loss"] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale,likeness", [(7.0, 0.3), (100.0, 0.4), (100.0, SMALL)])
def test_no_worse_than_eager(scale, likeness, dtype):
    tensors = tokens(scale, likeness, dtype)
    assert_rounded_like_eager(ours, dense, tensors, {}, 4 * torch.finfo(torch.float32).eps * scale)


def test_autocast_rounds_operands_only():
    tensors = tokens(20.0, 0.4, torch.float32)
    found = differentiated(ours, tensors, {}, autocast=True)
    rounded = {name: (tensor.bfloat16() if tensor.ndim > 1 else tensor).double() for name, tensor in tensors.items()}
    for name, value in differentiated(dense, rounded, {}, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 20, name


@pytest.mark.parametrize("sides", ["image", "text", "both"])
def test_a_merged_token_counts_as_often_as_it_says(sides):
    """Sizes are repetitions: the loss and the gradient of the tokens that are repeated, with nothing merged."""
    tensors = {name: tensor.requires_grad_() for name, tensor in tokens(20.0, 0.4, torch.float64).items()}
    merged, repeated = [], []
    for name, lengths in (("image", IMAGES), ("text", TEXTS)):
        sizes = 1 + torch.arange(sum(lengths)) % 3 if sides in (name, "both") else torch.ones(sum(lengths), dtype=torch.int64)
        merged.append(Packed.of(tensors[name], lengths, size=sizes.float() if sides in (name, "both") else None))
        counts = torch.stack([part.sum() for part in sizes.split(lengths)])
        repeated.append(Packed.of(tensors[name].repeat_interleave(sizes, 0), counts))
    found, expected = (filip_loss(*pair, tensors["scale"]) for pair in (merged, repeated))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss, list(tensors.values())) for loss in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_products_of_tokens_are_not_stored():
    """Of 64 x 64 pairs with 49 x 12 tokens; what is stored are the 64 x 64 scores."""
    image, text = (F.normalize(torch.randn(64 * length, 4), dim=1).requires_grad_() for length in (49, 12))
    with forbid_large_tensors(64 * 49 * 64 * 12 // 8):
        filip_loss(Packed.of(image, [49] * 64), Packed.of(text, [12] * 64), torch.tensor(10.0, requires_grad=True)).backward()


def test_compiles_into_one_graph():
    tensors = tokens(10.0, 0.4, torch.float32)
    segments = packed(tensors, {})

    def loss(leaves, _):
        return filip_loss(*(part.replace(x=leaves[name]) for part, name in zip(segments, ("image", "text"), strict=True)), leaves["scale"])

    eager = differentiated(loss, tensors, {})
    for name, value in differentiated(torch.compile(loss, backend="aot_eager", fullgraph=True), tensors, {}).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_one_pair_and_pairs_without_tokens_lose_nothing():
    for image_lengths, text_lengths in (((3,), (2,)), ((3, 0), (0, 2)), ((0, 0), (0, 0))):
        tensors = tokens(10.0, 0.5, torch.float32, image_lengths, text_lengths)
        found = differentiated(ours, tensors, {"image_lengths": image_lengths, "text_lengths": text_lengths})
        assert all(not value.any() for value in found.values())


def test_a_locked_tower_gets_no_gradient():
    tensors = tokens(10.0, 0.4, torch.float32)
    tensors["text"].requires_grad_()
    ours(tensors, {}).backward()
    assert tensors["text"].grad is not None and tensors["image"].grad is None


def test_refusals():
    tensors = tokens(10.0, 0.4, torch.float32)
    image, text = packed(tensors, {})
    for arguments, message in (
        ((tensors["image"], text), "image is Tensor; it must be Packed"),
        ((image, Packed.of(text.x, [len(text.x)])), "7 images and 1 texts; segments i of both are a pair"),
        ((image, text.replace(x=text.x[:, :5])), "width 24 and y has width 5"),
        ((image, text.replace(x=text.x.half())), "cast one of them, or use autocast"),
        ((image, text, torch.ones(3)), r"scale has shape \(3,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            filip_loss(*arguments)
