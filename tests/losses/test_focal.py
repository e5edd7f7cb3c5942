"""The focal loss on sigmoids: against its formula over the whole matrix."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import PAIRS, WIDTH, differentiated, make
from torch.nn import functional as F

from fastvlp.losses import SigLipLoss, focal_sigmoid_loss
from fastvlp_kernels._testing import error, forbid_large_tensors

# (scale, bias, likeness): the last loss is below 0.01, where 1 - p has to keep its digits.
CASES = [(10.0, -4.0, 0.4), (100.0, -30.0, 0.45), (100.0, -60.0, 0.9)]


def dense(tensors, options, dtype):
    S = tensors["scale"].to(dtype) * (tensors["image"] @ tensors["text"].T).to(dtype) + tensors["bias"].to(dtype)
    signs = 2 * torch.eye(len(S), dtype=dtype) - 1
    return ((-signs * S).sigmoid() ** options["gamma"] * -F.logsigmoid(signs * S)).sum() / len(S)


def ours(tensors, options):
    return focal_sigmoid_loss(**tensors, **options)


def pairs(scale, bias, likeness, dtype):
    tensors, _ = make("clip", scale, likeness, dtype)
    return tensors | {"bias": torch.full_like(tensors["scale"], bias)}


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case, gamma):
    exact = assert_exact(ours, dense, pairs(*case, torch.float64), {"gamma": gamma})
    assert set(exact) == {"loss", "image", "text", "scale", "bias"}
    assert case != CASES[-1] or 0 < exact["loss"] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_eager(case, dtype):
    assert_rounded_like_eager(ours, dense, pairs(*case, dtype), {"gamma": 2.0}, 4 * torch.finfo(torch.float32).eps * case[0])


def test_no_focus_is_siglip():
    tensors = pairs(10.0, -4.0, 0.4, torch.float64)
    siglip = differentiated(lambda leaves, _: SigLipLoss()(*leaves.values()), tensors, {})
    found = differentiated(ours, tensors, {"gamma": 0.0})
    for name, value in siglip.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14, msg=name)


def test_tiles_of_a_large_batch():
    """1,100 pairs are nine tiles, the last ones cut off, and only three of them hold pairs."""
    generator = torch.Generator().manual_seed(1)
    image, text = (F.normalize(torch.randn(1100, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    tensors = {"image": image, "text": text, "scale": torch.tensor(9.0).double(), "bias": torch.tensor(-2.0).double()}
    assert_exact(ours, dense, tensors, {"gamma": 1.5})


def test_no_matrix_of_all_pairs():
    N = 1800
    image, text = (F.normalize(torch.randn(N, 4), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    with forbid_large_tensors(N * N // 8):
        focal_sigmoid_loss(image, text, scale, bias).backward()


def test_autocast_rounds_operands_only():
    tensors = pairs(50.0, -10.0, 0.45, torch.float32)
    found = differentiated(ours, tensors, {"gamma": 2.0}, autocast=True)
    rounded = {name: (tensor.bfloat16() if tensor.ndim else tensor).double() for name, tensor in tensors.items()}
    for name, value in differentiated(dense, rounded, {"gamma": 2.0}, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 50, name


def test_compiles_into_one_graph():
    tensors = pairs(10.0, -4.0, 0.4, torch.float32)
    eager = differentiated(ours, tensors, {"gamma": 2.0})
    for name, value in differentiated(torch.compile(ours, backend="aot_eager", fullgraph=True), tensors, {"gamma": 2.0}).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_refusals():
    tensors = pairs(10.0, -4.0, 0.4, torch.float32)
    for change, message in (
        ({"gamma": -1.0}, "gamma=-1.0; it must be 0"),
        ({"gamma": float("nan")}, "gamma=nan; it must be 0"),
        ({"text": torch.zeros(5, WIDTH)}, f"{PAIRS} images but 5 texts"),
        ({"bias": torch.zeros(2)}, r"bias has shape \(2,\)"),
        ({"image": torch.zeros(PAIRS, WIDTH, dtype=torch.int64)}, "image_features is torch.int64"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            focal_sigmoid_loss(**(tensors | change))
