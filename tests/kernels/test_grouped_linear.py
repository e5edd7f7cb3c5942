"""grouped_linear against loops, float64 and eager PyTorch, and as an operator of PyTorch."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors
from fastvlp_kernels.grouped_linear import grouped_linear

cpu = import_module("fastvlp_kernels.grouped_linear.cpu")
T, I, O = 9, 5, 4  # noqa: E741
TYPES = torch.tensor([2, 0, 0, 3, 2, 2, 0, 3, 2], dtype=torch.int8)  # no token of type 1


def problem(T: int = T, width: int = I, out: int = O, types: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """x, weight and bias."""
    random = torch.Generator().manual_seed(seed)
    sizes = ((T, width), (types, out, width), (types, out))
    return [torch.randn(size, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def call(x, weight, bias=None, types=TYPES, **options):
    return grouped_linear(x, types, weight, bias, **options)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("biased", [False, True])
def test_formula_by_loops(impl, biased):
    x, weight, bias = (t.detach() for t in problem())
    out = call(x, weight, bias if biased else None, impl=impl)
    for t in range(T):
        k = int(TYPES[t])
        want = [sum(float(weight[k, o, i]) * float(x[t, i]) for i in range(I)) + (float(bias[k, o]) if biased else 0) for o in range(O)]
        assert out[t].tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(impl, biased):
    assert torch.autograd.gradcheck(lambda *given: call(*given, impl=impl), problem()[: 3 if biased else 2])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 60),
    width=st.sampled_from([1, 8, 33]),
    out=st.sampled_from([1, 16, 30]),
    count=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    biased=st.booleans(),
    kind=st.sampled_from([torch.int8, torch.int32, torch.int64, torch.uint8]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
)
def test_no_worse_than_eager(T, width, out, count, dtype, biased, kind, layout):
    given = [t.detach() for t in problem(T, width, out, count, dtype, seed=T * 61 + width)][: 3 if biased else 2]
    types = torch.randint(0, count, (T,), generator=torch.Generator().manual_seed(T)).to(kind)
    if layout == "transposed":
        given[:2] = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in given[:2]]
    elif layout == "every second":
        given[0], types = (torch.stack([t, t], 1).flatten(0, 1)[::2] for t in (given[0], types))
    upstream = problem(T, out, dtype=dtype, seed=1)[0].detach()

    def plain(x, weight, bias=None):
        """Type by type, as models write it."""
        found = x.new_zeros(T, out)
        for k in range(count):
            own = (types == k).nonzero()[:, 0]
            found = found.index_copy(0, own, F.linear(x[own], weight[k], None if bias is None else bias[k]))
        return found

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        found = function(*leaves)
        return [found, *torch.autograd.grad(found, leaves, upstream.to(dtype))]

    ours = run(lambda *leaves: call(*leaves, types=types), dtype)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    for name, mine, eager, exact in zip(("out", "x", "weight", "bias"), ours, run(plain, dtype), run(plain, torch.float64), strict=False):
        assert mine.dtype == dtype
        if exact.numel():
            assert_no_worse_than(mine, eager, exact, rounding + 2e-6, name)


def test_one_type_is_a_linear_layer_and_equal_types_lie_anywhere():
    x, weight, bias = problem()
    one = torch.zeros(T, dtype=torch.int64)
    torch.testing.assert_close(call(x, weight[:1], bias[:1], one), F.linear(x, weight[0], bias[0]))
    shuffled = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(call(x[shuffled], weight, bias, TYPES[shuffled]), call(x, weight, bias)[shuffled])


def test_a_type_without_tokens_has_no_gradient_and_no_tokens_no_result():
    x, weight, bias = problem()
    gradients = torch.autograd.grad(call(x, weight, bias).sum(), (weight, bias))
    assert all(not g[1].any() and g[2].any() for g in gradients)
    x = x[:0]
    out = call(x, weight, bias, TYPES[:0])
    assert out.shape == (0, O) and not any(g.any() for g in torch.autograd.grad(out.sum(), (weight, bias)))


def test_tokens_are_multiplied_once():
    """No result for every type."""
    x, weight, bias = problem(T=400, width=8, out=8, types=16, dtype=torch.float32)
    types = torch.arange(400) % 16
    with forbid_large_tensors(400 * 8 + 1) as mode:
        call(x, weight, bias, types).sum().backward()
    assert mode.largest == 400 * 8 and weight.grad is not None


def test_results_that_start_as_nan_are_all_written():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        given = problem(dtype=torch.float32)
        out = call(*given)
        assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), given)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_by_pytorchs_grouped_product(monkeypatch):
    """What runs on GPUs, here on the CPU, where PyTorch computes it too."""
    if not hasattr(torch, "_grouped_mm"):
        pytest.skip("this PyTorch has no _grouped_mm")
    given = [t.detach().requires_grad_() for t in problem(width=8, out=16, dtype=torch.bfloat16)]
    want = torch.autograd.grad(call(*given).square().sum(), given)
    plain = call(*given)
    monkeypatch.setattr(cpu, "grouped", lambda rows, weight: True)
    torch.testing.assert_close(call(*given), plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(torch.autograd.grad(call(*given).square().sum(), given), want, rtol=4e-2, atol=2e-1)


@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(biased):
    x, weight, bias = problem(dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastvlp.grouped_linear.default, (x, TYPES, weight, bias if biased else None, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_meta_and_fake_tensors(dynamic):
    def f(x, weight, bias, types):
        return call(x * 2, weight, bias, types).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x, weight, bias = problem()
    for rows in (T, T - 2):
        leaves = (x.detach()[:rows].requires_grad_(), weight, bias)
        ours, eager = (torch.autograd.grad(g(*leaves, TYPES[:rows]), leaves) for g in (compiled, f))
        torch.testing.assert_close(ours, eager)
    meta = [t.detach().to("meta").requires_grad_() for t in (x, weight, bias)]
    call(*meta, types=TYPES.to("meta"), impl="cpu").sum().backward()
    assert all(t.grad.shape == t.shape for t in meta)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert grouped_linear(torch.randn(T, I), torch.zeros(T, dtype=torch.int64), torch.randn(2, O, I)).shape == (T, O)


def test_only_what_is_needed(monkeypatch):
    seen, real = [], cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: seen.append([d.numel() > 0 for d in real(*args)]) or real(*args))
    given = problem()
    for needed in range(3):
        call(*(t if k == needed else t.detach() for k, t in enumerate(given))).sum().backward()
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]
    with torch.no_grad():
        assert not call(*given).requires_grad


def test_autocast():
    x, weight, bias = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(x, weight, bias)
        gradients = torch.autograd.grad(out.float().sum(), (x, weight, bias))
    assert torch.equal(out, call(x.bfloat16(), weight.bfloat16(), bias)) and out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients)


def test_second_and_forward_mode_derivatives_are_refused():
    x, weight, bias = problem()
    (first,) = torch.autograd.grad(call(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_linear: second derivatives are not available; use impl='reference'"):
        first.sum().backward()

    def f(impl):
        return torch.func.jvp(lambda x: call(x, weight.detach(), impl=impl), (x.detach(),), (x.detach(),))

    with pytest.raises(RuntimeError, match=r"grouped_linear: forward-mode derivatives .*are not available; use impl='reference'"):
        f("cpu")
    torch.testing.assert_close(*f("reference"))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(I)}, ValueError, r"x is torch.float32 \(5,\); it must be \[tokens, in\]"),
        ({"weight": torch.zeros(O, I)}, ValueError, r"weight is torch.float32 \(4, 5\); it must be \[types, out, in\]"),
        ({"weight": torch.zeros(4, O, 6)}, ValueError, r"x has shape \(9, 5\) and weight has shape \(4, 4, 6\)"),
        ({"weight": torch.zeros(0, O, I)}, ValueError, "with at least one type, out and in"),
        ({"weight": torch.zeros(4, O, I).double()}, TypeError, "x is torch.float32 and weight is torch.float64; cast one of them"),
        ({"types": TYPES[1:]}, ValueError, r"types has shape \(8,\); it must have shape \(9,\)"),
        ({"types": TYPES.float()}, TypeError, "types is torch.float32; it must be an integer tensor"),
        ({"types": TYPES - 1}, ValueError, "types go from -1 to 2; weight has the types 0 to 3"),
        ({"types": TYPES + 1}, ValueError, "types go from 1 to 4; weight has the types 0 to 3"),
        ({"bias": torch.zeros(O)}, ValueError, r"bias is torch.float32 \(4,\); it must be \[types, out\] = \(4, 4\), floating point"),
        ({"bias": torch.zeros(4, O, device="meta")}, ValueError, "x is on cpu but bias is on meta"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_input_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        grouped_linear(**{"x": torch.zeros(T, I), "types": TYPES, "weight": torch.zeros(4, O, I)} | change)
