"""The mathematics of similarity_logsumexp on the CPU: against loops, float64, eager PyTorch and its own invariants."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels import _tiles
from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors
from fastvlp_kernels.similarity_logsumexp import (
    LogSumExp,
    Needs,
    ResultGrads,
    Results,
    logsumexp_backward,
    logsumexp_forward,
    merge,
    similarity_logsumexp,
)

EPS = 2**-22  # two roundings of a float32, of the same size whatever the scale
VECTORS = ("row_bias", "col_bias", "row_scale", "col_scale")


def problem(M: int, N: int, D: int, ids: str | None = None, vectors: bool = False, *, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Normalised features and everything else that the operator takes; rows 0 and columns 0 match nothing."""
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


def finite(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(result.isfinite(), result, 0.0) for result in results)


def gradients(results: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a fixed random combination of the results."""
    random = torch.Generator().manual_seed(seed)
    total = sum((r.double() * torch.randn(r.shape, generator=random, dtype=torch.float64)).sum() for r in finite(results))
    return list(torch.autograd.grad(total, inputs))


def statistics(S: Tensor, offset: int) -> tuple[Tensor, ...]:
    partner = torch.arange(S.shape[0]) + offset
    inside = (partner >= 0) & (partner < S.shape[1])
    positive = S.gather(1, partner.clamp(0, S.shape[1] - 1)[:, None])[:, 0].masked_fill(~inside, 0.0)
    return S.logsumexp(1), S.logsumexp(0), positive


def eager(x: Tensor, y: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, ...]:
    """What one writes without the operator: products in the dtype of x, log-sum-exps in float32 (or float64)."""
    S = (scale.to(x.dtype) * x) @ y.T
    return statistics(S if S.dtype == torch.float64 else S.float(), offset)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("ids", ["exclude", "only", "both", "sums"])
def test_formula_by_loops(impl, ids):
    M, N, D, scale, offset = 4, 6, 3, 7.0, 1
    x, y, options = problem(M, N, D, ids, vectors=True)
    results = similarity_logsumexp(x, y, scale, offset=offset, impl=impl, **options)
    r_bias, c_bias, r_scale, c_scale = (options[name].tolist() for name in VECTORS)
    row_ids, col_ids = options["row_ids"].tolist(), options["col_ids"].tolist()
    pairs = {}
    for i in range(M):
        for j in range(N):
            dot = sum(float(x[i, d]) * float(y[j, d]) for d in range(D))
            pairs[i, j] = scale * r_scale[i] * c_scale[j] * dot + r_bias[i] + c_bias[j]
    same = {(i, j) for i, j in pairs if row_ids[i] == col_ids[j] and row_ids[i] >= 0}
    counted = {"exclude": set(pairs) - same, "only": same}.get(ids, set(pairs))
    for kind, which in enumerate([counted, same] if ids in ("both", "sums") else [counted]):
        for axis, length in enumerate((M, N)):
            for k in range(length):
                terms = [pairs[pair] for pair in which if pair[axis] == k]
                want = math.log(sum(map(math.exp, terms))) if terms else -math.inf
                want = sum(terms) if kind == 1 and ids == "sums" else want
                assert float(results[2 * kind + axis][k]) == pytest.approx(want, rel=1e-12)
    assert len(results) == (5 if ids in ("both", "sums") else 3)
    assert results[-1].tolist() == pytest.approx([pairs[i, i + offset] if i + offset < N else 0.0 for i in range(M)])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("ids", [None, "exclude", "only", "both", "sums"])
@pytest.mark.parametrize("scale", [1.5, 100.0])
def test_gradcheck(impl, ids, scale, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE", 3)
    x, y, options = problem(5, 7, 3, ids, vectors=True)
    inputs = [x, y, torch.tensor([scale], dtype=torch.float64), *(options.pop(name) for name in VECTORS)]

    def f(x, y, scale, *vectors):
        return finite(similarity_logsumexp(x, y, scale, offset=-1, impl=impl, **dict(zip(VECTORS, vectors, strict=True)), **options))

    # Central differences of a function with second derivatives of scale^2 err by about scale^3 * eps^2.
    eps = 1e-6 / scale**0.5
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs], eps=eps, atol=1e-5 * scale, rtol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 60),
    N=st.integers(1, 60),
    D=st.sampled_from([1, 2, 7, 16, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.5, 14.25, 100.0]),
    offset=st.integers(-70, 70),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    tile=st.sampled_from([5, 512]),
)
def test_no_worse_than_eager(M, N, D, dtype, scale, offset, layout, tile):
    x, y, _ = problem(M, N, D, seed=M * 61 + N, dtype=dtype)
    if dtype == torch.float32:
        x, y = ((t * 64).round() / 64 for t in (x, y))  # products and S are exact on any CPU
    if layout == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    elif layout == "every second":
        x, y = (torch.stack([t, t], 1).reshape(-1, D)[::2] for t in (x, y))
    inputs = [x, y, torch.tensor(scale, dtype=torch.float32)]
    kinds = {"ours": inputs, "eager": inputs, "exact": [t.double() for t in inputs]}
    results, grads = {}, {}
    usual, _tiles.TILE = _tiles.TILE, tile
    try:
        for kind, leaves in kinds.items():
            leaves = [t.detach().requires_grad_() for t in leaves]
            results[kind] = similarity_logsumexp(*leaves, offset=offset) if kind == "ours" else eager(*leaves, offset)
            grads[kind] = gradients(results[kind], leaves)
    finally:
        _tiles.TILE = usual
    for k, name in enumerate(("row", "col", "positive")):
        assert_no_worse_than(results["ours"][k], results["eager"][k], results["exact"][k], EPS, name)
    # Float32 sums err by the size of their terms, which may cancel; a result in 16 bits is rounded once.
    S = (scale * x.double() @ y.double().T).requires_grad_()
    dS = gradients(statistics(S, offset), [S])[0].abs()
    terms = (scale * dS @ y.double().abs(), scale * dS.T @ x.double().abs())
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    for k, name in enumerate(("x", "y")):
        exact = grads["exact"][k]
        tol = rounding + EPS * float((terms[k].norm() / exact.norm()).nan_to_num(nan=1.0, posinf=1.0))
        assert_no_worse_than(grads["ours"][k], grads["eager"][k], exact, tol, f"gradient of {name}")
    ours, other = (abs(grads[kind][2].double() - grads["exact"][2]) for kind in ("ours", "eager"))
    assert ours <= other + EPS * float((dS * S.detach().abs()).sum() / scale)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("tile", [16, 512])
def test_probabilities_err_as_those_of_a_softmax(impl, tile, monkeypatch):
    """A log-sum-exp in one float32 number gives 7e-7 here."""
    monkeypatch.setattr(_tiles, "TILE", tile)
    x, y = ((t.float() * 64).round() / 64 for t in problem(12, 12, 8)[:2])
    bias, rows = torch.zeros(12, requires_grad=True), []
    for i in range(12):
        row = similarity_logsumexp(x, y, 100.0, col_bias=bias, impl=impl)[0]
        rows.append(torch.autograd.grad(row[i], bias)[0])
    exact = (100 * x.double() @ y.double().T).softmax(1)
    assert error(torch.stack(rows), exact)[0] < 6e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", ["exclude", "only", "both", "sums"])
def test_tiles_give_the_dense_result(dtype, ids, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE", 16)
    x, y, options = problem(70, 53, 12, ids, vectors=True, dtype=dtype)
    inputs = [x, y, torch.tensor(20.0, dtype=dtype), *(options.pop(name) for name in VECTORS)]
    exact = [t.double().requires_grad_() for t in inputs]
    ours = [t.requires_grad_() for t in inputs]
    pairs = []
    for leaves, impl in ((ours, "cpu"), (exact, "reference")):
        results = similarity_logsumexp(*leaves[:3], **dict(zip(VECTORS, leaves[3:], strict=True)), offset=4, impl=impl, **options)
        pairs.append([*results, *gradients(results, leaves)])
    for mine, want in zip(*pairs, strict=True):
        assert mine.dtype in (dtype, torch.float32)
        there = want.isfinite()
        assert torch.equal(there, mine.isfinite())
        assert max(error(mine[there], want[there])) < (1e-5 if mine.dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("used", [(2,), (3,), (0, 3), (1, 2)])
def test_sums_of_positives_alone(used):
    """Gradients of some of the results; an anchor without a positive gets 0 and no gradient."""
    x, y, options = problem(50, 37, 6, "sums")
    leaves = [x.requires_grad_(), y.requires_grad_(), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)]
    results = similarity_logsumexp(*leaves, **options)
    S = leaves[2] * x @ y.T
    same = (options["row_ids"][:, None] == options["col_ids"]) & (options["row_ids"][:, None] >= 0)
    dense = S.logsumexp(1), S.logsumexp(0), torch.where(same, S, 0.0).sum(1), torch.where(same, S, 0.0).sum(0)
    assert not same[0].any() and results[2][0] == 0 and results[3][0] == 0
    want, mine = (gradients(tuple(found[k] for k in used), leaves) for found in (dense, results))
    for one, other in zip(mine, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    alone = torch.autograd.grad(similarity_logsumexp(*leaves, **options)[2][0], x)[0]
    assert not alone.any()


@pytest.mark.parametrize(("scale", "kind"), [(14.0, "bounded"), (60.0, "one shift"), (100.0, "far apart")])
def test_running_maxima(scale, kind):
    """Rows whose cosines are all near -1, beside rows near +1, at CLIP's largest scale."""
    random = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(80, 24, generator=random), dim=1) for _ in range(2))
    if kind == "far apart":
        direction = F.normalize(torch.randn(24, generator=random), dim=0)
        x = F.normalize(0.05 * x + torch.where(torch.arange(80)[:, None] < 40, -direction, direction), dim=1)
        y = F.normalize(0.05 * y + direction, dim=1)
    both = []
    for leaves in ([x, y, torch.tensor(scale)], [x.double(), y.double(), torch.tensor(scale, dtype=torch.float64)]):
        leaves = [t.requires_grad_() for t in leaves]
        results = similarity_logsumexp(*leaves, offset=0)
        both.append((results, torch.autograd.grad((results[0] + results[1] - 2 * results[2]).mean() / 2, leaves)))
    for mine, want in zip(both[0][0], both[1][0], strict=True):
        assert max(error(mine, want)) < 1e-6
    for mine, want in zip(both[0][1], both[1][1], strict=True):
        assert max(error(mine, want)) < 2e-5


def test_confident_pairs_in_bfloat16():
    """p - 1 is joined before rounding, so a loss near zero keeps its gradient; eager in the same dtype loses it."""
    random = torch.Generator().manual_seed(0)
    y = F.normalize(torch.randn(512, 64, generator=random), dim=1)
    x = F.normalize(y + 0.5 * F.normalize(torch.randn(512, 64, generator=random), dim=1), dim=1).bfloat16()
    inputs = [x, y.bfloat16(), torch.tensor(14.0)]
    grads = {}
    for kind in ("ours", "eager", "exact"):
        leaves = [(t.double() if kind == "exact" else t).detach().requires_grad_() for t in inputs]
        row, col, positive = similarity_logsumexp(*leaves, offset=0) if kind == "ours" else eager(*leaves, 0)
        loss = (row + col - 2 * positive).mean() / 2
        grads[kind] = torch.autograd.grad(loss, leaves)
        assert float(loss.detach()) < 0.01
    for ours, other, exact in zip(*(grads[kind] for kind in ("ours", "eager", "exact")), strict=True):
        assert error(ours, exact)[0] < 3e-3
        assert error(ours, exact)[0] < error(other, exact)[0] / 3


@pytest.mark.parametrize("ids", [None, "both", "sums"])
def test_blocks_merge_into_the_whole(ids):
    """Statistics merged over blocks, and block gradients from merged statistics, are those of the whole matrix."""
    x, y, options = problem(45, 62, 6, ids, vectors=True)
    options["scale"] = torch.tensor(12.0, dtype=torch.float64)
    offset, random = 3, torch.Generator().manual_seed(1)
    needs = Needs(*[True] * 7)
    whole = logsumexp_forward(x, y, offset=offset, **options)
    lengths = [len(part.log) for part in whole[:4]] + [len(whole.positive)]
    grads = ResultGrads(*(torch.randn(length, generator=random, dtype=torch.float64) if length else None for length in lengths))
    want = logsumexp_backward(grads, whole, needs, x, y, offset=offset, **options)

    def cut(i: slice, j: slice) -> dict[str, object]:
        vectors = {name: value for name, value in options.items() if isinstance(value, Tensor) and value.ndim}
        part = {name: value[i if name.startswith("row") else j] for name, value in vectors.items()}
        return {**options, **part, "offset": offset + i.start - j.start}

    blocks = [(slice(i, min(i + 20, 45)), slice(j, min(j + 31, 62))) for i in (0, 20, 40) for j in (0, 31)]
    adds = [ids == "sums" and kind > 1 for kind in range(4)]
    start = [(0.0 if add else -torch.inf, 0.0) for add in adds]
    merged = [LogSumExp(*(torch.full_like(part.log, value) for value in pair)) for part, pair in zip(whole, start, strict=False)]
    positive = torch.zeros_like(whole.positive)
    for i, j in blocks:
        part = logsumexp_forward(x[i], y[j], **cut(i, j))
        for into, values, where, add in zip(merged, part, (i, j, i, j), adds, strict=False):
            if values.log.numel():
                both = LogSumExp(into.reference[where], into.log[where] + values.log) if add else merge(into.at(where), values)
                into.reference[where], into.log[where] = both
        positive[i] += part.positive
    for ours, exact in zip([*(m.value() for m in merged), positive], [*(w.value() for w in whole[:4]), whole.positive], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)

    sums = [torch.zeros_like(g) for g in want]
    for i, j in blocks:
        local = [None if g is None else g[where] for g, where in zip(grads, (i, j, i, j, i), strict=True)]
        stats = [m.at(where) if m.log.numel() else m for m, where in zip(merged, (i, j, i, j), strict=True)]
        own = logsumexp_forward(x[i], y[j], **cut(i, j)).positive
        part = logsumexp_backward(ResultGrads(*local), Results(*stats, own), needs, x[i], y[j], **cut(i, j))
        for total, grad, where in zip(sums, part, (i, j, ..., i, j, i, j), strict=True):
            total[where] += grad
    for ours, exact in zip(sums, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ids", ["both", "sums"])
def test_prefixes_are_separate_problems(ids):
    x, y, options = problem(21, 30, 16, ids, dtype=torch.float64)
    random = torch.Generator().manual_seed(2)
    for name, size in (("row_scale", 21), ("col_scale", 30)):
        options[name] = torch.rand(3, size, generator=random, dtype=torch.float64) + 0.5
    widths = (4, 9, 16)
    leaves = [x.requires_grad_(), y.requires_grad_(), *(options[name].requires_grad_() for name in ("row_scale", "col_scale"))]
    together = similarity_logsumexp(x, y, 9.0, offset=2, prefixes=widths, **options)
    rest = {name: value for name, value in options.items() if not name.endswith("scale")}
    apart = [
        similarity_logsumexp(x[:, :w], y[:, :w], 9.0, offset=2, row_scale=options["row_scale"][k], col_scale=options["col_scale"][k],
                             impl="reference", **rest)
        for k, w in enumerate(widths)
    ]  # fmt: skip
    stacked = tuple(torch.stack(parts) for parts in zip(*apart, strict=True))
    for ours, want in zip([*together, *gradients(together, leaves)], [*stacked, *gradients(stacked, leaves)], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)
    single = similarity_logsumexp(x.detach().bfloat16(), y.detach().bfloat16(), 9.0, prefixes=(16,))
    assert single[0].shape == (1, 21) and single[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("value", [0.0, 13.0])
def test_scale_as_a_tensor(shape, value):
    x, y, _ = problem(9, 11, 5)
    scale = torch.full(shape, value, dtype=torch.float32, requires_grad=True)
    row, col = similarity_logsumexp(x, y, scale)
    (grad,) = torch.autograd.grad(row.sum() + 2 * col.sum(), scale)
    dots = x @ y.T
    S = value * dots
    want = ((S.softmax(1) + 2 * S.softmax(0)) * dots).sum()
    assert grad.shape == shape and grad.dtype == torch.float32
    assert float(grad) == pytest.approx(float(want), rel=1e-6)
    assert torch.equal(similarity_logsumexp(x, y, value)[0], row)


def test_minus_infinity_takes_a_column_out():
    x, y, _ = problem(6, 8, 4, dtype=torch.float32)
    bias = torch.zeros(8)
    bias[5:] = -torch.inf
    leaves = [x.requires_grad_(), y.requires_grad_()]
    row, col = similarity_logsumexp(x, y, 10.0, col_bias=bias)
    few = similarity_logsumexp(x, y[:5], 10.0)
    torch.testing.assert_close(row, few[0])
    assert torch.equal(col[5:], torch.full((3,), -torch.inf))
    ours, want = torch.autograd.grad(row.sum(), leaves), torch.autograd.grad(few[0].sum(), leaves)
    for mine, other in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_a_nan_is_passed_on(scale):
    x, y, _ = problem(40, 33, 4, dtype=torch.float32)
    x[7, 2] = torch.nan
    leaves = [x.requires_grad_(), y.requires_grad_()]
    row, col = similarity_logsumexp(*leaves, scale)
    assert row[7].isnan() and col.isnan().all()
    dx, dy = torch.autograd.grad(row.sum(), leaves)
    assert dx[7].isnan().all() and dy.isnan().all()


@pytest.mark.parametrize("ids", [None, "exclude", "both", "sums"])
def test_every_output_is_written(ids):
    """Uninitialised memory is NaN here, and results are the same bits as without that."""
    x, y, options = problem(50, 37, 6, ids, vectors=True, dtype=torch.float32)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(8.0, requires_grad=True)]
        results = similarity_logsumexp(*leaves, offset=1, **options)
        return [*results, *gradients(results, leaves)]

    plain = run()
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.parametrize("ids", [None, "both", "sums"])
@pytest.mark.parametrize("size", [200, 1600])
def test_no_tensor_of_the_size_of_the_matrix(ids, size):
    x, y, options = problem(size, size, 8, ids, vectors=True, dtype=torch.float32)
    leaves = [x.requires_grad_(), y.requires_grad_()]
    with forbid_large_tensors(size * size // 8):
        results = similarity_logsumexp(*leaves, 10.0, offset=0, **options)
        sum(r.sum() for r in finite(results)).backward()
    assert x.grad is not None and y.grad is not None


def test_only_what_needs_a_gradient_is_computed():
    x, y, _ = problem(30, 40, 8, dtype=torch.float32)

    def products(x_needs: bool, y_needs: bool) -> int:
        a, b = x.clone().requires_grad_(x_needs), y.clone().requires_grad_(y_needs)
        row, col = similarity_logsumexp(a, b, 10.0)
        with torch.profiler.profile() as profile:
            (row.sum() + col.sum()).backward()
        assert (a.grad is not None) == x_needs and (b.grad is not None) == y_needs
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))

    full, locked = products(True, True), products(False, True)
    assert locked == products(True, False) and 3 * locked == 2 * full
    with torch.no_grad():
        assert similarity_logsumexp(x.requires_grad_(), y, 10.0)[0].grad_fn is None
