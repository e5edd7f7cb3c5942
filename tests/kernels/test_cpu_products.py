"""Products of bfloat16 operands on the CPU: what is rounded, and what is left as it was."""

import pytest
import torch

from fastvlp.losses import ClipLoss, SigLipLoss
from fastvlp.ops import pairwise_sigmoid, similarity_logsumexp
from fastvlp_kernels import _cpu_products


def made(n=640, width=64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1).to(dtype) for _ in range(2))
    return x, y


def softmax(x, y):
    row, col, positive = similarity_logsumexp(x, y, 20.0, offset=0)
    return (row + col - 2 * positive).sum() / 2


def sigmoid(x, y):
    return pairwise_sigmoid(x, y, 20.0, -10.0)


def exactly(x, y, kind):
    """Loss and its gradient by S in float64, of the operands as they are."""
    S = (20 * x.double() @ y.double().T).requires_grad_()
    if kind == "softmax":
        loss = (S.logsumexp(1) + S.logsumexp(0) - 2 * S.diagonal()).sum() / 2
    else:
        z = 2 * torch.eye(len(x), dtype=torch.float64) - 1
        loss = torch.nn.functional.softplus(-z * (S - 10), threshold=40).sum()
    return loss.detach(), torch.autograd.grad(loss, S)[0]


CASES = {
    "softmax in tiles": (softmax, 640, "softmax"), "sigmoid in tiles": (sigmoid, 640, "sigmoid"),
    "softmax, stored": (lambda x, y: ClipLoss()(x, y, 20.0) * len(x), 300, "softmax"),
    "sigmoid, stored": (lambda x, y: SigLipLoss()(x, y, 20.0, -10.0) * len(x), 300, "sigmoid"),
}


@pytest.mark.parametrize("case", CASES)
def test_only_operands_are_rounded(case):
    """The loss as in float32; of gradients the weights of the last product are rounded once, as is the result."""
    function, n, kind = CASES[case]
    x, y = (side.requires_grad_() for side in made(n))
    loss = function(x, y)
    loss.backward()
    expected, dS = exactly(x.detach(), y.detach(), kind)
    assert abs(loss.double() - expected) <= 1e-6 * expected
    half = 2.0**-8  # of a unit in the last place of bfloat16, relative
    for grad, weights, others in ((x.grad, dS, y.detach()), (y.grad, dS.T, x.detach())):
        right = 20 * weights @ others.double()
        bound = 20 * (weights.abs() @ others.double().abs()) * (half + 2e-6) + half * right.abs()
        assert ((grad.double() - right).abs() <= bound).all()


@pytest.mark.parametrize("case", CASES)
def test_float32_is_left_alone(case, monkeypatch):
    function, n, _ = CASES[case]
    x, y = made(n, dtype=torch.float32)
    with_them = function(x, y)
    monkeypatch.setattr(_cpu_products, "FAST", False)
    assert torch.equal(function(x, y), with_them)


@pytest.mark.skipif(not _cpu_products.FAST, reason="this CPU or this torch multiplies no bfloat16 with float32 results")
def test_the_setting_is_of_the_operator_alone():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with pytest.raises(ZeroDivisionError), _cpu_products.bf16_products(True):
        assert setting.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert setting.fp32_precision == before
    softmax(*made())
    assert setting.fp32_precision == before


@pytest.mark.parametrize("case", [name for name in CASES if "stored" in name])
def test_nothing_is_made_for_gradients_that_nobody_takes(case):
    """The scale of a model needs a gradient in an evaluation, too; one product is enough there."""
    _, n, kind = CASES[case]
    x, y = made(n)
    scale = torch.tensor(20.0, requires_grad=True)
    loss = ClipLoss() if kind == "softmax" else SigLipLoss()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        loss(x, y, scale)
    products = sum(event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    assert products == 1
