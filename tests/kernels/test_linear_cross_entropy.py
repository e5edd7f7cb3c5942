"""The mathematics of linear_cross_entropy on the CPU: against loops, float64, eager PyTorch and its own invariants."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors
from fastvlp_kernels.linear_cross_entropy import linear_cross_entropy

cpu = import_module("fastvlp_kernels.linear_cross_entropy.cpu")


def problem(T: int, D: int, V: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and targets, every third of which does not count."""
    random = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in ((T, D), (V, D), (V,)))
    targets = torch.randint(0, V, (T,), generator=random)
    targets[::3] = -100
    return x, weight, bias, targets


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.2, 0.0), (0.1, 0.03)])
@pytest.mark.parametrize("classes", [None, [5, 1, 3, 4]])
def test_formula_by_loops(impl, smoothing, z, classes):
    T, D, V = 7, 3, 6
    x, weight, bias, targets = problem(T, D, V)
    listed = list(range(V)) if classes is None else classes
    targets = torch.where(targets < 0, targets, torch.tensor(listed)[targets % len(listed)])
    options = {"label_smoothing": smoothing, "z_loss": z, "classes": None if classes is None else torch.tensor(classes), "impl": impl}
    want = []
    for t in range(T):
        logits = {v: float(bias[v]) + sum(float(x[t, d]) * float(weight[v, d]) for d in range(D)) for v in listed}
        lse = math.log(sum(math.exp(logit) for logit in logits.values()))
        if int(targets[t]) == -100:
            want.append(0.0)
            continue
        mean = sum(logits.values()) / len(listed)
        want.append((1 - smoothing) * (lse - logits[int(targets[t])]) + smoothing * (lse - mean) + z * lse**2)
    rows = linear_cross_entropy(x, weight, targets, bias, reduction="none", **options)
    assert rows.tolist() == pytest.approx(want, rel=1e-12)
    assert float(linear_cross_entropy(x, weight, targets, bias, reduction="sum", **options)) == pytest.approx(sum(want), rel=1e-12)
    counted = int((targets != -100).sum())
    assert float(linear_cross_entropy(x, weight, targets, bias, **options)) == pytest.approx(sum(want) / counted, rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("smoothing", "z", "listed"), [(0.0, 0.0, False), (0.2, 0.05, False), (0.1, 0.0, True)])
def test_gradcheck(impl, reduction, smoothing, z, listed, monkeypatch):
    monkeypatch.setattr(cpu, "LEAST", 1)
    monkeypatch.setattr(cpu, "CACHED", 1)
    x, weight, bias, targets = problem(8, 3, 7)
    classes = torch.cat((targets[targets >= 0], torch.tensor([0]))) if listed else None  # some are listed twice
    options = {"label_smoothing": smoothing, "z_loss": z, "reduction": reduction, "classes": classes, "impl": impl}

    def f(x, weight, bias):
        return linear_cross_entropy(x, weight, targets, bias, **options)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, weight, bias)])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 60),
    V=st.sampled_from([1, 2, 13, 64, 300]),
    D=st.sampled_from([1, 2, 7, 16, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignore_index=st.sampled_from([-100, 0]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    least=st.sampled_from([1, 2**20]),
)
def test_no_worse_than_eager(T, V, D, dtype, scale, smoothing, reduction, ignore_index, layout, least):
    x, weight, bias, targets = problem(T, D, V, dtype, seed=T * 61 + V)
    x, targets = scale * x, targets.masked_fill(targets < 0, ignore_index)
    if layout == "transposed":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    elif layout == "every second":
        x, weight, targets = (torch.stack([t, t], 1).flatten(0, 1)[::2] for t in (x, weight, targets))
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    counted = int((targets != ignore_index).sum())

    def plain(x, weight, bias):
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), targets, **options)

    usual, cpu.LEAST = cpu.LEAST, least
    try:
        results, grads = {}, {}
        for kind in ("ours", "eager", "exact"):
            leaves = [t.detach().to(torch.float64 if kind == "exact" else dtype).requires_grad_() for t in (x, weight, bias)]
            results[kind] = linear_cross_entropy(*leaves[:2], targets, leaves[2], **options) if kind == "ours" else plain(*leaves)
            if kind != "ours" and reduction == "mean" and counted == 0:
                results[kind] = results[kind].nan_to_num(0.0)
            upstream = torch.linspace(1, 2, max(1, T))[:T] if reduction == "none" else torch.tensor(1.0)
            grads[kind] = torch.autograd.grad(results[kind], leaves, upstream.to(results[kind].dtype))
    finally:
        cpu.LEAST = usual
    assert results["ours"].dtype == torch.float32
    # Logits of float32 products err by their terms, of which a loss is a difference.
    size = float((x.double() @ weight.double().T).abs().max()) if T else 0.0
    tol = 1e-6 * (1 + size / (float(results["exact"].detach().abs().max()) or 1.0)) if T else 1e-6
    assert_no_worse_than(results["ours"], results["eager"], results["exact"], tol, "loss")
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    for k, name in enumerate(("x", "weight", "bias")):
        exact = grads["exact"][k]
        assert grads["ours"][k].dtype == dtype
        if counted == 0:
            assert not grads["ours"][k].any()
        elif exact.numel() and V > 1:
            assert_no_worse_than(grads["ours"][k], grads["eager"][k], exact, rounding + 1e-6 * (1 + size), f"gradient of {name}")


@pytest.mark.parametrize("confidence", [20.0, 60.0])
def test_confident_rows_keep_their_digits(confidence):
    """Loss and gradient of a right answer fade as e^-confidence: p - 1 is -others / total, not a difference that rounding spoils."""
    weight = torch.eye(40)
    x, targets = confidence * torch.eye(40), torch.arange(40)
    grads = {}
    for kind, dtype in (("ours", torch.float32), ("exact", torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        if kind == "ours":
            loss = linear_cross_entropy(leaf, weight, targets)
        else:
            logits = leaf @ weight.double().T
            rest = (logits - logits.diagonal()[:, None]).fill_diagonal_(-torch.inf).logsumexp(1)
            loss = torch.log1p(rest.exp()).mean()
        (grads[kind],) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(39 * math.exp(-confidence), rel=1e-6)
    assert error(grads["ours"], grads["exact"])[1] < 1e-6


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_common_offset_of_all_logits_changes_nothing(offset):
    x, weight, bias, targets = problem(20, 4, 30)
    want = linear_cross_entropy(x, weight, targets, bias, label_smoothing=0.1)
    assert float(linear_cross_entropy(x, weight, targets, bias + offset, label_smoothing=0.1)) == pytest.approx(float(want), rel=1e-9)


def test_a_masked_class_has_no_gradient():
    """A bias of -inf takes a class out."""
    x, weight, bias, targets = problem(20, 4, 30)
    bias[7], targets[targets == 7] = -torch.inf, 8
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, bias)
    kept = [v for v in range(30) if v != 7]
    places = torch.tensor([kept.index(v) if v in kept else -100 for v in targets.tolist()])
    assert float(loss) == pytest.approx(float(F.cross_entropy(F.linear(x, weight[kept], bias[kept]), places)), rel=1e-12)
    assert not torch.autograd.grad(loss, weight)[0][7].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_matrix_of_logits(reduction):
    T, D, V = 2048, 16, 8192
    x, weight, bias, targets = problem(T, D, V, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with forbid_large_tensors(T * V // 8) as mode:
        linear_cross_entropy(x, weight, targets, bias, reduction=reduction).sum().backward()
    assert mode.largest > 0 and all(leaf.grad is not None for leaf in leaves)


def test_results_that_start_as_nan_are_all_written():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for T, V, reduction in ((37, 50, "mean"), (5, 1, "none"), (0, 9, "mean")):
            leaves = [t.requires_grad_() for t in problem(T, 4, V, torch.float32)[:3]]
            targets = problem(T, 4, V)[3]
            loss = linear_cross_entropy(*leaves[:2], targets, leaves[2], reduction=reduction)
            assert loss.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), leaves))
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_that_do_not_count_are_not_multiplied(monkeypatch):
    x, weight, _, targets = problem(30, 4, 50, torch.float32)
    rows = []
    inner = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: rows.append(len(a)) or inner(a, b, **options))
    linear_cross_entropy(x, weight, targets)
    assert rows == [20]
    rows.clear()
    assert float(linear_cross_entropy(x, weight, torch.full_like(targets, -100))) == 0.0 and rows == []


def test_half_precision_neither_underflows_nor_overflows():
    """Gradients of single classes lie below float16's smallest number; a loss scale brings them up before the one rounding."""
    T, V = 4, 20_000
    x = torch.full((T, 8), 0.25, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(V, 8, dtype=torch.float16, requires_grad=True)
    (linear_cross_entropy(x, weight, torch.zeros(T, dtype=torch.int64), impl="cpu") * 65536).backward()
    torch.testing.assert_close(weight.grad[1:], torch.full((V - 1, 8), 65536 * 0.25 / V, dtype=torch.float16), rtol=1e-3, atol=0)
