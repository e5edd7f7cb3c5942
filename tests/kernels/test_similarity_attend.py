"""The mathematics of similarity_attend on the CPU: against loops, float64, eager PyTorch and its own invariants."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels import _tiles
from fastvlp_kernels._logsumexp import LogSumExp, merge
from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors
from fastvlp_kernels.similarity_attend import Needs, ResultGrads, Results, attend_backward, attend_forward, similarity_attend

BIASES = ("row_bias", "col_bias")


def problem(M: int, N: int, D: int, E: int, ids: str | None = None, biases: bool = False, *, seed: int = 0, dtype=torch.float64):
    """Normalised features, values, and everything else that the operator takes; row 0 and column 0 match nothing."""
    random = torch.Generator().manual_seed(seed)
    x, y, v = (torch.randn(size, generator=random, dtype=torch.float64) for size in ((M, D), (N, D), (N, E)))
    options: dict[str, object] = {}
    if biases:
        options |= {name: torch.randn(size, generator=random).to(dtype) for name, size in zip(BIASES, (M, N), strict=True)}
    if ids is not None:
        row_ids, col_ids = (torch.randint(0, 4, (size,), generator=random) for size in (M, N))
        options |= {"ids": ids, "row_ids": row_ids, "col_ids": col_ids}
        options["row_ids"][0] = options["col_ids"][0] = -1
    return F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype), v.to(dtype), options


def gradients(results: tuple[Tensor, ...], inputs: list[Tensor], used: tuple[int, ...] = (0, 1)) -> list[Tensor]:
    """Gradients of a fixed random combination of the results that are used."""
    parts = [(torch.where(r.isfinite(), r, 0.0).double() * weight).sum() for r, weight in zip(results, upstream(results), strict=True)]
    return list(torch.autograd.grad(sum(parts[k] for k in used), inputs))


def upstream(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Random gradients that every dtype holds exactly."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(r.shape, generator=random).bfloat16().double() for r in results]


def eager(x: Tensor, y: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes without the operator: products in the dtype of x, softmax in float32 (or float64)."""
    S = (scale.to(x.dtype) * x) @ y.T
    S = S if S.dtype == torch.float64 else S.float()
    return S.softmax(1).to(v.dtype) @ v, S.logsumexp(1)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("ids", [None, "exclude", "only"])
def test_formula_by_loops(impl, ids):
    M, N, D, E, scale = 4, 6, 3, 5, 7.0
    x, y, v, options = problem(M, N, D, E, ids, biases=True)
    if ids is not None:
        options["row_ids"] = torch.tensor([-1, 0, 1, 7])
        options["col_ids"] = torch.tensor([-1, 0, 1, 1, 2, 0])
    out, lse = similarity_attend(x, y, v, scale, impl=impl, **options)
    row_bias, col_bias = (options[name].tolist() for name in BIASES)
    for i in range(M):
        terms = {}
        for j in range(N):
            same = ids is not None and options["row_ids"][i] == options["col_ids"][j] and options["row_ids"][i] >= 0
            if ids is None or same == (ids == "only"):
                dot = sum(float(x[i, d]) * float(y[j, d]) for d in range(D))
                terms[j] = math.exp(scale * dot + row_bias[i] + col_bias[j])
        total = sum(terms.values())
        assert float(lse[i]) == pytest.approx(math.log(total) if terms else -math.inf, rel=1e-12)
        for e in range(E):
            want = sum(term * float(v[j, e]) for j, term in terms.items()) / total if terms else 0.0
            assert float(out[i, e]) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("ids", [None, "exclude", "only"])
@pytest.mark.parametrize("scale", [1.5, 100.0])
def test_gradcheck(impl, ids, scale, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE", 3)
    x, y, v, options = problem(5, 7, 3, 4, ids, biases=True)
    inputs = [x, y, v, torch.tensor([scale], dtype=torch.float64), *(options.pop(name) for name in BIASES)]

    def f(x, y, v, scale, row_bias, col_bias):
        out, lse = similarity_attend(x, y, v, scale, row_bias=row_bias, col_bias=col_bias, impl=impl, **options)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    # Central differences of a function with second derivatives of scale^2 err by about scale^3 * eps^2.
    eps = 1e-6 / scale**0.5
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs], eps=eps, atol=1e-5 * scale, rtol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 60),
    N=st.integers(1, 60),
    D=st.sampled_from([1, 2, 7, 16, 33]),
    E=st.sampled_from([1, 3, 24, 65]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.5, 14.3, 100.0]),
    used=st.sampled_from([(0,), (1,), (0, 1)]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    tile=st.sampled_from([5, 512]),
)
def test_no_worse_than_eager(M, N, D, E, dtype, scale, used, layout, tile):
    x, y, v, _ = problem(M, N, D, E, seed=M * 61 + N, dtype=dtype)
    if layout == "transposed":
        x, y, v = (t.T.contiguous().T for t in (x, y, v))
    elif layout == "every second":
        x, y, v = (torch.stack([t, t], 1).reshape(-1, t.shape[1])[::2] for t in (x, y, v))
    inputs = [x, y, v, torch.tensor(scale)]
    results, grads = {}, {}
    usual, _tiles.TILE = _tiles.TILE, tile
    try:
        for kind in ("ours", "eager", "exact"):
            leaves = [(t.double() if kind == "exact" else t).detach().requires_grad_() for t in inputs]
            results[kind] = similarity_attend(*leaves) if kind == "ours" else eager(*leaves)
            wanted = [leaves[k] for k in ((0, 1, 3, 2) if 0 in used else (0, 1, 3))]
            grads[kind] = gradients(results[kind], wanted, used)
    finally:
        _tiles.TILE = usual
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    # Every float32 logit may be half a unit in its last place off, eager's too, and a probability errs by as much.
    logits = 1e-6 + 2**-24 * scale
    assert results["ours"][0].dtype == dtype and results["ours"][1].dtype == torch.float32
    for k, (name, tol) in enumerate((("out", rounding + logits), ("lse", 1e-6))):
        assert_no_worse_than(*(results[kind][k] for kind in ("ours", "eager", "exact")), tol, name)
    # Float32 sums err by the size of their terms, which may cancel; a result in 16 bits is rounded once.
    X, Y, V = (t.double() for t in (x, y, v))
    S = scale * X @ Y.T
    g_out, g_lse = upstream(results["exact"])
    P, dP = S.softmax(1), (g_out @ V.T).abs() * (0 in used)
    dS = P * (dP + (P * dP).sum(1, keepdim=True) + (g_lse.abs() * (1 in used))[:, None])
    sizes = {"x": scale * dS @ Y.abs(), "y": scale * dS.T @ X.abs(), "scale": (dS * S.abs()).sum() / scale, "v": P.T @ g_out.abs()}
    for k, name in enumerate(("x", "y", "scale", "v")[: len(wanted)]):
        ours, other, exact = (grads[kind][k] for kind in ("ours", "eager", "exact"))
        size = sizes[name].norm()
        # Gradients that are zero but for rounding, as with one column, are compared with their terms.
        shift = size if exact.norm() < 1e-6 * size else 0.0
        tol = logits * float(size / (exact + shift).norm()) if size > 0 else logits
        assert_no_worse_than(ours.double() + shift, other.double() + shift, exact + shift, tol + (name != "scale") * rounding, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [None, "exclude", "only"])
def test_tiles_give_the_dense_result(dtype, ids, monkeypatch):
    monkeypatch.setattr(_tiles, "TILE", 16)
    x, y, v, options = problem(70, 53, 12, 21, ids, biases=True, dtype=dtype)
    inputs = [x, y, v, torch.tensor(20.0, dtype=dtype), *(options.pop(name) for name in BIASES)]
    pairs = []
    for impl in ("cpu", "reference"):
        leaves = [(t.double() if impl == "reference" else t).detach().requires_grad_() for t in inputs]
        results = similarity_attend(*leaves[:4], **dict(zip(BIASES, leaves[4:], strict=True)), impl=impl, **options)
        pairs.append([*results, *gradients(results, leaves)])
    # The gradient of the scale is a sum over x_i dx_i, whose terms nearly cancel here.
    terms = float((leaves[0].detach() * pairs[1][2]).abs().sum()) / 20
    for k, (mine, want) in enumerate(zip(*pairs, strict=True)):
        assert mine.dtype in (dtype, torch.float32)
        there = want.isfinite()
        assert torch.equal(there, mine.isfinite())
        rounded = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[mine.dtype]
        if k == 5:
            assert abs(float(mine) - float(want)) < 1e-6 * terms + rounded * abs(float(want)) * (dtype != torch.float32)
        else:
            assert max(error(mine[there], want[there])) < rounded


@pytest.mark.parametrize(("scale", "kind"), [(14.0, "bounded"), (60.0, "maxima"), (100.0, "far apart")])
def test_running_maxima(scale, kind, monkeypatch):
    """Rows whose cosines are all near -1, beside rows near +1, at CLIP's largest scale."""
    monkeypatch.setattr(_tiles, "TILE", 32)
    x, y, v, _ = problem(80, 90, 24, 8, dtype=torch.float32)
    if kind == "far apart":
        direction = F.normalize(torch.ones(24), dim=0)
        x = F.normalize(0.05 * x + torch.where(torch.arange(80)[:, None] < 40, -direction, direction), dim=1)
        y = F.normalize(0.05 * y + direction, dim=1)
    both = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, v, torch.tensor(scale))]
        results = similarity_attend(*leaves, impl="cpu" if dtype == torch.float32 else "reference")
        both.append((*results, *gradients(results, leaves)))
    for mine, want in zip(*both, strict=True):
        assert max(error(mine, want)) < 2e-5


def test_nearly_one_hot_rows_in_bfloat16():
    """dP - delta is formed from averages that were not rounded, so the small rest of a confident row survives; eager loses it."""
    x, y, v, _ = problem(256, 256, 64, 32, dtype=torch.float32)
    x = F.normalize(y + 0.4 * x, dim=1)
    inputs = [t.bfloat16() for t in (x, y, v)] + [torch.tensor(16.0)]
    grads = {}
    for kind in ("ours", "eager", "exact"):
        leaves = [(t.double() if kind == "exact" else t).detach().requires_grad_() for t in inputs]
        out, lse = similarity_attend(*leaves) if kind == "ours" else eager(*leaves)
        random = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=random).bfloat16().to(out.dtype)
        grads[kind] = torch.autograd.grad(out, leaves, upstream)
        assert float((out.detach().float() - v).norm() / v.norm()) < 0.05
    for k in (0, 1, 3):
        ours, other = (error(grads[kind][k], grads["exact"][k])[0] for kind in ("ours", "eager"))
        assert ours < 3e-3 and ours < other / 3


@pytest.mark.parametrize("ids", [None, "only"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_blocks_merge_into_the_whole(ids, used):
    """Results merged over blocks, and block gradients from merged results, are those of the whole matrix."""
    x, y, v, options = problem(45, 62, 6, 5, ids, biases=True)
    options["scale"], random = torch.tensor(12.0, dtype=torch.float64), torch.Generator().manual_seed(1)
    needs = Needs(*[True] * 6)
    whole = attend_forward(x, y, v, **options)
    upstream = [torch.randn(r.shape, generator=random, dtype=torch.float64) for r in (whole.out, whole.lse.log)]
    grads = ResultGrads(*(g if k in used else None for k, g in enumerate(upstream)))
    want = attend_backward(grads, whole, needs, x, y, v, **options)

    def cut(i: slice, j: slice) -> dict[str, object]:
        vectors = {name: value for name, value in options.items() if isinstance(value, Tensor) and value.ndim}
        return {**options, **{name: value[i if name.startswith("row") else j] for name, value in vectors.items()}}

    blocks = [(slice(i, min(i + 20, 45)), slice(j, min(j + 31, 62))) for i in (0, 20, 40) for j in (0, 31)]
    out, lse = torch.zeros_like(whole.out), LogSumExp(torch.full_like(whole.lse.log, -torch.inf), torch.zeros_like(whole.lse.log))
    for i, j in blocks:
        part = attend_forward(x[i], y[j], v[j], **cut(i, j))
        both = merge(lse.at(i), part.lse)
        shares = [both.probability(old.value())[:, None] for old in (lse.at(i), part.lse)]
        out[i] = out[i] * shares[0] + part.out * shares[1]
        lse.reference[i], lse.log[i] = both
    torch.testing.assert_close(out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.value(), whole.lse.value(), rtol=1e-12, atol=1e-12)

    sums = [torch.zeros_like(g) for g in want]
    for i, j in blocks:
        local = ResultGrads(*(None if g is None else g[i] for g in grads))
        part = attend_backward(local, Results(out[i], lse.at(i)), needs, x[i], y[j], v[j], **cut(i, j))
        for total, grad, where in zip(sums, part, (i, j, j, ..., i, j), strict=True):
            total[where] += grad
    for ours, exact in zip(sums, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_autograd_through_merged_blocks():
    """The same by autograd alone: both results are differentiable, and rows that are empty everywhere bring no NaN."""
    x, y, v, options = problem(20, 30, 6, 5, "only", dtype=torch.float64)
    leaves = [x.requires_grad_(), y.requires_grad_(), v.requires_grad_()]
    whole = similarity_attend(*leaves, 9.0, **options)
    parts = []
    for j in (slice(0, 13), slice(13, 30)):
        parts.append(similarity_attend(x, y[j], v[j], 9.0, **{**options, "col_ids": options["col_ids"][j]}))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    merged = sum(out * (part - shift).exp()[:, None] for out, part in parts), lse
    for ours, want in zip(gradients(merged, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_a_row_without_columns():
    x, y, v, _ = problem(6, 8, 4, 3, dtype=torch.float32)
    leaves = [x.requires_grad_(), y.requires_grad_(), v.requires_grad_()]
    row_bias = torch.zeros(6)
    row_bias[2] = -torch.inf
    out, lse = similarity_attend(*leaves, 5.0, row_bias=row_bias)
    assert torch.equal(out[2], torch.zeros(3)) and lse[2] == -torch.inf
    merged = torch.ones_like(lse).masked_fill(lse == -torch.inf, torch.nan)  # what torch.logaddexp gives for -inf and -inf
    grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), merged])
    assert grads[0][2].abs().max() == 0 and all(grad.isfinite().all() for grad in grads)
    ids = {"row_ids": torch.full((6,), -1), "col_ids": torch.arange(8), "ids": "only"}
    out, lse = similarity_attend(*leaves, 5.0, **ids)
    assert out.abs().max() == 0 and (lse == -torch.inf).all()
    for grad in torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)]):
        assert grad.abs().max() == 0


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("value", [0.0, 13.0])
def test_scale_as_a_tensor(shape, value):
    x, y, v, _ = problem(9, 11, 5, 4)
    scale = torch.full(shape, value, dtype=torch.float32, requires_grad=True)
    out, lse = similarity_attend(x, y, v, scale)
    (grad,) = torch.autograd.grad(out.sum() + 2 * lse.sum(), scale)
    dots = x @ y.T
    P, total = (value * dots).softmax(1), v.sum(1)
    want = (P * (total - P @ v.sum(1, keepdim=True) + 2) * dots).sum()
    assert grad.shape == shape and grad.dtype == torch.float32
    assert float(grad) == pytest.approx(float(want), rel=1e-6)
    assert torch.equal(similarity_attend(x, y, v, value)[0], out)


def test_minus_infinity_takes_a_column_out():
    x, y, v, _ = problem(6, 8, 4, 3, dtype=torch.float32)
    bias = torch.zeros(8)
    bias[5:] = -torch.inf
    leaves = [x.requires_grad_(), y.requires_grad_(), v.requires_grad_()]
    out = similarity_attend(x, y, v, 10.0, col_bias=bias)
    few = similarity_attend(x, y[:5], v[:5], 10.0)
    for ours, want in zip([*out, *gradients(out, leaves)], [*few, *gradients(few, leaves)], strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_a_nan_is_passed_on(scale):
    x, y, v, _ = problem(40, 33, 4, 6, dtype=torch.float32)
    x[7, 2] = torch.nan
    leaves = [x.requires_grad_(), y.requires_grad_(), v.requires_grad_()]
    out, lse = similarity_attend(*leaves, scale)
    assert out[7].isnan().all() and lse[7].isnan() and out[:7].isfinite().all()
    dx, dy, dv = torch.autograd.grad(out.sum(), leaves)
    assert dx[7].isnan().all() and dx[:7].isfinite().all() and dy.isnan().all() and dv.isnan().all()


@pytest.mark.parametrize("ids", [None, "exclude", "only"])
def test_every_output_is_written(ids):
    """Uninitialised memory is NaN here, and results are the same bits as without that."""
    x, y, v, options = problem(50, 37, 6, 9, ids, biases=True, dtype=torch.float32)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y, v, torch.tensor(8.0))]
        results = similarity_attend(*leaves, **options)
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


@pytest.mark.parametrize("ids", [None, "exclude"])
@pytest.mark.parametrize("size", [200, 1600])
def test_no_tensor_of_the_size_of_the_matrix(ids, size):
    x, y, v, options = problem(size, size, 8, 8, ids, biases=True, dtype=torch.float32)
    leaves = [x.requires_grad_(), y.requires_grad_(), v.requires_grad_()]
    with forbid_large_tensors(size * size // 8):
        out, lse = similarity_attend(*leaves, 10.0, **options)
        (out.sum() + torch.where(lse.isfinite(), lse, 0.0).sum()).backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_only_what_needs_a_gradient_is_computed():
    inputs = problem(30, 40, 8, 8, dtype=torch.float32)[:3]

    def products(*needs: bool, used: int = 0) -> int:
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        result = similarity_attend(*leaves, 10.0)[used]
        with torch.profiler.profile() as profile:
            result.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(needs)
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))

    tiles = products(False, False, True) // 2  # S and the gradient of v
    assert products(True, False, False) == products(False, True, False) == 3 * tiles
    assert products(True, True, False) == 4 * tiles and products(True, True, True) == 5 * tiles
    assert products(True, True, True, used=1) == 3 * tiles
    with torch.no_grad():
        assert similarity_attend(inputs[0].requires_grad_(), *inputs[1:], 10.0)[0].grad_fn is None
