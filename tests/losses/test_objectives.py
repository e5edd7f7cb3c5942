"""The softmax objectives: against whole matrices in float64, no worse than eager PyTorch, without M x N, and what is refused."""

import os
import subprocess
import sys
from statistics import median

import pytest
import torch
from objectives import CASES, PAIR_IDS, PAIRS, WIDTH, dense, differentiated, make
from torch.nn import functional as F

from fastvlp.losses import ClipLoss, NegativeQueue, contrastive_loss, multi_caption_loss
from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors
from fastvlp_kernels.similarity_logsumexp import op as logsumexp_op

# Cases whose loss tends to 0 as pairs come to agree, and the likeness that brings it below 0.01 at scale 80. Not so with smoothing, with
# the mean over positives (its least is the log of their number), and for a debiased loss above its bound.
VANISHING = dict.fromkeys(
    ("clip", "weights", "weights of sides", "log weights", "focal", "half focal", "exclude", "shared negatives", "own negatives"), 0.56
) | {"sum": 0.57, "sum, focal, weights": 0.56, "queues": 0.59}
# Cases whose sums hold no positive: their losses keep the digits that row - positive rounds away.
APART = [name for name, options in CASES.items() if {"focal_gamma", "tau_plus"} & set(options) and options.get("equal_ids") != "sum"]
APART += ["exclude"]


def ours(tensors, options):
    return contrastive_loss(**tensors, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale,likeness", [(7.0, 0.4), (100.0, 0.45)])
def test_value_and_gradients(case, scale, likeness):
    tensors, options = make(case, scale, likeness, torch.float64)
    exact, found = differentiated(dense, tensors, options, torch.float64), differentiated(ours, tensors, options)
    assert set(found) == set(exact)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("case", VANISHING)
def test_value_and_gradients_of_small_losses(case):
    """Below 0.01, where p - 1 has to keep its digits."""
    tensors, options = make(case, 80.0, VANISHING[case], torch.float64)
    exact, found = differentiated(dense, tensors, options, torch.float64), differentiated(ours, tensors, options)
    assert 1e-5 < exact["loss"] < 0.01
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("confident", [False, True])
def test_no_worse_than_eager(case, dtype, confident):
    """In the same dtype; what is allowed beyond that are four roundings of a log-sum-exp, of which a small difference may be left."""
    scale = 80.0  # e^88 is infinite in float32, and eager debiasing takes exponentials
    likeness = VANISHING.get(case, 0.57) if confident else 0.45
    tensors, options = make(case, scale, likeness, dtype)
    exact = differentiated(dense, {name: tensor.double() for name, tensor in tensors.items()}, options, torch.float64)
    eager, found = differentiated(dense, tensors, options, torch.float32), differentiated(ours, tensors, options)
    for name, value in exact.items():
        assert found[name].dtype == (torch.float32 if name == "loss" else tensors[name].dtype)
        tol = 4 * torch.finfo(torch.float32).eps * scale / (1.0 if case in APART else min(1.0, exact["loss"].item()))
        assert_no_worse_than(found[name], eager[name], value, tol, name)


def triton_cases():
    """Confident pairs in bfloat16, whose products round what they multiply."""
    for case, likeness in (*VANISHING.items(), ("one id each", 0.56), ("mean", 0.8), ("mean", 0.9), ("all with prefixes", 0.9)):
        tensors, options = make(case if case in CASES else "clip", 80.0, likeness, torch.bfloat16)
        if case not in CASES:
            options["ids"] = torch.arange(PAIRS)
        exact = differentiated(dense, {name: tensor.double() for name, tensor in tensors.items()}, options, torch.float64)
        eager = differentiated(dense, tensors, options, torch.float32)
        for name, found in differentiated(ours, tensors, options | {"impl": "triton"}).items():
            assert_no_worse_than(found, eager[name], exact[name], 2**-7, f"{case}, {name}")
            # Eager errs by up to 0.8 here: the rule alone would not notice p rounded before 1, or 1/n, is taken from it.
            assert error(found, exact[name])[0] < 2**-6, f"{case}, {name}"


def test_triton_keeps_p_minus_1():
    """What is allowed is one rounding to bfloat16; p rounded to bfloat16 before 1 is taken from it gives errors of 0.08, and before 1/n of
    nearly equal positives 0.27."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    program = "import test_objectives; test_objectives.triton_cases()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", ["debiased", "debiased by rows", "debiased, exclude, focal, negatives"])
def test_debiased_where_exponentials_overflow(case):
    tensors, options = make(case, 100.0, 0.45, torch.float32)
    exact = differentiated(dense, {name: tensor.double() for name, tensor in tensors.items()}, options, torch.float64)
    for name, found in differentiated(ours, tensors, options).items():
        assert max(error(found, exact[name])) < 4 * torch.finfo(torch.float32).eps * 100, name


def test_the_bound_of_debiased_negatives_is_reached_and_differentiated():
    """With a large prior g would be negative for confident pairs; then only the positive and the scale have a gradient."""
    tensors, options = make("debiased", 20.0, 0.9, torch.float64)
    options["tau_plus"] = 0.3
    exact, found = differentiated(dense, tensors, options, torch.float64), differentiated(ours, tensors, options)
    bounded = ((PAIRS - 1) * (-20.0 - 20.0 * (tensors["image"] * tensors["text"]).sum(1)).exp()).log1p().mean()
    torch.testing.assert_close(exact["loss"], bounded)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=0.0)


def test_alone_it_is_clip_loss():
    tensors, _ = make("clip", 100.0, 0.45, torch.float64)
    found, clip = differentiated(ours, tensors, {}), differentiated(lambda leaves, _: ClipLoss()(*leaves.values()), tensors, {})
    for name, value in clip.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_published_names_for_special_cases():
    """No prior and one id per pair change nothing; equal ids without repetition are pairs; a smoothing of 0 is none."""
    tensors, _ = make("clip", 10.0, 0.4, torch.float64)
    plain, each = contrastive_loss(**tensors), torch.arange(PAIRS).flip(0) * 1_000_000_007
    for options in ({"tau_plus": 0.0}, {"ids": each}, {"ids": each, "equal_ids": "sum"}, {"ids": each, "equal_ids": "exclude"},
                    {"weights": torch.ones(PAIRS)}, {"prefixes": [WIDTH]}):  # fmt: skip
        torch.testing.assert_close(contrastive_loss(**tensors, **options), plain, rtol=1e-12, atol=0.0)


def test_loss_without_any_positive_is_zero():
    tensors, _ = make("clip", 10.0, 0.4, torch.float32)
    for equal_ids in ("mean", "sum"):
        options = {"ids": torch.full((PAIRS,), -1), "equal_ids": equal_ids, "label_smoothing": 0.1}
        assert all(not value.any() for value in differentiated(ours, tensors, options).values())


def test_one_pair():
    tensors = {"image": torch.randn(1, 4), "text": torch.randn(1, 4), "scale": torch.tensor(3.0)}
    for options in ({}, {"focal_gamma": 2.0}, {"tau_plus": 0.1}, {"ids": torch.tensor([-3]), "equal_ids": "exclude"}):
        found = differentiated(ours, tensors, options)
        assert all(value.isfinite().all() for value in found.values()) and found["loss"] <= 1e-6


def test_weights_get_gradients():
    tensors, options = make("weights of sides", 10.0, 0.4, torch.float64)
    for name in ("weights", "log_weights"):
        values = tuple(torch.rand(PAIRS, dtype=torch.float64) for _ in range(2))
        found, exact = (
            torch.autograd.grad(function(tensors, {name: leaves}, *rest), leaves)
            for function, rest in ((ours, ()), (dense, (torch.float64,)))
            for leaves in [tuple(value.clone().requires_grad_() for value in values)]
        )
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_compute_dtype_and_autocast_round_operands_only(case):
    """float32 features: the value is that of operands rounded to bfloat16, and closed forms see the same operands as the sweep.

    The error is compared with eager's over several draws: where debiasing is ill-conditioned (the mean of the negatives near tau_plus times
    the positive), one draw says more about the luck of roundings than about the method. The median of ours is at most eager's and 1e-6, and
    outside debiasing each draw has four roundings of a log-sum-exp.
    """
    ours_of: dict[str, list[float]] = {}
    eager_of: dict[str, list[float]] = {}
    for draw in range(9):
        tensors, options = make(case, 50.0, 0.45, torch.float32, draw)
        found = differentiated(ours, tensors, options, autocast=True)
        if draw == 0:
            told = differentiated(lambda leaves, rest: ours(leaves, rest | {"compute_dtype": torch.bfloat16}), tensors, options)
            assert all(torch.equal(found[name], value) for name, value in told.items())
        rounded = {name: tensor if name == "scale" else tensor.bfloat16().float() for name, tensor in tensors.items()}
        eager = differentiated(dense, rounded, options, torch.float32)
        exact = differentiated(dense, {name: tensor.double() for name, tensor in rounded.items()}, options, torch.float64)
        for name, value in exact.items():
            ours_of.setdefault(name, []).append(max(error(found[name], value)))
            eager_of.setdefault(name, []).append(max(error(eager[name], value)))
    for name, errors in ours_of.items():
        assert median(errors) <= median(eager_of[name]) + 1e-6, f"{name}: {errors}, eager {eager_of[name]}"
        assert "tau_plus" in options or max(errors) < 4 * torch.finfo(torch.float32).eps * 50, f"{name}: {errors}"


@pytest.mark.parametrize("case", CASES)
def test_no_matrix_of_all_pairs(case):
    N = 1800
    options = dict(CASES[case])
    image, text = (F.normalize(torch.randn(N, 4), dim=1).requires_grad_() for _ in range(2))
    for name, value in options.items():
        if isinstance(value, torch.Tensor) or (isinstance(value, tuple) and isinstance(value[0], torch.Tensor)):
            parts = value if isinstance(value, tuple) else (value,)
            parts = tuple(part.repeat(-(-N // len(part)))[:N] for part in parts)
            options[name] = parts if isinstance(value, tuple) else parts[0]
        elif name.endswith("negatives"):
            shape = (N, 4) if isinstance(value, NegativeQueue) or len(value) == 2 else (N, value[1], 4)
            options[name] = torch.randn(shape, requires_grad=True)
    if "prefixes" in options:
        options["prefixes"] = (1, 2, 4)[-len(options["prefixes"]) :]
    with forbid_large_tensors(N * N // 8):
        contrastive_loss(image, text, torch.tensor(10.0, requires_grad=True), **options).backward()


class Operators:
    """Counts the calls of the operator's sweeps."""

    def __init__(self, monkeypatch):
        self.forward, original = 0, logsumexp_op._forward

        def counted(*arguments):
            self.forward += 1
            return original(*arguments)

        monkeypatch.setattr(logsumexp_op, "_forward", counted)


@pytest.mark.parametrize("case,sweeps", [("weights", 1), ("focal", 1), ("smoothing", 1), ("mean", 1), ("sum", 1), ("debiased", 1),
                                         ("exclude", 1), ("own negatives", 1), ("shared negatives", 2), ("prefixes", 3)])  # fmt: skip
def test_one_sweep_serves_both_directions(monkeypatch, case, sweeps):
    tensors, options = make(case, 10.0, 0.4, torch.float32)
    operators = Operators(monkeypatch)
    ours(tensors, options)
    assert operators.forward == sweeps


@pytest.mark.parametrize("case", ["clip", "debiased, exclude, focal, negatives", "all with prefixes"])
def test_compiles_into_one_graph(case):
    tensors, options = make(case, 10.0, 0.4, torch.float32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    eager = differentiated(ours, tensors, options)
    for name, value in differentiated(compiled, tensors, options).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_locked_tower_costs_no_gradient():
    tensors, options = make("all with prefixes", 10.0, 0.4, torch.float32)
    image = tensors.pop("image").requires_grad_()
    contrastive_loss(image, **tensors, **options).backward()
    assert image.grad is not None and all(tensor.grad is None for tensor in tensors.values())


@pytest.mark.parametrize("name", ["image", "text", "scale"])
def test_nan_is_passed_on(name):
    for case in ("clip", "mean", "debiased", "focal", "queues"):
        tensors, options = make(case, 10.0, 0.4, torch.float32)
        tensors[name].view(-1)[0] = torch.nan
        assert ours(tensors, options).isnan(), case


REFUSED = [
    ({"focal_gamma": 2.0, "label_smoothing": 0.1}, "focal_gamma and label_smoothing do not compose"),
    ({"focal_gamma": 2.0, "ids": PAIR_IDS}, "focal_gamma and equal_ids='mean' do not compose.*equal_ids='sum'"),
    ({"tau_plus": 0.1, "label_smoothing": 0.1}, "tau_plus and label_smoothing do not compose"),
    ({"tau_plus": 0.1, "ids": PAIR_IDS, "equal_ids": "sum"}, "tau_plus and equal_ids='sum' do not compose.*'exclude'"),
    ({"tau_plus": 0.1, "log_weights": (torch.zeros(PAIRS),) * 2}, "tau_plus and log_weights do not compose"),
    ({"equal_ids": "only"}, "equal_ids='only' is unknown; allowed: mean, sum, exclude"),
    ({"label_smoothing": 1.0}, "label_smoothing=1.0; it must be at least 0 and below 1"),
    ({"focal_gamma": -1.0}, "focal_gamma=-1.0; it must be 0"),
    ({"tau_plus": 1.0}, "tau_plus=1.0; a prior must be at least 0 and below 1"),
    ({"tau_plus": torch.tensor(-0.5)}, "tau_plus=-0.5; a prior must be at least 0 and below 1"),
    ({"tau_plus": torch.tensor([0.1] * (PAIRS - 1) + [2.0])}, "a prior must be at least 0 and below 1"),
    ({"focal_gamma": float("nan")}, "focal_gamma=nan; it must be 0"),
    ({"tau_plus": torch.zeros(3)}, r"tau_plus has shape \(3,\); it must have shape \(29,\)"),
    ({"weights": torch.ones(3)}, r"weights of images has shape \(3,\)"),
    ({"weights": (torch.ones(PAIRS),)}, "weights has 1 tensors; give one for pairs, or two"),
    ({"ids": (PAIR_IDS, PAIR_IDS), "equal_ids": "exclude"}, "equal_ids='exclude' takes one id for each pair"),
    ({"ids": torch.zeros(PAIRS)}, "must be an integer tensor"),
    ({"text_negatives": torch.zeros(4, WIDTH + 1)}, r"text_negatives have shape \(4, 41\); allowed: \[J, 40\]"),
    ({"image_negatives": torch.zeros(4, 2, WIDTH)}, r"image_negatives have shape \(4, 2, 40\); allowed: .*\[29, J, 40\]"),
    ({"text_negatives": torch.zeros(4, WIDTH, dtype=torch.int64)}, "text_negatives are torch.int64"),
    ({"prefixes": [3.0, WIDTH]}, "they must be ints, numbers of features"),
    ({"prefix_weights": [1.0]}, "1 prefix_weights for no prefixes"),
    ({"prefixes": [3, WIDTH], "prefix_weights": [1.0]}, "1 prefix_weights for 2 prefixes"),
    ({"prefixes": [3, 5]}, "must increase strictly"),
    ({"prefixes": []}, "must increase strictly"),
    ({"text": torch.zeros(5, WIDTH)}, "29 images but 5 texts"),
    ({"text": torch.zeros(5, WIDTH), "ids": (PAIR_IDS, PAIR_IDS)}, r"ids of texts has shape \(29,\); it must have shape \(5,\)"),
    ({"text": torch.zeros(PAIRS, 3)}, "images have 40 features and texts 3"),
    ({"text": torch.zeros(0, WIDTH), "ids": (PAIR_IDS, PAIR_IDS[:0])}, "the batch is empty"),
    ({"scale": torch.ones(2)}, r"scale has shape \(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize("options,message", REFUSED)
def test_refusals(options, message):
    tensors, _ = make("clip", 10.0, 0.4, torch.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        contrastive_loss(**(tensors | options))


def test_several_captions_are_several_softmaxes():
    """DreamLIP's and FLAME's loop, which one softmax over all captions is not."""
    random = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 5, generator=random, dtype=torch.float64), torch.randn(3, 6, 5, generator=random, dtype=torch.float64)
    own = torch.arange(6)
    exact = sum(F.cross_entropy(image @ y.T, own) + F.cross_entropy(y @ image.T, own) for y in text) / 6
    torch.testing.assert_close(multi_caption_loss(image, text), exact, rtol=1e-12, atol=0)
    one = contrastive_loss(image, text.flatten(0, 1), ids=(own, own.repeat(3)))
    assert abs(one - exact) > 0.1
    with pytest.raises(ValueError, match=r"text is \(6, 5\); it must be a tensor"):
        multi_caption_loss(image, text[0])
