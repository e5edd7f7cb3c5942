"""DreamLIP's groups of patches: against loops over images and sub-captions."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import differentiated
from torch.nn import functional as F

from fastvlp.losses import group_patches, grouping_loss
from fastvlp.losses import grouping as grouping_module
from fastvlp_kernels._testing import error, forbid_large_tensors
from fastvlp_kernels.packed import Packed

PATCHES, CAPTIONS, WIDTH = (9, 4, 6, 16, 0, 30, 1), (3, 1, 2, 0, 0, 4, 1), 8
CASES = [(7.0, 0.3), (100.0, 0.3), (100.0, 0.5)]  # the last loss is below 0.01 with a threshold of 0.5


def pairs(scale, likeness, dtype):
    """Sub-captions, and patches each of which has ``likeness`` in common with one of its image's sub-captions; not normalised."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.randn(sum(CAPTIONS), WIDTH, generator=generator, dtype=torch.float64)
    patches, start = torch.randn(sum(PATCHES), WIDTH, generator=generator, dtype=torch.float64), 0
    for own, count in zip(patches.split(PATCHES), CAPTIONS, strict=True):
        for p in range(len(own) if count else 0):
            own[p] = likeness * captions[start + p % count] + (1 - likeness) * own[p]
        start += count
    tensors = {"patches": patches.to(dtype), "captions": captions.to(dtype)}
    return tensors | {"scale": torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)}


def dense_groups(tensors, threshold, dtype):
    """Groups and normalised sub-captions, with the operands of products in the dtype of the features."""

    def product(a, b):
        return (a.to(tensors["patches"].dtype) @ b.to(tensors["patches"].dtype)).to(dtype)

    groups = []
    patches, captions = (F.normalize(tensors[name].to(dtype), dim=1) for name in ("patches", "captions"))
    for own, words in zip(patches.split(PATCHES), captions.split(CAPTIONS), strict=True):
        for word in words:
            s = product(own, word)
            weight = (s - s.min()) / (s.max() - s.min()) if len(s) > 1 else torch.ones_like(s)
            weight = torch.where(weight < (1 / len(s) if threshold is None else threshold), 0.0, weight)
            groups.append(F.normalize(product(weight / weight.sum(), own), dim=0))
    return torch.stack(groups), captions


def dense(tensors, options, dtype):
    groups, captions = dense_groups(tensors, options.get("threshold", 0.1), dtype)
    features = tensors["patches"].dtype
    S, labels = tensors["scale"].to(dtype) * (groups.to(features) @ captions.to(features).T).to(dtype), torch.arange(len(groups))
    return (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2


def packed(tensors):
    return Packed.of(tensors["patches"], PATCHES), Packed.of(tensors["captions"], CAPTIONS)


def ours(tensors, options):
    return grouping_loss(*packed(tensors), tensors["scale"], **options)


@pytest.mark.parametrize("options", [{}, {"impl": "reference"}, {"threshold": None}, {"threshold": 0.0}, {"threshold": 1.0}], ids=str)
@pytest.mark.parametrize("scale,likeness", CASES)
def test_value_and_gradients(scale, likeness, options):
    exact = assert_exact(ours, dense, pairs(scale, likeness, torch.float64), options)
    assert set(exact) == {"loss", "patches", "captions", "scale"}


def test_small_losses():
    exact = assert_exact(ours, dense, pairs(*CASES[-1], torch.float64), {"threshold": 0.5}, rtol=1e-6)
    assert 1e-4 < exact["loss"] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale,likeness", CASES)
def test_no_worse_than_eager(scale, likeness, dtype):
    assert_rounded_like_eager(ours, dense, pairs(scale, likeness, dtype), {}, 4 * torch.finfo(torch.float32).eps * scale)


@pytest.mark.parametrize("limit", [1, 40])
def test_groups_do_not_depend_on_batches(monkeypatch, limit):
    tensors = pairs(10.0, 0.4, torch.float64)
    monkeypatch.setattr(grouping_module, "TOKENS", limit)
    found = group_patches(*packed(tensors))
    torch.testing.assert_close(found.x, dense_groups(tensors, 0.1, torch.float64)[0], rtol=1e-12, atol=1e-14)
    assert found.lengths.tolist() == list(CAPTIONS)


def test_only_products_of_a_pair_are_made():
    images, patches, captions = 120, 50, 12
    p, c = (torch.randn(images * count, 4).requires_grad_() for count in (patches, captions))
    with forbid_large_tensors((images * captions) ** 2 // 8) as seen:
        grouping_loss(Packed.of(p, [patches] * images), Packed.of(c, [captions] * images), torch.tensor(9.0, requires_grad=True)).backward()
    assert seen.largest < images * captions * images * patches // 8


def test_patches_that_are_all_alike_weigh_the_same():
    patch, caption = torch.randn(1, 6).double(), torch.randn(2, 6).double()
    found = group_patches(Packed.of(patch.expand(5, 6).contiguous(), [5]), Packed.of(caption, [2]))
    torch.testing.assert_close(found.x, F.normalize(patch, dim=1).expand(2, 6))


def test_autocast_rounds_the_product_only():
    tensors = pairs(20.0, 0.4, torch.float32)
    found = differentiated(ours, tensors, {}, autocast=True)

    def rounded(leaves, _, dtype):
        """The product of rounded operands, differentiated as if rounding were none."""
        groups, captions = (side + (side.float().bfloat16().double() - side).detach() for side in dense_groups(leaves, 0.1, dtype))
        S, labels = leaves["scale"] * groups @ captions.T, torch.arange(len(groups))
        return (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2

    # An operand may be rounded the other way where float32 and float64 lie on the two sides of a tie.
    for name, value in differentiated(rounded, {name: tensor.double() for name, tensor in tensors.items()}, {}, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 20, name


def test_refusals():
    tensors = pairs(10.0, 0.4, torch.float32)
    patches, captions = packed(tensors)
    for arguments, options, message in (
        ((tensors["patches"], captions), {}, "patches is Tensor; it must be Packed"),
        ((patches, Packed.of(captions.x, [len(captions.x)])), {}, "patches of 7 images, sub-captions of 1"),
        ((patches, Packed.of(captions.x, (3, 1, 2, 0, 1, 3, 1))), {}, "image 4 has sub-captions but no patches"),
        ((patches, captions.replace(x=captions.x[:, :5])), {}, "x has width 8 and y has width 5"),
        ((patches, captions), {"threshold": 1.5}, "threshold=1.5; it must be from 0 to 1, or None"),
        ((patches, Packed.of(captions.x[:0], [0] * 7)), {}, "there are no sub-captions"),
        ((patches, captions, torch.ones(3)), {}, r"scale has shape \(3,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            grouping_loss(*arguments, **options)
