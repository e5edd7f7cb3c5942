"""bias_activation against loops, float64 and eager PyTorch, and as an operator of PyTorch."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors
from fastvlp_kernels.bias_activation import bias_activation

cpu = import_module("fastvlp_kernels.bias_activation.cpu")
KINDS = ("gelu", "geglu", "relu2")
T, H = 7, 6


def problem(T: int = T, H: int = H, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x, bias = (torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in ((T, H), (H,)))
    return x.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_formula_by_loops(impl, kind):
    x, bias = (t.detach() for t in problem())

    def gelu(h):
        return h * (1 + math.erf(h / math.sqrt(2))) / 2

    for t, row in enumerate(bias_activation(x, bias, kind, impl=impl).tolist()):
        h = [float(x[t, c]) + float(bias[c]) for c in range(H)]
        want = {"gelu": [gelu(v) for v in h], "relu2": [max(v, 0.0) ** 2 for v in h],
                "geglu": [h[c] * gelu(h[H // 2 + c]) for c in range(H // 2)]}[kind]  # fmt: skip
        assert row == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(impl, kind, monkeypatch):
    monkeypatch.setattr(cpu, "ELEMENTS", 1)
    monkeypatch.setattr(cpu, "WHOLE", 0)
    x, bias = problem()
    assert torch.autograd.gradcheck(lambda x, bias: bias_activation(x, bias, kind, impl=impl), (x, bias))
    assert torch.autograd.gradcheck(lambda x: bias_activation(x.unflatten(0, (1, T)), None, kind, impl=impl), x)


def plain(x, bias, kind):
    """Eager PyTorch, as models write it."""
    hidden = x if bias is None else x + bias
    if kind == "geglu":
        value, gate = hidden.chunk(2, -1)
        return value * F.gelu(gate)
    return F.gelu(hidden) if kind == "gelu" else F.relu(hidden).square()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    H=st.sampled_from([2, 6, 64, 386]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(KINDS),
    biased=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    blocks=st.sampled_from([(1, 0), (100, 0), (2**18, 2**21)]),
)
def test_no_worse_than_eager(T, H, dtype, kind, biased, scale, layout, blocks):
    x, bias = (scale * t.detach() for t in problem(T, H, dtype, seed=T * 61 + H))
    if layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "every second":
        x = torch.stack([x, x], 1).flatten(0, 1)[::2]
    upstream = problem(T, H // 2 if kind == "geglu" else H, dtype, seed=1)[0].detach()

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in ([x, bias] if biased else [x])]
        out = function(leaves[0], leaves[1] if biased else None, kind)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    usual = cpu.ELEMENTS, cpu.WHOLE
    cpu.ELEMENTS, cpu.WHOLE = blocks
    try:
        ours = run(bias_activation, dtype)
    finally:
        cpu.ELEMENTS, cpu.WHOLE = usual
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    for name, mine, eager, exact in zip(("out", "x", "bias"), ours, run(plain, dtype), run(plain, torch.float64), strict=False):
        assert mine.dtype == dtype
        if exact.numel():
            assert_no_worse_than(mine, eager, exact, rounding + 1e-6, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_what_is_no_number_stays_so(kind, impl):
    x = torch.tensor([[torch.nan, 2.0, 1.0, torch.nan]])
    out = bias_activation(x, None, kind, impl=impl)
    assert out.isnan().tolist() == ([[True, True]] if kind == "geglu" else [[True, False, False, True]])


def test_blocks_hold_no_more_than_their_part(monkeypatch):
    monkeypatch.setattr(cpu, "ELEMENTS", 12)
    monkeypatch.setattr(cpu, "WHOLE", 0)
    x, bias = problem(dtype=torch.float32)
    with forbid_large_tensors(T * H + 1) as mode:
        bias_activation(x, bias).sum().backward()
    assert mode.largest == T * H and x.grad is not None


def test_results_that_start_as_nan_are_all_written():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for kind in KINDS:
            x, bias = problem(dtype=torch.float32)
            out = bias_activation(x, bias, kind)
            assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), (x, bias))))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    x, bias = problem(dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastvlp.bias_activation.default, (x, bias, kind, "cpu"))
    torch.library.opcheck(torch.ops.fastvlp.bias_activation.default, (x, None, kind, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_meta_and_fake_tensors(dynamic):
    def f(x, bias):
        return sum(bias_activation(x * 2, bias, kind).square().sum() for kind in KINDS)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, bias = problem()
    for rows in (T, T - 2):
        leaves = (x.detach()[:rows].requires_grad_(), bias)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves))
    meta = torch.empty(T, H, device="meta", requires_grad=True)
    bias_activation(meta, impl="cpu").sum().backward()
    assert meta.grad.shape == (T, H)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert bias_activation(torch.randn(2, T, H), torch.randn(H), "geglu").shape == (2, T, H // 2)


def test_only_what_is_needed(monkeypatch):
    seen, real = [], cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: seen.append([d.numel() > 0 for d in real(*args)]) or real(*args))
    x, bias = problem()
    bias_activation(x, bias.detach()).sum().backward()
    bias_activation(x.detach(), bias).sum().backward()
    assert seen == [[True, False], [False, True]]
    with torch.no_grad():
        assert not bias_activation(x, bias).requires_grad


def test_two_dtypes_as_autocast_leaves_them():
    x, bias = problem(dtype=torch.float32)
    hidden = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = bias_activation(hidden, bias)
        gradients = torch.autograd.grad(out.float().sum(), (hidden, bias))
    assert torch.equal(out, F.gelu(hidden.float() + bias).bfloat16())
    assert [t.dtype for t in (out, *gradients)] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_second_and_forward_mode_derivatives_are_refused():
    x, bias = problem()
    (first,) = torch.autograd.grad(bias_activation(x, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bias_activation: second derivatives are not available; use impl='reference'"):
        first.sum().backward()

    def f(impl):
        return torch.func.jvp(lambda x: bias_activation(x, bias.detach(), impl=impl), (x.detach(),), (x.detach(),))

    with pytest.raises(RuntimeError, match=r"bias_activation: forward-mode derivatives .*are not available; use impl='reference'"):
        f("cpu")
    assert f("reference")[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(T, H).long()}, ValueError, r"x is torch.int64 \(7, 6\); it must be \[..., H\], floating point"),
        ({"x": torch.zeros(T, 0)}, ValueError, "with H at least 1"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\); it must have shape \(6,\)"),
        ({"bias": torch.zeros(H, device="meta")}, ValueError, "x is on cpu but bias is on meta"),
        ({"activation": "swish"}, ValueError, "activation='swish' is unknown; allowed: 'gelu', 'geglu', 'relu2'"),
        ({"x": torch.zeros(T, 5), "activation": "geglu"}, ValueError, "x has width 5; for 'geglu' it must be even"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_input_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        bias_activation(**{"x": torch.zeros(T, H)} | change)
