"""The mathematics of maxsim on the CPU: against loops, float64, eager PyTorch and its own invariants."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors
from fastvlp_kernels.maxsim import maxsim

cpu = import_module("fastvlp_kernels.maxsim.cpu")
SIZES = [(512, 1024), (5, 9)]
LENGTHS = [([3, 0, 5, 1, 5], [2, 7, 0, 70, 3, 3]), ([20], [40, 1]), ([1] * 9, [2] * 7), ([0], [3]), ([], [3]), ([4], [0, 0])]


def cu(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tokens(count: int, D: int, seed: int, ties: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random features; with ``ties`` small integers, whose products are often equal."""
    random = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, (count, D), generator=random).to(dtype)
    return F.normalize(torch.randn(count, D, generator=random, dtype=torch.float64), dim=1).to(dtype)


def loops(x, y, lengths_x, lengths_y, mean, g_row, g_col):
    """Scores and gradients by the definition: one number at a time, the first of equal maxima taken."""
    scores = torch.zeros(2, len(lengths_x), len(lengths_y), dtype=torch.float64)
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    i = 0
    for m, rows in enumerate(lengths_x):
        j = 0
        for n, cols in enumerate(lengths_y):
            for a in range(rows if cols else 0):
                best = max(range(cols), key=lambda b: (float(x[i + a] @ y[j + b]), -b))
                weight = 1 / rows if mean else 1
                scores[0, m, n] += weight * (x[i + a] @ y[j + best])
                dx[i + a] += g_row[m, n] * weight * y[j + best]
                dy[j + best] += g_row[m, n] * weight * x[i + a]
            for b in range(cols if rows else 0):
                best = max(range(rows), key=lambda a: (float(x[i + a] @ y[j + b]), -a))
                weight = 1 / cols if mean else 1
                scores[1, m, n] += weight * (x[i + best] @ y[j + b])
                dx[i + best] += g_col[m, n] * weight * y[j + b]
                dy[j + b] += g_col[m, n] * weight * x[i + best]
            j += cols
        i += rows
    return *scores, dx, dy


def upstream(lengths_x, lengths_y, seed: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(len(lengths_x), len(lengths_y), generator=random, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_definition_by_loops(impl, reduce, ties, sizes, monkeypatch):
    """Values and gradients, equal maxima and empty segments included, in whole tiles and in tiles that cut segments."""
    monkeypatch.setattr(cpu, "ROWS", sizes[0])
    monkeypatch.setattr(cpu, "COLS", sizes[1])
    for lengths_x, lengths_y in LENGTHS:
        x, y = (tokens(sum(lengths), 3, seed, ties).requires_grad_() for seed, lengths in enumerate((lengths_x, lengths_y)))
        grads = upstream(lengths_x, lengths_y)
        want = loops(x.detach(), y.detach(), lengths_x, lengths_y, reduce == "mean", *grads)
        found = maxsim(x, cu(lengths_x), y, cu(lengths_y), reduce=reduce, impl=impl)
        found = (*found, *torch.autograd.grad(found, (x, y), grads))
        for mine, exact in zip(found, want, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("directions", ["both", "x_to_y", "y_to_x"])
def test_gradcheck(impl, reduce, directions):
    x, y = tokens(8, 3, 0).requires_grad_(), tokens(11, 3, 1).requires_grad_()
    starts = cu([3, 0, 4, 1]), cu([2, 8, 1])

    def f(x, y):
        return maxsim(x, starts[0], y, starts[1], reduce=reduce, directions=directions, impl=impl)

    assert torch.autograd.gradcheck(f, (x, y))


def eager(x: Tensor, y: Tensor, lengths_x: list[int], lengths_y: list[int], mean: bool) -> tuple[Tensor, Tensor]:
    """What one writes without the operator, in the dtype of x: padded, all products at once, masked."""
    padded = [torch.nn.utils.rnn.pad_sequence(list(t.split(lengths)), True) for t, lengths in ((x, lengths_x), (y, lengths_y))]
    mask_x, mask_y = (torch.arange(p.shape[1]) < torch.tensor(n)[:, None] for p, n in zip(padded, (lengths_x, lengths_y), strict=True))
    S = torch.einsum("mid,njd->mnij", *padded)
    pairs = mask_x.any(1)[:, None] & mask_y.any(1)
    if not S.numel():
        return tuple((x[:0].sum() + y[:0].sum()).float() + torch.zeros(len(lengths_x), len(lengths_y)) for _ in range(2))
    row = S.masked_fill(~mask_y[None, :, None], -torch.inf).amax(3).masked_fill(~(mask_x[:, None] & pairs[..., None]), 0.0)
    col = S.masked_fill(~mask_x[:, None, :, None], -torch.inf).amax(2).masked_fill(~(mask_y[None] & pairs[..., None]), 0.0)
    row, col = row.sum(2), col.sum(2)
    if mean:
        row, col = row / mask_x.sum(1).clamp_min(1)[:, None], col / mask_y.sum(1).clamp_min(1)
    return row, col


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths_x=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    lengths_y=st.lists(st.integers(0, 80), min_size=1, max_size=6),
    D=st.sampled_from([1, 2, 7, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    reduce=st.sampled_from(["mean", "sum"]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    sizes=st.sampled_from(SIZES),
)
def test_no_worse_than_eager(lengths_x, lengths_y, D, dtype, reduce, layout, sizes):
    x, y = (tokens(sum(lengths), D, seed, dtype=dtype) for seed, lengths in enumerate((lengths_x, lengths_y)))
    if layout == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    elif layout == "every second":
        x, y = (torch.stack([t, t], 1).reshape(-1, D)[::2] for t in (x, y))
    grads = upstream(lengths_x, lengths_y)
    results = {}
    usual, (cpu.ROWS, cpu.COLS) = (cpu.ROWS, cpu.COLS), sizes
    try:
        for kind in ("ours", "eager", "exact"):
            leaves = [t.detach().to(torch.float64 if kind == "exact" else dtype).requires_grad_() for t in (x, y)]
            if kind == "eager":
                scores = eager(*leaves, lengths_x, lengths_y, reduce == "mean")
            else:
                impl = "cpu" if kind == "ours" else "reference"
                scores = maxsim(leaves[0], cu(lengths_x), leaves[1], cu(lengths_y), reduce=reduce, impl=impl)
            results[kind] = (*scores, *torch.autograd.grad(scores, leaves, [g.to(s.dtype) for g, s in zip(grads, scores, strict=True)]))
    finally:
        cpu.ROWS, cpu.COLS = usual
    for k, name in enumerate(("x_to_y", "y_to_x", "gradient of x", "gradient of y")):
        ours, plain, exact = (results[kind][k] for kind in ("ours", "eager", "exact"))
        assert ours.dtype == (torch.float32 if k < 2 else dtype)
        rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype] if k > 1 else 0.0
        if exact.numel():
            assert_no_worse_than(ours, plain, exact, 1e-6 + rounding, name)


def test_order_of_segments_and_of_tokens_does_not_matter():
    lengths_x, lengths_y = [4, 9, 2, 9], [6, 1, 6, 3, 70]
    x, y = (tokens(sum(lengths), 8, seed) for seed, lengths in enumerate((lengths_x, lengths_y)))
    row, col = maxsim(x, cu(lengths_x), y, cu(lengths_y))
    order = [2, 0, 3, 1]
    parts = [x.split(lengths_x)[m].flip(0) for m in order]
    permuted = maxsim(torch.cat(parts), cu([len(p) for p in parts]), y, cu(lengths_y))
    torch.testing.assert_close(permuted, (row[order], col[order]))
    swapped = maxsim(y, cu(lengths_y), x, cu(lengths_x))
    torch.testing.assert_close(swapped, (col.T, row.T))


def test_one_direction_is_that_of_both_and_costs_one_gradient_less():
    lengths_x, lengths_y = [4, 9, 2], [6, 1, 7]
    x, y = (tokens(sum(lengths), 8, seed).requires_grad_() for seed, lengths in enumerate((lengths_x, lengths_y)))
    both = maxsim(x, cu(lengths_x), y, cu(lengths_y), reduce="sum")
    for k, direction in enumerate(("x_to_y", "y_to_x")):
        alone = maxsim(x, cu(lengths_x), y, cu(lengths_y), reduce="sum", directions=direction)
        assert torch.equal(alone, both[k])
        grads = [torch.autograd.grad(s.square().sum(), (x, y), retain_graph=True) for s in (alone, both[k])]
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(maxsim(x, cu(lengths_x), y, cu(lengths_y), reduce="sum", directions=direction, impl="reference"), alone)


def test_equal_to_retrieval_with_one_token():
    """A text of one token against an image's queries is the score of BLIP-2: the highest of the products."""
    x, y = tokens(5 * 8, 16, 0), tokens(3, 16, 1)
    row, col = maxsim(x, cu([8] * 5), y, cu([1] * 3))
    products = (x @ y.T).view(5, 8, 3)
    torch.testing.assert_close(col, products.amax(1))
    torch.testing.assert_close(row, products.mean(1))


@pytest.mark.parametrize("side", ["x", "y"])
def test_tokens_after_the_last_segment_are_ghosts(side):
    x, y = tokens(12, 4, 0).requires_grad_(), tokens(9, 4, 1).requires_grad_()
    starts = {"x": cu([5, 4, 3]), "y": cu([2, 7])}
    whole = maxsim(x, starts["x"], y, starts["y"])
    some = {**starts, side: starts[side][:-1]}
    part = maxsim(x, some["x"], y, some["y"])
    index = (slice(-1), slice(None)) if side == "x" else (slice(None), slice(-1))
    torch.testing.assert_close(part, tuple(s[index] for s in whole))
    gradients = torch.autograd.grad(sum(s.sum() for s in part), (x, y))
    ghost = gradients[0][9:] if side == "x" else gradients[1][2:]
    assert ghost.numel() and (ghost == 0).all()


@pytest.mark.parametrize("sizes", SIZES)
def test_a_nan_stays_with_its_segment(sizes, monkeypatch):
    monkeypatch.setattr(cpu, "ROWS", sizes[0])
    monkeypatch.setattr(cpu, "COLS", sizes[1])
    lengths_x, lengths_y = [4, 6, 3], [5, 20, 7]
    x, y = tokens(13, 4, 0, dtype=torch.float32), tokens(32, 4, 1, dtype=torch.float32)
    x[5, 2] = y[30, 0] = torch.nan
    x.requires_grad_(), y.requires_grad_()
    scores = maxsim(x, cu(lengths_x), y, cu(lengths_y))
    for score in scores:
        nan = score.isnan()
        assert nan[1].all() and nan[:, 2].all() and not nan[[0, 2]][:, :2].any()
    torch.autograd.grad([s[[0, 2]][:, :2].sum() for s in scores], (x, y))


def test_every_element_is_written():
    """Uninitialised memory is full of NaN and of impossible indices."""
    lengths_x, lengths_y = [7, 0, 3, 7, 12], [5, 70, 0, 9, 5]
    x, y = (tokens(sum(lengths), 6, seed).requires_grad_() for seed, lengths in enumerate((lengths_x, lengths_y)))
    grads, usual = upstream(lengths_x, lengths_y), (cpu.ROWS, cpu.COLS)
    want = loops(x.detach(), y.detach(), lengths_x, lengths_y, True, *grads)
    torch.use_deterministic_algorithms(True)
    try:
        for cpu.ROWS, cpu.COLS in SIZES:
            found = maxsim(x, cu(lengths_x), y, cu(lengths_y))
            for mine, exact in zip((*found, *torch.autograd.grad(found, (x, y), grads)), want, strict=True):
                torch.testing.assert_close(mine, exact)
    finally:
        torch.use_deterministic_algorithms(False)
        cpu.ROWS, cpu.COLS = usual


@pytest.mark.parametrize("lengths", [[100] * 8, [800], [390, 10, 400]])
def test_all_products_never_exist(lengths):
    T = sum(lengths)
    x, y = (tokens(T, 4, seed, dtype=torch.float32).requires_grad_() for seed in range(2))
    with forbid_large_tensors(T * T // 8):
        row, col = maxsim(x, cu(lengths), y, cu(lengths))
        gradients = torch.autograd.grad(row.sum() + col.square().sum(), (x, y))
    exact_x, exact_y = (t.detach().double().requires_grad_() for t in (x, y))
    exact = maxsim(exact_x, cu(lengths), exact_y, cu(lengths), impl="reference")
    wanted = torch.autograd.grad(exact[0].sum() + exact[1].square().sum(), (exact_x, exact_y))
    for mine, want in zip((row, col, *gradients), (*exact, *wanted), strict=True):
        assert error(mine, want)[0] < 1e-6


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_blip2_scores_each_text_token_by_the_best_query_of_each_image(impl):
    """A dense product of all queries with one token per text, and its maximum over the queries of an image."""
    images, queries, texts, D = 5, 8, 7, 6
    x, y = (tokens(count, D, seed).requires_grad_() for seed, count in enumerate((images * queries, texts)))
    score = maxsim(x, cu([queries] * images), y, cu([1] * texts), directions="y_to_x", impl=impl)
    exact = (x.unflatten(0, (images, queries)) @ y.T).amax(1)
    torch.testing.assert_close(score, exact, rtol=1e-12, atol=1e-12)
    grad, _ = upstream([queries] * images, [1] * texts)
    for mine, want in zip(*(torch.autograd.grad(s, (x, y), grad) for s in (score, exact)), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


def test_small_gradients_survive_float16():
    lengths = [9, 14, 5]
    x, y = (tokens(28, 8, seed, dtype=torch.float16) for seed in range(2))
    found = {}
    for kind, dtype in (("half", torch.float16), ("exact", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        scores = maxsim(leaves[0], cu(lengths), leaves[1], cu(lengths))
        found[kind] = torch.autograd.grad([s.double() for s in scores], leaves, [2.0**-14 * torch.eye(3, dtype=torch.float64)] * 2)
    for mine, want in zip(found["half"], found["exact"], strict=True):
        # float16 has steps of 2^-24 here.
        assert (mine.double() - want).abs().max() <= 2**-25 * 1.01 and math.isfinite(float(mine.sum()))


def test_the_same_twice():
    lengths_x, lengths_y = [30, 4, 17] * 5, [8, 8, 50] * 5
    x, y = (tokens(sum(lengths), 16, seed, dtype=torch.float32).requires_grad_() for seed, lengths in enumerate((lengths_x, lengths_y)))
    runs = []
    for _ in range(2):
        scores = maxsim(x, cu(lengths_x), y, cu(lengths_y))
        runs.append((*scores, *torch.autograd.grad(sum(s.square().sum() for s in scores), (x, y))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
