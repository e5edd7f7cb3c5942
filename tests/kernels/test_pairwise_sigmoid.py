"""The mathematics of pairwise_sigmoid on the CPU: against loops, float64, eager PyTorch and its own invariants."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors
from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid, sigmoid_forward

cpu = import_module("fastvlp_kernels.pairwise_sigmoid.cpu")
VECTORS = ("row_bias", "col_bias", "row_weight", "col_weight")


def problem(M: int, N: int, D: int, ids: str | None = None, vectors: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Normalised features and everything else that the operator takes; row 0 and column 0 match nothing."""
    random = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(size, D, generator=random, dtype=torch.float64), dim=1).to(dtype) for size in (M, N))
    options: dict[str, object] = {}
    if vectors:
        sizes = dict(zip(VECTORS, (M, N, M, N), strict=True))
        options |= {name: torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for name, size in sizes.items()}
    if ids is not None:
        row_ids, col_ids = (torch.randint(0, 4, (size,), generator=random) for size in (M, N))
        options |= {"ids": ids, "row_ids": row_ids, "col_ids": col_ids}
        options["row_ids"][0] = options["col_ids"][0] = -1
    return x, y, options


def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int | None = 0) -> Tensor:
    """What one writes without the operator, in the dtype of x: open_clip's formula with its sum."""
    logits = scale * x @ y.T + bias
    labels = -torch.ones_like(logits)
    if offset is not None:
        labels.diagonal(offset).fill_(1)
    return -F.logsigmoid(labels * logits).sum()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("ids", [None, "positive", "exclude"])
@pytest.mark.parametrize("offset", [1, None])
def test_formula_by_loops(impl, ids, offset):
    M, N, D, scale, bias = 4, 6, 3, 7.0, -1.5
    x, y, options = problem(M, N, D, ids, vectors=True)
    loss = pairwise_sigmoid(x, y, scale, bias, offset=offset, impl=impl, **options)
    r_bias, c_bias, r_weight, c_weight = (options[name].tolist() for name in VECTORS)
    want = 0.0
    for i in range(M):
        for j in range(N):
            t = scale * sum(float(x[i, d]) * float(y[j, d]) for d in range(D)) + r_bias[i] + c_bias[j] + bias
            same = ids is not None and int(options["row_ids"][i]) == int(options["col_ids"][j]) >= 0
            placed = offset is not None and j == i + offset
            if same and ids == "exclude" and not placed:
                continue
            z = 1 if placed or (same and ids == "positive") else -1
            want += r_weight[i] * c_weight[j] * math.log1p(math.exp(-z * t))
    assert float(loss) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("ids", [None, "positive", "exclude"])
@pytest.mark.parametrize("offset", [-1, None])
def test_gradcheck(impl, ids, offset, monkeypatch):
    monkeypatch.setattr(cpu, "TILE", 3)
    x, y, options = problem(5, 7, 3, ids, vectors=True)
    inputs = [x, y, torch.tensor([4.0], dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64), *(options.pop(n) for n in VECTORS)]

    def f(x, y, scale, bias, *vectors):
        return pairwise_sigmoid(x, y, scale, bias, offset=offset, impl=impl, **dict(zip(VECTORS, vectors, strict=True)), **options)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    M=st.integers(0, 60),
    N=st.integers(0, 60),
    D=st.sampled_from([1, 2, 7, 16, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.5, 10.0, 117.0]),
    bias=st.sampled_from([-10.0, 0.0, 3.0]),
    offset=st.one_of(st.none(), st.integers(-70, 70)),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    tile=st.sampled_from([5, 1024]),
)
def test_no_worse_than_eager(M, N, D, dtype, scale, bias, offset, layout, tile):
    x, y, _ = problem(M, N, D, seed=M * 61 + N, dtype=dtype)
    if layout == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    elif layout == "every second":
        x, y = (torch.stack([t, t], 1).reshape(-1, D)[::2] for t in (x, y))
    inputs = [x, y, torch.tensor(scale), torch.tensor(bias)]
    kinds = {"ours": inputs, "eager": inputs, "exact": [t.double() for t in inputs]}
    results, grads = {}, {}
    usual, cpu.TILE = cpu.TILE, tile
    try:
        for kind, leaves in kinds.items():
            leaves = [t.detach().requires_grad_() for t in leaves]
            results[kind] = (pairwise_sigmoid if kind == "ours" else eager)(*leaves, offset=offset)
            grads[kind] = torch.autograd.grad(results[kind], leaves)
    finally:
        cpu.TILE = usual
    assert results["ours"].dtype == torch.float32
    assert_no_worse_than(results["ours"], results["eager"], results["exact"], 1e-6, "loss")
    # Float32 sums err by the size of their terms, which may cancel; a result in 16 bits is rounded once.
    t = (scale * x.double() @ y.double().T + bias).requires_grad_()
    z = torch.full_like(t, -1.0) if offset is None else 2 * torch.eye(max(M, N) + 80, dtype=torch.float64)[:M].roll(offset, 1)[:, :N] - 1
    g = torch.autograd.grad(F.softplus(-z * t).sum(), t)[0].abs()
    terms = (scale * g @ y.double().abs(), scale * g.T @ x.double().abs())
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    for k, name in enumerate(("x", "y")):
        exact = grads["exact"][k]
        assert grads["ours"][k].dtype == dtype
        if exact.numel():
            tol = rounding + 2e-6 * float((terms[k].norm() / exact.norm()).nan_to_num(nan=1.0, posinf=1.0))
            assert_no_worse_than(grads["ours"][k], grads["eager"][k], exact, tol, f"gradient of {name}")
    for k, size in ((2, (g * (t.detach() - bias).abs()).sum() / scale), (3, g.sum())):
        ours, other = (abs(grads[kind][k].double() - grads["exact"][k]) for kind in ("ours", "eager"))
        assert ours <= other + 2e-6 * float(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
def test_confident_pairs(dtype, scale):
    """Every pair is on the right side: the loss is small, down to nothing, and keeps its digits; so do the gradients."""
    y = torch.eye(48).to(dtype)
    x = (y.float() + 0.01 * torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).to(dtype)
    grads = {}
    for kind in ("ours", "exact"):
        leaves = [t.detach().to(dtype if kind == "ours" else torch.float64).requires_grad_() for t in (x, y)]
        loss = pairwise_sigmoid(*leaves, scale, -scale / 2) if kind == "ours" else eager(*leaves, scale, -scale / 2)
        grads[kind] = (loss, *torch.autograd.grad(loss, leaves))
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9}[dtype]
    for ours, exact, allowed in zip(grads["ours"], grads["exact"], (0.0, rounding, rounding), strict=True):
        if exact.abs().max() > 1e-35:
            assert error(ours, exact)[0] < allowed + 2e-7 * scale
        else:
            assert ours.abs().max() < 1e-35


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_overflow(impl):
    """Logits of +-1000 on the wrong side: the loss is linear in them and the coefficients are 1."""
    x, y = torch.tensor([[1.0], [-1.0]], requires_grad=True), torch.tensor([[-1.0], [1.0]])
    loss = pairwise_sigmoid(x, y, 1000.0, impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(4000.0, rel=2e-7)
    assert x.grad.tolist() == [[2000.0], [-2000.0]]


@pytest.mark.parametrize("vectors", [False, True])
def test_nan_and_infinity_pass_through(vectors):
    x, y, options = problem(6, 6, 4, vectors=vectors, dtype=torch.float32)
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[2, 1] = bad
        assert not pairwise_sigmoid(broken, y, 10.0, **options).isfinite()
        assert not sigmoid_forward(broken, y, 10.0, needs=[True] * 4, **options).y.isfinite().all()


@pytest.mark.parametrize("ids", [None, "positive", "exclude"])
def test_blocks_sum_to_the_whole(ids):
    """Row and column blocks with their offsets, added up, are the loss and the gradients of the whole."""
    M, N, D, cut_m, cut_n = 11, 13, 5, 4, 7
    x, y, options = problem(M, N, D, ids, vectors=True)
    needs = [True] * 8
    whole = sigmoid_forward(x, y, 5.0, -2.0, offset=1, needs=needs, **options)
    total = [torch.zeros_like(part) for part in whole]
    for rows in (slice(0, cut_m), slice(cut_m, M)):
        for cols in (slice(0, cut_n), slice(cut_n, N)):
            sides = {n: (v if isinstance(v, str) else v[rows if n.startswith("row") else cols]) for n, v in options.items()}
            block = sigmoid_forward(x[rows], y[cols], 5.0, -2.0, offset=1 + rows.start - cols.start, needs=needs, **sides)
            where = (..., rows, cols, ..., ..., rows, cols, rows, cols)
            for sums, index, part in zip(total, where, block, strict=True):
                sums[index] += part
    for sums, part in zip(total, whole, strict=True):
        torch.testing.assert_close(sums, part, rtol=1e-12, atol=1e-12)


def test_weights_of_zero_and_one_select():
    x, y, _ = problem(9, 8, 4)
    keep_x, keep_y = torch.arange(9) % 2 == 0, torch.arange(8) % 3 == 0
    chosen = pairwise_sigmoid(x, y, 3.0, offset=None, row_weight=keep_x.double(), col_weight=keep_y.double())
    torch.testing.assert_close(chosen, pairwise_sigmoid(x[keep_x], y[keep_y], 3.0, offset=None), rtol=1e-12, atol=0.0)


def test_separable_distances():
    """ProLIP's logits, a product less row and column terms, are row and column biases."""
    x, y, _ = problem(7, 7, 4)
    s, t = torch.rand(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    logits = 6.0 * (x @ y.T - 0.5 * (s[:, None] + t[None, :])) - 1.0
    want = -F.logsigmoid((2 * torch.eye(7, dtype=torch.float64) - 1) * logits).sum()
    torch.testing.assert_close(pairwise_sigmoid(x, y, 6.0, -1.0, row_bias=-3.0 * s, col_bias=-3.0 * t), want, rtol=1e-12, atol=0.0)


def test_float16_of_a_large_batch():
    """At B = 65,536 the sum's gradients leave float16 and the mean's coefficients fall below it; the gradients of the mean survive."""
    D, B = 4, 4096
    x, y = (F.normalize(torch.rand(B, D, generator=torch.Generator().manual_seed(k)), dim=1).half().requires_grad_() for k in (0, 1))
    with torch.no_grad():
        unit = sigmoid_forward(x, y, 100.0, needs=[True, True])
    assert float(unit.x.abs().max()) > torch.finfo(torch.float16).max
    (pairwise_sigmoid(x, y, 100.0) / 65536).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    (eager(*exact, 100.0, 0.0) / 65536).backward()
    for ours, want in zip((x, y), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), want.grad, rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("options", [{}, {"ids": "positive"}, {"ids": "exclude"}, {"vectors": True}], ids=str)
def test_no_tensor_of_all_pairs(options):
    M, N, D = 3000, 2900, 8
    x, y, rest = problem(M, N, D, dtype=torch.float32, **options)
    x.requires_grad_()
    scale = torch.tensor(10.0, requires_grad=True)
    with forbid_large_tensors(M * N // 4):
        pairwise_sigmoid(x, y.requires_grad_(), scale, -5.0, **rest).backward()
    assert x.grad is not None and scale.grad is not None


def test_poisoned_memory(monkeypatch):
    """Nothing is read that was not written: with NaN in fresh memory every result is the same."""
    x, y, options = problem(37, 21, 5, "positive", vectors=True, dtype=torch.float32)
    clean = sigmoid_forward(x, y, 5.0, -2.0, needs=[True] * 8, **options)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(cpu, "TILE", 16)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = sigmoid_forward(x, y, 5.0, -2.0, needs=[True] * 8, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M, N", [(3, cpu.TILE + 6), (cpu.TILE + 6, 3)])
@pytest.mark.parametrize("trained", ["", "x", "y", "xy"])
def test_the_gradient_of_the_scale_is_that_of_all_tiles(M, N, trained):
    """Whichever of the features are frozen: it is read off another product then."""
    x, y = (F.normalize(torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), dim=1) for n in (M, N))
    products = x @ y.T
    signs = 2 * torch.eye(M, N, dtype=torch.float64) - 1
    exact = (-signs * torch.sigmoid(-signs * (3 * products - 1)) * products).sum()
    x.requires_grad_("x" in trained)
    y.requires_grad_("y" in trained)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    pairwise_sigmoid(x, y, scale, -1.0, impl="cpu").backward()
    torch.testing.assert_close(scale.grad, exact, rtol=1e-11, atol=0)
