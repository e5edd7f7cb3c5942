"""ProLIP's objectives: against loops over pairs and features, numerical integrals, float64, and eager PyTorch in the same dtype."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastvlp.losses import gaussian_kl, inclusion_loss, log_inclusion, prolip_loss
from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors

NAMES = ("image_mean", "image_log_variance", "text_mean", "text_log_variance", "scale", "bias")


def gaussians(M=13, N=13, D=24, scale=10.0, bias=-10.0, likeness=0.4, dtype=torch.float64):
    """Pairs that have ``likeness`` of their means in common, and variances that matter: their sums lie around 0.2."""
    random = torch.Generator().manual_seed(0)
    common, *noise = (torch.randn(n, D, generator=random, dtype=torch.float64) for n in (max(M, N), M, N))
    image, text = (F.normalize(likeness * common[: len(own)] + (1 - likeness) * own, dim=1) for own in noise)
    spread = (torch.randn(n, D, generator=random, dtype=torch.float64) - math.log(8 * D) for n in (M, N))
    tensors = [image, next(spread), text, next(spread)]
    scalars = [torch.tensor(value, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for value in (scale, bias)]
    return [*(tensor.to(dtype) for tensor in tensors), *scalars]


def dense(image, image_spread, text, text_spread, scale, bias):
    """By the definition: variances of all pairs and features are added up in a tensor [M, N, D]; products in the dtype of the features."""
    wide = scale.dtype
    variances = (image_spread.exp()[:, None] + text_spread.exp()).sum(-1)
    logits = scale * ((image @ text.T).to(wide) - variances.to(wide) / 2) + bias
    sign = 2 * torch.eye(*logits.shape, dtype=wide) - 1
    return -F.logsigmoid(sign * logits).sum() / min(logits.shape)


def differentiated(function, tensors, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_value_by_loops(impl):
    """|mu - mu'|^2 + sums of variances, pair by pair: its half, less the 1 of normalised means, is what the scale multiplies."""
    image, image_spread, text, text_spread, scale, bias = gaussians(3, 4, 2)
    total = 0.0
    for i in range(3):
        for j in range(4):
            distance = sum(float(image[i, d] - text[j, d]) ** 2 for d in range(2))
            distance += sum(math.exp(image_spread[i, d]) + math.exp(text_spread[j, d]) for d in range(2))
            logit = float(scale) * (1 - distance / 2) + float(bias)
            total += math.log1p(math.exp(-logit if i == j else logit))
    found = prolip_loss(image, image_spread, text, text_spread, scale, bias, impl=impl)
    assert found.item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("sizes", [(13, 13), (13, 17), (19, 13)])
@pytest.mark.parametrize("scale,bias,likeness,least", [(10.0, -10.0, 0.4, 0.1), (100.0, -20.0, 0.4, 0.1), (90.0, -45.0, 0.8, 0.0)])
def test_value_and_gradients(sizes, scale, bias, likeness, least):
    """At scale 100, for a loss below 0.01, and for M != N."""
    tensors = gaussians(*sizes, scale=scale, bias=bias, likeness=likeness)
    exact, found = differentiated(dense, tensors), differentiated(prolip_loss, tensors)
    assert exact[0] > least and (likeness < 0.8 or exact[0] < 0.01)
    for name, one, other in zip(("loss", *NAMES), found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * other.abs().max().item(), msg=name)


def test_gradcheck():
    tensors = [tensor.requires_grad_() for tensor in gaussians(4, 5, 3, scale=5.0, bias=-1.0)]
    assert torch.autograd.gradcheck(prolip_loss, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale,bias,likeness", [(10.0, -10.0, 0.4), (100.0, -20.0, 0.4), (90.0, -45.0, 0.8)])
def test_no_worse_than_eager(dtype, scale, bias, likeness):
    """What is allowed beyond eager's error are four roundings of a logit, and in bfloat16 one of the gradient."""
    tensors = gaussians(31, 29, scale=scale, bias=bias, likeness=likeness, dtype=dtype)
    exact = differentiated(dense, [tensor.double() for tensor in tensors])
    eager, found = differentiated(dense, tensors), differentiated(prolip_loss, tensors)
    for name, one, other, right, tensor in zip(("loss", *NAMES), found, eager, exact, [tensors[-1], *tensors], strict=True):
        assert one.dtype == tensor.dtype
        tol = 4 * torch.finfo(torch.float32).eps * scale + (2**-9 if one.dtype == torch.bfloat16 else 0.0)
        assert_no_worse_than(one, other, right, tol, name)


def test_16_bits_round_the_means_products_alone():
    """Sums of variances and their gradients are float32: the loss of bfloat16 inputs is that of their values in float64."""
    tensors = gaussians(31, 29, scale=100.0, bias=-20.0, dtype=torch.bfloat16)
    exact, found = differentiated(dense, [tensor.double() for tensor in tensors]), differentiated(prolip_loss, tensors)
    for name, one, other in zip(("loss", *NAMES), found, exact, strict=True):
        assert max(error(one, other)) < (2**-8 if one.dtype == torch.bfloat16 else 2e-6), name


def test_autocast_and_towers_of_two_dtypes():
    tensors = [tensor.float() for tensor in gaussians()]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = prolip_loss(tensors[0].bfloat16(), *tensors[1:])
        found = prolip_loss(*tensors)
    assert torch.equal(mixed, found) and torch.equal(found, prolip_loss(*tensors, compute_dtype=torch.bfloat16))
    with pytest.raises(
        TypeError, match="image_features are torch.bfloat16, text_features torch.float32; cast one of them, or use autocast"
    ):
        prolip_loss(tensors[0].bfloat16(), *tensors[1:])


def test_nothing_of_the_size_of_all_pairs():
    tensors = [tensor.requires_grad_() for tensor in gaussians(3000, 2900, 8, dtype=torch.float32)]
    with forbid_large_tensors(3000 * 2900 // 4):
        prolip_loss(*tensors).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)


def test_only_what_needs_a_gradient_gets_one_and_it_compiles():
    tensors = [tensor.float() for tensor in gaussians()]
    tensors[3].requires_grad_()
    want = torch.autograd.grad(prolip_loss(*tensors), tensors[3])
    compiled = torch.compile(prolip_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors[3]), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mean,log_variance,mean_of,log_variance_of", [
    (0.3, -0.5, 1.2, 0.7), (0.5, 1.0, -1.0, -0.3), (0.0, -2.0, 0.0, 1.0), (0.1, 0.4, 0.3, 0.4), (0.0, -4.0, 0.5, 2.0),
])  # fmt: skip
def test_log_inclusion_is_the_ratio_of_the_integrals(mean, log_variance, mean_of, log_variance_of):
    line = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    given = [torch.tensor([value], dtype=torch.float64) for value in (mean, log_variance, mean_of, log_variance_of)]
    p, q = (torch.distributions.Normal(m, (s / 2).exp()).log_prob(line).exp() for m, s in (given[:2], given[2:]))
    want = math.log((p * p * q).sum() / (p * q * q).sum())
    assert log_inclusion(*given).item() == pytest.approx(want, abs=1e-9)
    assert log_inclusion(*given[2:], *given[:2]).item() == pytest.approx(-want, abs=1e-9)
    assert torch.autograd.gradcheck(log_inclusion, [tensor.requires_grad_() for tensor in given])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inclusion_keeps_its_digits(dtype):
    """Narrow Gaussians (variances around e^-10, as ProLIP's start) of nearly equal width, as four integrals lose them."""
    random = torch.Generator().manual_seed(0)
    mean, other = (torch.randn(2, 40, 16, generator=random, dtype=torch.float64) / 10).to(dtype)
    spread = torch.randn(40, 16, generator=random, dtype=torch.float64) - 10
    given = [mean, spread.to(dtype), other, (spread + 1e-2 * torch.randn(40, 16, generator=random, dtype=torch.float64)).to(dtype)]
    exact = log_inclusion(*(tensor.double() for tensor in given))
    found = log_inclusion(*given)
    assert found.dtype == torch.float32 and max(error(found, exact)) < 1e-5


@pytest.mark.parametrize("by_feature", [False, True])
def test_inclusion_loss(by_feature):
    random = torch.Generator().manual_seed(0)
    given = [torch.randn(5, 3, generator=random, dtype=torch.float64) for _ in range(4)]
    h = log_inclusion(*given)
    terms = [h[i, d].item() for i in range(5) for d in range(3)] if by_feature else [h[i].sum().item() for i in range(5)]
    want = sum(math.log1p(math.exp(-3 * term)) for term in terms) / len(terms)
    assert inclusion_loss(*given, 3.0, by_feature=by_feature).item() == pytest.approx(want, rel=1e-12)
    inside = inclusion_loss(given[0], given[1] - 9, given[0], given[1], 1000.0, by_feature=by_feature)
    assert inside == 0 and inclusion_loss(given[0], given[1], given[0], given[1] - 9, 1000.0, by_feature=by_feature) > 1000


def test_gaussian_kl():
    random = torch.Generator().manual_seed(0)
    mean, spread = (torch.randn(6, 5, generator=random, dtype=torch.float64) for _ in range(2))
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (spread / 2).exp()), normal(torch.zeros_like(mean), 1.0)).mean()
    torch.testing.assert_close(gaussian_kl(mean, spread), want, rtol=1e-12, atol=0.0)
    small = gaussian_kl(torch.zeros(4, 4), torch.full((4, 4), 1e-3))
    assert small.item() == pytest.approx((math.expm1(1e-3) - 1e-3) / 2, rel=1e-3)


def test_what_the_authors_code_has_instead():
    """It adds up 2 s + t where the integral of p^2 q has half of that, has e^-10 before inverse variances, and halves them in the KL."""
    random = torch.Generator().manual_seed(0)
    m, s, n, t = (torch.randn(6, 5, generator=random, dtype=torch.float64) for _ in range(4))

    def inside(m, s, n, t):
        p, q = (-s - 10).exp(), (-t - 10).exp()
        a, b, c = p + q / 2, 2 * m * p + n * q, m * m * p + n * n * q / 2
        return -2 * s - t - a.log() / 2 + b * b / (4 * a) - c

    near = math.exp(-5)
    torch.testing.assert_close(inside(m, s, n, t) - inside(n, t, m, s), (t - s) / 2 + log_inclusion(near * m, s, near * n, t))
    torch.testing.assert_close(-(1 + s / 2 - m * m - (s / 2).exp()).mean() / 2, gaussian_kl(m, s / 2))


MEAN, SPREAD = torch.ones(4, 6), torch.zeros(4, 6)
REFUSED = [
    ((MEAN, SPREAD, torch.ones(4, 5), torch.ones(4, 5), 1.0), ValueError, "images have 6 features and texts 5; project both towers"),
    ((MEAN, SPREAD[:, :1], MEAN, SPREAD, 1.0), ValueError, r"image_mean has shape \(4, 6\) and image_log_variance \(4, 1\)"),
    ((MEAN, SPREAD, MEAN, SPREAD.long(), 1.0), TypeError, "text_log_variance is torch.int64; it must be float32"),
    ((MEAN, SPREAD, MEAN, SPREAD.to("meta"), 1.0), ValueError, "text_mean is on cpu but text_log_variance is on meta"),
    ((MEAN[:0], SPREAD[:0], MEAN, SPREAD, 1.0), ValueError, "the batch is empty"),
    ((MEAN[0], SPREAD[0], MEAN, SPREAD, 1.0), ValueError, r"has shape \(6,\); it must be a matrix"),
    ((MEAN, SPREAD, MEAN, SPREAD, torch.ones(2)), ValueError, r"scale has shape \(2,\)"),
    ((MEAN, SPREAD, MEAN, SPREAD, 1.0, "0"), TypeError, "bias is str; it must be a number"),
]


@pytest.mark.parametrize("args,kind,message", REFUSED, ids=[case[2][:30] for case in REFUSED])
def test_refusals(args, kind, message):
    with pytest.raises(kind, match=message):
        prolip_loss(*args)


def test_refusals_of_the_regularisers():
    with pytest.raises(ValueError, match=r"log_inclusion: mean has shape \(4, 6\) and mean_of \(3, 6\)"):
        inclusion_loss(MEAN, SPREAD, MEAN[:3], SPREAD[:3])
    with pytest.raises(ValueError, match="scale=-1.0; it must be positive"):
        inclusion_loss(MEAN, SPREAD, MEAN, SPREAD, -1.0)
    with pytest.raises(ValueError, match=r"gaussian_kl: mean has shape \(0, 6\); at least one row"):
        gaussian_kl(MEAN[:0], SPREAD[:0])


def test_inclusion_as_the_authors_train_it():
    """From their two quadratic forms, whose difference log_inclusion simplifies."""
    random = torch.Generator().manual_seed(3)
    mu, s, mu_of, s_of = (0.3 * torch.randn(5, 4, generator=random, dtype=torch.float64) for _ in range(4))

    def inside(mean, log_variance, other, other_log_variance):
        first, second = (torch.exp(-10 - part) for part in (log_variance, other_log_variance))  # precisions
        width = first + second / 2
        cross = 2 * mean * first + other * second
        rest = mean.square() * first + other.square() * second / 2
        return -2 * log_variance - other_log_variance - width.log() / 2 + cross.square() / (4 * width) - rest

    h = inside(mu, s, mu_of, s_of) - inside(mu_of, s_of, mu, s)
    torch.testing.assert_close(log_inclusion(mu, s, mu_of, s_of, released=True), h, rtol=1e-9, atol=1e-12)
    want = torch.nn.functional.softplus(-3 * h).mean()
    torch.testing.assert_close(inclusion_loss(mu, s, mu_of, s_of, 3.0, by_feature=True, released=True), want, rtol=1e-9, atol=0)
