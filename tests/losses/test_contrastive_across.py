"""``contrastive_loss`` with a group: every case over processes gives what one process gets, for one process's work in all."""

import numpy as np
import pytest
import torch
from objectives import CASES, dense, differentiated, make
from torch import distributed as dist
from torch.nn import functional as F

from fastvlp.losses import ALONE, contrastive_loss, softmax_terms
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors

ROWS = {"image": 0, "text": 1, "text_negatives": 2, "image_negatives": 3}  # which of the sizes a tensor has


def sizes_of(size, tensors):
    """How many images, texts and negatives each process has; images and texts that are no pairs are cut elsewhere."""
    cuts = {2: ((0.6,), (0.25,)), 3: ((0.5, 0.55), (0.2, 0.6))}[size]
    sizes = {}
    for name, which in ROWS.items():
        rows = len(tensors[name]) if name in tensors else 0
        aside = which > 1 or (which == 1 and rows != len(tensors["image"]))
        ends = [0, *(int(rows * cut) for cut in cuts[aside]), rows]
        sizes[name] = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
    for name, anchors in (("text_negatives", "image"), ("image_negatives", "text")):
        if name in tensors and tensors[name].ndim == 3:
            sizes[name] = sizes[anchors]
    return sizes


def part(values, sizes, rank):
    return values.split(sizes)[rank]


def share_of(rank, size, tensors, options):
    """One process's tensors and options of a case."""
    sizes = sizes_of(size, tensors)
    own = {name: part(tensor, sizes[name], rank) if name in sizes else tensor for name, tensor in tensors.items()}
    two = sizes["image"], sizes["text"]
    cut = {}
    for name, value in options.items():
        if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
            value = tuple(part(side, rows, rank) for side, rows in zip(value, two, strict=True))
        elif isinstance(value, torch.Tensor):
            value = part(value, two[0], rank)
        cut[name] = value
    return own, cut


def ours(tensors, options, group=None):
    return contrastive_loss(**tensors, **options, group=group or dist.group.WORLD)


def as_arrays(found):
    return {name: value.double().numpy() for name, value in found.items()}


def on_a_process(rank, size, case, scale=10.0, likeness=0.5, dtype=torch.float64):
    return as_arrays(differentiated(ours, *share_of(rank, size, *make(case, scale, likeness, dtype))))


def averaged(answers):
    """After DDP's average."""
    found = {}
    for name in answers[0]:
        arrays = [answer[name] for answer in answers]
        found[name] = torch.as_tensor(np.concatenate(arrays) / len(arrays) if name in ROWS else np.mean(arrays, 0))
    return found


def assert_same(found, exact):
    """In float64: values to 1e-12, gradients to 1e-10."""
    assert set(found) == set(exact)
    for name, value in exact.items():
        tol = 1e-12 if name == "loss" else 1e-10
        torch.testing.assert_close(found[name], value, rtol=tol, atol=tol / 100, msg=name)


@pytest.mark.parametrize("size,case", [(3, case) for case in CASES] + [(2, "clip"), (2, "all with prefixes")])
def test_equals_one_process(processes, size, case):
    exact = differentiated(dense, *make(case, 10.0, 0.5, torch.float64), torch.float64)
    assert_same(averaged(processes.results(size, on_a_process, case)), exact)


CONFIDENT = {"clip": 0.56, "focal": 0.56, "exclude": 0.56, "sum": 0.57, "own negatives": 0.56}  # losses below 0.01 at scale 80
APART = ("focal", "exclude")  # whose sums hold no positive


@pytest.mark.parametrize("case", [*CONFIDENT, "all with prefixes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_worse_than_eager_on_one_process(processes, case, dtype):
    """Beyond four roundings of a log-sum-exp, of which a small difference may be left, and one of a gradient."""
    settings = 80.0, CONFIDENT.get(case, 0.5), dtype
    tensors, options = make(case, *settings)
    exact = differentiated(dense, {name: tensor.double() for name, tensor in tensors.items()}, options, torch.float64)
    eager, found = differentiated(dense, tensors, options, torch.float32), averaged(processes.results(2, on_a_process, case, *settings))
    for name, value in exact.items():
        tol = 4 * torch.finfo(torch.float32).eps * 80.0 / (1.0 if case in APART else min(1.0, exact["loss"].item()))
        tol += torch.finfo(dtype).eps / 2 if value.ndim else 0
        assert_no_worse_than(found[name], eager[name], value, tol, name)


def weighted(rank, size, weights):
    return as_arrays(
        differentiated(lambda *given: weights[rank] * ours(*given), *share_of(rank, size, *make("focal", 10.0, 0.5, torch.float64)))
    )


def test_each_process_weighs_its_own_anchors(processes):
    """Upstream gradients that differ between processes are weights of their images and texts."""
    tensors, options = make("focal", 10.0, 0.5, torch.float64)
    weights, sizes = torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64), sizes_of(3, tensors)["image"]
    exact = differentiated(dense, tensors, options | {"weights": weights.repeat_interleave(torch.tensor(sizes))}, torch.float64)
    assert_same(averaged(processes.results(3, weighted, weights.tolist())), exact)


def frozen(rank, size, case, trains):
    tensors, options = share_of(rank, size, *make(case, 10.0, 0.5, torch.float64))
    leaves = {name: tensor.clone().requires_grad_(name in trains) for name, tensor in tensors.items()}
    ours(leaves, options).backward()
    return as_arrays({name: leaves[name].grad for name in trains})


@pytest.mark.parametrize("trains", [("image",), ("text",), ("scale",), ("text_negatives",)], ids="+".join)
def test_frozen_inputs(processes, trains):
    case = "debiased, exclude, focal, negatives"
    exact = differentiated(dense, *make(case, 10.0, 0.5, torch.float64), torch.float64)
    assert_same(averaged(processes.results(2, frozen, case, trains)), {name: exact[name] for name in trains})


def in_groups(rank, size, groups):
    place = next(place for place, group in enumerate(groups) if rank in group)
    made = [dist.new_group(group) for group in groups]
    share = share_of(groups[place].index(rank), len(groups[place]), *make("mean", 10.0, 0.5, torch.float64, draw=place))
    return as_arrays(differentiated(ours, *share, made[place]))


def test_sub_groups_are_batches_of_their_own(processes):
    groups = [[0, 2], [1, 3]]
    answers = processes.results(4, in_groups, groups)
    for place, group in enumerate(groups):
        exact = differentiated(dense, *make("mean", 10.0, 0.5, torch.float64, draw=place), torch.float64)
        assert_same(averaged([answers[rank] for rank in group]), exact)


def group_of_one(rank, size):
    tensors, options = make("all with prefixes", 10.0, 0.5, torch.float64, draw=rank)
    group = [dist.new_group([member]) for member in range(size)][rank]
    return ours(tensors, options, group).item() - contrastive_loss(**tensors, **options, group=ALONE).item()


def test_a_group_of_one_is_one_process(processes):
    assert processes.results(2, group_of_one) == [0.0, 0.0]


def work(rank, size, options):
    """Rows and columns of the sweeps, and the elements of the largest tensor, of forward and backward."""
    pairs, swept = 400, []
    sweep = softmax_terms.logsumexp_results
    image, text = (F.normalize(torch.randn(pairs, 24), dim=1).requires_grad_() for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, forbid_large_tensors(10**9) as seen:
        patch.setattr(
            softmax_terms, "logsumexp_results", lambda x, y, *rest, **more: (swept.append((len(x), len(y))), sweep(x, y, *rest, **more))[1]
        )
        contrastive_loss(image, text, 10.0, **options, group=dist.group.WORLD).backward()
    return swept, seen.largest


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}], ids=str)
def test_the_work_is_that_of_one_process_and_no_matrix_is_stored(processes, options):
    """W processes sweep N x N once between them; what they hold grows with N D, not with b N."""
    for swept, largest in processes.results(3, work, options):
        assert swept == [(400, 1200)]
        assert largest <= max(1200 * 24, 400 * 1200 // 8)


def wrong(rank, size, change):
    tensors = {"image": torch.randn(4, 6), "text": torch.randn(4, 6), "scale": torch.tensor(5.0, requires_grad=True)}
    contrastive_loss(**(tensors | (change if rank == 1 else {})), group=dist.group.WORLD)


@pytest.mark.parametrize(
    "change,of_changed,of_others",
    [
        ({"text": torch.randn(3, 6)}, "4 images but 3 texts", "rank 1 of the group refused its input"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5", "rank 1 of the group refused its input"),
        ({"label_smoothing": 0.1}, "differ in the label_smoothing", "differ in the label_smoothing"),
        ({"ids": torch.arange(4)}, "differ in the presence of ids", "differ in the presence of ids"),
        ({"text_negatives": torch.randn(2, 6)}, "differ in the kinds of negatives", "differ in the kinds of negatives"),
        ({"image": torch.randn(4, 5), "text": torch.randn(4, 5)}, "differ in the width", "differ in the width"),
        ({"scale": 5.0}, "differ in the inputs that need a gradient", "differ in the inputs that need a gradient"),
    ],
)  # fmt: skip
def test_processes_that_differ_are_told(processes, change, of_changed, of_others):
    one, two, three = processes.run(3, wrong, change)
    assert of_changed in two.message and two.kind == "ValueError"
    assert of_others in one.message and of_others in three.message


def penalised(rank, size):
    image, text = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = contrastive_loss(image, text, 5.0, group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    (loss + gradient.square().sum()).backward()


def test_second_derivatives_are_refused(processes):
    for answer in processes.run(2, penalised):
        assert answer.kind == "RuntimeError" and "no second derivatives" in answer.message


def test_without_processes_the_world_is_this_one():
    tensors, options = make("clip", 10.0, 0.5, torch.float64)
    assert contrastive_loss(**tensors, **options, group=dist.group.WORLD) == contrastive_loss(**tensors, **options)
