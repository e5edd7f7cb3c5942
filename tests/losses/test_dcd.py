"""DCD: against the authors' formula over the whole matrix of similarities, and the teacher's choice against a sort of whole rows."""

import pytest
import torch
from agreement import assert_exact, assert_rounded_like_eager
from objectives import PAIRS, WIDTH, differentiated, make
from torch.nn import functional as F

from fastvlp.losses import dcd_loss, dynamic_distill, hard_candidates
from fastvlp_kernels._testing import error, forbid_large_tensors

K, MORE = 5, 8  # candidates of each anchor; others that are nobody's partner
# (scale, bias, likeness, distill): with the last ones the loss is below 0.01.
CASES = [(10.0, -4.0, 0.4, 0.2), (100.0, -50.0, 0.45, 1.0), (100.0, -60.0, 0.9, 0.0)]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(scale, bias, likeness, distill, dtype):
    """N = 29 anchors among M = 37 others, and a teacher of other features that scores around the student's range."""
    tensors, _ = make("clip", scale, likeness, dtype)
    others = torch.cat([tensors["text"], F.normalize(random(MORE, WIDTH, seed=3), dim=1).to(dtype)])
    leaves = {"anchors": tensors["image"], "others": others, "scale": tensors["scale"], "bias": torch.full_like(tensors["scale"], bias)}
    teacher = [F.normalize(side.double() @ random(WIDTH, 7, seed=4), dim=1) for side in (tensors["image"], others)]
    candidates, scores = hard_candidates(*teacher, K, 3.0)
    return leaves, {"candidates": candidates, "teacher_scores": scores - 1.0, "distill": distill}


def dense(tensors, options, dtype):
    S = tensors["scale"].to(dtype) * (tensors["anchors"] @ tensors["others"].T).to(dtype) + tensors["bias"].to(dtype)
    S = S.gather(1, torch.cat([torch.arange(PAIRS)[:, None], options["candidates"]], 1))
    T = options["teacher_scores"].to(dtype)
    entropy = -(T.softmax(1) * T.softmax(1).log()).sum(1)
    doubt = entropy / entropy.sum()
    trust = (1 - doubt) ** 2
    trust = trust.exp() / trust.exp().sum()
    label = F.one_hot(torch.tensor(0), K + 1).to(dtype)
    far = sum(trust[i] * F.mse_loss(S[i], T[i]) for i in range(PAIRS))
    wrong = sum(doubt[i] * F.binary_cross_entropy_with_logits(S[i], label) for i in range(PAIRS))
    return options["distill"] * far + (1 - options["distill"]) * wrong


def ours(tensors, options):
    return dcd_loss(**tensors, **options)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case):
    exact = assert_exact(ours, dense, *drawn(*case, torch.float64))
    assert set(exact) == {"loss", "anchors", "others", "scale", "bias"}
    assert case != CASES[-1] or 0 < exact["loss"] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_eager(case, dtype):
    assert_rounded_like_eager(ours, dense, *drawn(*case, dtype), 4 * torch.finfo(torch.float32).eps * case[0])


def test_autocast_rounds_operands_only():
    tensors, options = drawn(50.0, -20.0, 0.45, 0.2, torch.float32)
    found = differentiated(ours, tensors, options, autocast=True)
    rounded = {name: (tensor.bfloat16() if tensor.ndim else tensor).double() for name, tensor in tensors.items()}
    for name, value in differentiated(dense, rounded, options, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 50, name


def test_a_student_that_scores_as_its_teacher_learns_from_labels_only():
    tensors, options = drawn(*CASES[0], torch.float64)
    places = torch.cat([torch.arange(PAIRS)[:, None], options["candidates"]], 1)
    S = 10.0 * torch.einsum("nd,nkd->nk", tensors["anchors"], tensors["others"][places]) - 4.0
    found = differentiated(ours, tensors, options | {"teacher_scores": S, "distill": 1.0})
    assert all(value.abs().max() < 1e-12 for value in found.values())


def test_a_teacher_without_doubts_is_no_division_by_zero():
    tensors, options = drawn(*CASES[0], torch.float32)
    sure = torch.full((PAIRS, K + 1), -300.0)
    sure[:, 0] = 300.0
    found = differentiated(ours, tensors, options | {"teacher_scores": sure, "distill": 0.0})
    evenly = torch.zeros(PAIRS, K + 1)  # all are doubted alike
    for name, value in differentiated(ours, tensors, options | {"teacher_scores": evenly, "distill": 0.0}).items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("scores", [1 << 22, 100])
def test_the_nearest_others_but_the_partner(scores, monkeypatch):
    monkeypatch.setattr(dynamic_distill, "SCORES", scores)
    anchors, others = random(PAIRS, 6, seed=1), random(PAIRS + MORE, 6, seed=2)
    candidates, found = hard_candidates(anchors.requires_grad_(), others, K, 2.0)
    S = 2.0 * anchors.detach() @ others.T
    for i, row in enumerate(S):
        order = [j for j in row.argsort(descending=True).tolist() if j != i][:K]
        assert candidates[i].tolist() == order
        torch.testing.assert_close(found[i], row[[i, *order]], rtol=1e-12, atol=1e-12)
    assert not found.requires_grad


def test_nothing_of_all_pairs_nor_of_all_candidates_features():
    N, width, number = 1800, 4, 1000 // 4
    image, text = (F.normalize(torch.randn(N, width), dim=1).requires_grad_() for _ in range(2))
    candidates = (torch.arange(N)[:, None] + 1 + torch.arange(number)) % N
    with forbid_large_tensors(N * number * width // 3):
        loss = dcd_loss(image, text, candidates, torch.randn(N, number + 1), torch.tensor(10.0, requires_grad=True))
        loss.backward()


def test_compiles_into_one_graph():
    tensors, options = drawn(*CASES[0], torch.float32)
    eager = differentiated(ours, tensors, options)
    for name, value in differentiated(torch.compile(ours, backend="aot_eager", fullgraph=True), tensors, options).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6, msg=name)


def test_refusals():
    tensors, options = drawn(*CASES[0], torch.float32)
    candidates, scores = options["candidates"], options["teacher_scores"]
    for change, message in (
        ({"candidates": candidates[:, :2]}, r"candidates have shape \(29, 2\), teacher_scores \(29, 6\); they must be \[29, K\]"),
        ({"candidates": candidates + 20}, "rows of the others, from 0 to 36"),
        ({"candidates": candidates.float()}, "candidates are torch.float32"),
        ({"teacher_scores": scores.long()}, "teacher_scores torch.int64; allowed: integers, floats"),
        ({"teacher_scores": scores.tolist()}, "teacher_scores is list; it must be a torch.Tensor"),
        ({"others": tensors["others"][:5]}, "29 anchors but 5 others"),
        ({"distill": 1.5}, "distill=1.5; it is the share"),
        ({"bias": torch.zeros(2)}, r"bias has shape \(2,\)"),
        ({"anchors": torch.zeros(PAIRS, 3)}, "images have 3 features and texts 40"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            dcd_loss(**(tensors | options | change))
    for number in (0, PAIRS + MORE):
        with pytest.raises(ValueError, match=f"number={number}; it must be at least 1 and below the number of others, 37"):
            hard_candidates(tensors["anchors"], tensors["others"], number)
