"""Softened targets: against the whole matrices of targets and similarities."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import PAIRS, WIDTH, differentiated, make
from torch.nn import functional as F

from fastvlp.losses import contrastive_loss, light_clip_loss, softness
from fastvlp_kernels._testing import error, forbid_large_tensors

CASES = [(7.0, 0.4), (100.0, 0.45), (80.0, 0.56)]


def dense(tensors, options, dtype):
    image, text, scale = tensors["image"], tensors["text"], tensors["scale"].to(dtype)
    S = scale * (image @ text.T).to(dtype)
    pair = torch.eye(len(S), dtype=torch.bool)
    sharpness = scale.detach() if options.get("target_scale") is None else options["target_scale"]
    parts = []
    for logits, anchors in ((S, image), (S.T, text)):
        alike = sharpness * (anchors @ anchors.T).to(dtype).detach()
        target = (1 - options["soft"]) * pair.to(dtype) + options["soft"] * alike.masked_fill(pair, -torch.inf).softmax(1)
        parts.append(F.cross_entropy(logits, target))
    return (parts[0] + parts[1]) / 2


def ours(tensors, options):
    return light_clip_loss(**tensors, **options)


@pytest.mark.parametrize(
    "options", [{"soft": 0.2}, {"soft": 0.2, "impl": "reference"}, {"soft": 1.0, "target_scale": 5.0}, {"soft": 0.0}], ids=str
)
@pytest.mark.parametrize("scale,likeness", CASES)
def test_value_and_gradients(scale, likeness, options):
    tensors, _ = make("clip", scale, likeness, torch.float64)
    exact = assert_exact(ours, dense, tensors, options)
    assert set(exact) == {"loss", "image", "text", "scale"}
    assert likeness != CASES[-1][1] or options["soft"] or exact["loss"] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale,likeness", CASES)
def test_no_worse_than_eager(scale, likeness, dtype):
    tensors, _ = make("clip", scale, likeness, dtype)
    assert_rounded_like_eager(ours, dense, tensors, {"soft": 0.3, "target_scale": 10.0}, 4 * torch.finfo(torch.float32).eps * scale)


def test_no_softness_is_clip():
    tensors, _ = make("clip", 100.0, 0.45, torch.bfloat16)
    clip = differentiated(lambda leaves, _: contrastive_loss(**leaves), tensors, {})
    for name, value in differentiated(ours, tensors, {"soft": 0.0}).items():
        assert torch.equal(value, clip[name]), name


def test_negatives_that_are_all_alike_are_label_smoothing():
    """target_scale=0 spreads evenly over the N - 1 negatives: smoothing by soft * N / (N - 1) over all N."""
    tensors, _ = make("clip", 10.0, 0.4, torch.float64)
    smoothed = contrastive_loss(**tensors, label_smoothing=0.2 * PAIRS / (PAIRS - 1))
    torch.testing.assert_close(light_clip_loss(**tensors, soft=0.2, target_scale=0.0), smoothed, rtol=1e-12, atol=0.0)


def test_one_pair_loses_nothing():
    pair = {"image": torch.randn(1, 4).double(), "text": torch.randn(1, 4).double(), "scale": torch.tensor(3.0).double()}
    found = differentiated(ours, pair, {"soft": 0.5})
    assert all(value.abs().max() < 1e-12 for value in found.values())


def test_no_matrix_of_all_pairs():
    N = 1800
    image, text = (F.normalize(torch.randn(N, 4), dim=1).requires_grad_() for _ in range(2))
    with forbid_large_tensors(N * N // 8):
        light_clip_loss(image, text, torch.tensor(10.0, requires_grad=True), soft=0.2).backward()


def test_autocast_rounds_operands_only():
    tensors, _ = make("clip", 50.0, 0.45, torch.float32)
    options = {"soft": 0.2, "target_scale": 10.0}
    found = differentiated(ours, tensors, options, autocast=True)
    rounded = {name: (tensor.bfloat16() if tensor.ndim else tensor).double() for name, tensor in tensors.items()}
    for name, value in differentiated(dense, rounded, options, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 50, name


def test_compiles_into_one_graph():
    (tensors, _), options = make("clip", 10.0, 0.4, torch.float32), {"soft": 0.2}
    eager = differentiated(ours, tensors, options)
    for name, value in differentiated(torch.compile(ours, backend="aot_eager", fullgraph=True), tensors, options).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_softness_grows_along_a_line():
    assert [softness(step, 10, 0.4) for step in (0, 5, 10, 20)] == [0.0, 0.2, 0.4, 0.4]
    for step, total in ((-1, 10), (0, 0)):
        with pytest.raises(ValueError, match=f"step={step} of total={total}"):
            softness(step, total, 0.4)
    with pytest.raises(ValueError, match="final=nan; it is a share"):
        softness(1, 2, float("nan"))


def test_refusals():
    tensors, _ = make("clip", 10.0, 0.4, torch.float32)
    for change, message in (
        ({"soft": 1.5}, "soft=1.5; it is the share of a target"),
        ({"soft": 0.1, "target_scale": torch.ones(2)}, r"target_scale has shape \(2,\)"),
        ({"soft": 0.1, "text": torch.zeros(5, WIDTH)}, f"{PAIRS} images but 5 texts"),
    ):
        with pytest.raises(ValueError, match=message):
            light_clip_loss(**(tensors | change))
