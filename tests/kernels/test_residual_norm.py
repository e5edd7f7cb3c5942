"""residual_norm against loops, float64 and eager PyTorch, and as an operator of PyTorch."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors
from fastvlp_kernels.residual_norm import residual_norm

cpu = import_module("fastvlp_kernels.residual_norm.cpu")
T, C = 7, 5


def problem(T: int, C: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """x, branch, weight, bias and gamma."""
    random = torch.Generator().manual_seed(seed)
    sizes = ((T, C), (T, C), (C,), (C,), (C,))
    return [torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in sizes]


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.requires_grad_() for t in problem(T, C, dtype)]


def call(x, branch, weight, bias=None, gamma=None, **options):
    return residual_norm(x, branch, weight, bias, gamma=gamma, **options)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_formula_by_loops(impl, kind, with_gamma):
    x, branch, weight, bias, gamma = problem(T, C)
    out, total = residual_norm(x, branch, weight, bias, gamma=gamma if with_gamma else None, kind=kind, eps=0.1, impl=impl)
    for t in range(T):
        row = [float(x[t, c]) + float(branch[t, c]) * (float(gamma[c]) if with_gamma else 1.0) for c in range(C)]
        mean = sum(row) / C if kind == "layer" else 0.0
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / C + 0.1)
        assert total[t].tolist() == pytest.approx(row, rel=1e-12)
        want = [(value - mean) / deviation * float(weight[c]) + float(bias[c]) for c, value in enumerate(row)]
        assert out[t].tolist() == pytest.approx(want, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("vectors", [3, 4, 5])
def test_gradcheck(impl, kind, vectors):
    """Through both results; without bias and LayerScale, with one, with both."""
    assert torch.autograd.gradcheck(lambda *given: call(*given, kind=kind, impl=impl), leaves()[:vectors])


def plain(x, branch, weight, bias, gamma, kind):
    """Eager PyTorch, as models write it."""
    total = x + (branch if gamma is None else branch * gamma)
    if kind == "layer":
        return F.layer_norm(total, total.shape[-1:], weight, bias), total
    out = F.rms_norm(total, total.shape[-1:], weight, 1e-5)
    return out if bias is None else out + bias, total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    C=st.sampled_from([3, 7, 64, 384]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["layer", "rms"]),
    scaled=st.booleans(),
    biased=st.booleans(),
    offset=st.sampled_from([0.0, 16.0]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
)
def test_no_worse_than_eager(T, C, dtype, kind, scaled, biased, offset, layout):
    x, branch, weight, bias, gamma = problem(T, C, dtype, seed=T * 61 + C)
    # Sums that every dtype holds exactly, so that rounding them is not what differs.
    x, branch = (t.float().mul(4).round().clamp(-16, 16).div(4).to(dtype) for t in (x, branch))
    x, gamma = x + offset, torch.exp2(gamma.float().round().clamp(-1, 1)).to(dtype)
    if layout == "transposed":
        x, branch = (t.T.contiguous().T for t in (x, branch))
    elif layout == "every second":
        x, branch = (torch.stack([t, t], 1).flatten(0, 1)[::2] for t in (x, branch))
    given = [x, branch, weight] + ([bias] if biased else []) + ([gamma] if scaled else [])
    upstream = problem(T, C, seed=1)[:2]

    def run(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in given]
        b, g = inputs[3] if biased else None, inputs[-1] if scaled else None
        outs = function(*inputs[:3], b, g)
        return [*outs, *torch.autograd.grad(outs, inputs, [u.to(dtype) for u in upstream])]

    ours = run(lambda *args: call(*args, kind=kind), dtype)
    if T == 0:
        assert not any(t.any() for t in ours)
        return
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    eager, exact = run(lambda *args: plain(*args, kind), dtype), run(lambda *args: plain(*args, kind), torch.float64)
    for name, mine, other, true in zip(("out", "total", *"12345"), ours, eager, exact, strict=False):
        assert mine.dtype == dtype
        assert_no_worse_than(mine, other, true, rounding + 2e-6 * (1 + offset), name)


def test_the_norm_is_that_of_the_sum_that_is_returned():
    """In bfloat16 the sum is rounded before it is normalised, as where the next layer reads it."""
    x, branch, weight, bias, _ = problem(20, 64, torch.bfloat16)
    for impl in ("cpu", "reference"):
        out, total = residual_norm(x, branch, weight, bias, impl=impl)
        assert torch.equal(total, x + branch)
        torch.testing.assert_close(out, F.layer_norm(total.float(), [64], weight.float(), bias.float()).bfloat16(), rtol=8e-3, atol=1e-6)


def test_any_leading_dimensions_and_two_dtypes():
    x, branch, weight, bias, gamma = problem(6, C, torch.float32)
    want = call(x, branch.bfloat16().float(), weight, bias, gamma)
    mixed = [x.view(2, 3, C).requires_grad_(), branch.view(2, 3, C).bfloat16().requires_grad_(), weight, bias, gamma.requires_grad_()]
    out, total = call(*mixed)
    assert out.shape == total.shape == (2, 3, C) and total.dtype == torch.float32
    torch.testing.assert_close((out.flatten(0, 1), total.flatten(0, 1)), want)
    dx, dbranch, dgamma = torch.autograd.grad((out * total).sum(), [mixed[0], mixed[1], mixed[4]])
    assert (dx.dtype, dbranch.dtype, dgamma.dtype) == (torch.float32, torch.bfloat16, torch.float32) and dbranch.shape == (2, 3, C)
    torch.testing.assert_close(dbranch.float(), dx * gamma, rtol=8e-3, atol=1e-6)


def test_nothing_is_wider_than_the_tokens():
    given = leaves(torch.float32)
    with forbid_large_tensors(T * C + 1):
        torch.autograd.grad(sum(t.square().sum() for t in call(*given)), given)


def test_what_is_kept_is_the_sum_alone():
    """As by a norm after a sum; LayerScale's gradient also needs what it scales."""
    for scaled in (False, True):
        x, branch, weight, bias, gamma = leaves()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            _, total = call(x, branch, weight, bias, gamma if scaled else None)
        wide = {t.data_ptr() for t in kept if t.shape == (T, C)}
        assert wide == {total.data_ptr()} | ({branch.data_ptr()} if scaled else set())


def test_results_that_start_as_nan_are_all_written():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for kind, vectors in (("layer", 5), ("rms", 4), ("rms", 3)):
            given = leaves(torch.float32)[:vectors]
            outs = call(*given, kind=kind)
            assert all(t.isfinite().all() for t in (*outs, *torch.autograd.grad(sum(t.sum() for t in outs), given)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(rms, scaled):
    x, branch, weight, bias, gamma = leaves(torch.float32)
    torch.library.opcheck(torch.ops.fastvlp.residual_norm.default,
                          (x, branch, gamma if scaled else None, weight, bias, 1e-5, rms, torch.float32, "cpu"))  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(x, branch, weight, bias, gamma):
        out, total = call(x * 2, branch, weight, bias, gamma)
        return (out * total).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    given = leaves()
    for rows in (T, T - 2):
        part = [t.detach()[:rows].requires_grad_() for t in given[:2]] + given[2:]
        torch.testing.assert_close(torch.autograd.grad(compiled(*part), part), torch.autograd.grad(f(*part), part))


def test_only_what_is_needed(monkeypatch):
    seen, real = [], cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: seen.append((tuple(args[-1]), [d.numel() for d in real(*args)])) or real(*args))
    x, branch, weight, bias, gamma = leaves()
    call(x, branch.detach(), weight.detach())[1].sum().backward()
    call(x, branch, weight.detach(), bias.detach(), gamma.detach())[0].sum().backward()
    call(x.detach(), branch.detach(), weight, bias)[0].sum().backward()
    call(x.detach(), branch.detach(), weight.detach(), None, gamma)[0].sum().backward()
    made = [(needs, [bool(n) for n in sizes]) for needs, sizes in seen]
    assert made == [
        ((True, False, False, False, False), [True, False, False, False, False]),
        ((True, True, False, False, False), [True, True, False, False, False]),
        ((False, False, False, True, True), [False, False, False, True, True]),
        ((False, False, True, False, False), [False, False, True, False, False]),
    ]
    with torch.no_grad():
        assert not call(x, branch, weight)[0].requires_grad


def test_one_result_alone_and_repeated_backward():
    given = leaves()
    both = call(*given)
    want = torch.autograd.grad(sum(t.square().sum() for t in call(*given, impl="reference")), given)
    for _ in range(2):
        got = torch.autograd.grad(sum(t.square().sum() for t in both), given, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    norm_alone = torch.autograd.grad(both[0].square().sum(), given, retain_graph=True)
    sum_alone = torch.autograd.grad(both[1].square().sum(), given[:2], retain_graph=True)
    torch.testing.assert_close([a + b for a, b in zip(norm_alone, sum_alone, strict=False)], list(want[:2]), rtol=1e-9, atol=1e-11)


def test_autocast():
    """The norm comes in autocast's dtype, which the next product would cast it to; the stream keeps its own."""
    x, branch, weight, bias, _ = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, total = call(x, branch.bfloat16(), weight, bias)
        gradients = torch.autograd.grad(out.float().sum() + total.sum(), [x, branch, weight])
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, F.layer_norm(total, [C], weight, bias).bfloat16())
    assert all(g.dtype == torch.float32 for g in gradients)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = [t.detach().to("meta").requires_grad_() for t in leaves()]
    sum(t.sum() for t in call(*given, impl="cpu")).backward()
    assert all(t.grad.shape == t.shape for t in given)
    with FakeTensorMode():
        x = torch.randn(T, C, requires_grad=True)
        call(x, torch.randn(T, C), torch.ones(C))[0].sum().backward()
        assert x.grad.shape == x.shape


def test_second_and_forward_mode_derivatives_are_refused():
    given = leaves()
    (first,) = torch.autograd.grad(call(*given)[0].square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm: second derivatives are not available; use impl='reference'"):
        first.sum().backward()

    def f(impl):
        x = given[0].detach()
        return torch.func.jvp(lambda x: call(x, *(t.detach() for t in given[1:]), impl=impl)[0], (x,), (x,))

    with pytest.raises(RuntimeError, match=r"residual_norm: forward-mode derivatives .*are not available; use impl='reference'"):
        f("cpu")
    assert f("reference")[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(T, 4)}, ValueError, r"x has shape \(7, 4\) and branch has shape \(7, 5\)"),
        ({"x": torch.zeros(T, C).long()}, ValueError, r"x is torch.int64 \(7, 5\); it must be \[..., C\], floating point"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight has shape \(4,\); it must have shape \(5,\)"),
        ({"bias": torch.zeros(C).int()}, TypeError, "bias is torch.int32; it must be a floating-point tensor"),
        ({"gamma": torch.zeros(1, C)}, ValueError, r"gamma has shape \(1, 5\)"),
        ({"branch": torch.zeros(T, C, device="meta")}, ValueError, "x is on cpu but branch is on meta"),
        ({"kind": "batch"}, ValueError, "kind='batch' is unknown; allowed: 'layer', 'rms'"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_input_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        residual_norm(**{"x": torch.zeros(T, C), "branch": torch.zeros(T, C), "weight": torch.ones(C)} | change)
