"""segment_pool against a loop in float64, as an operator, and its Triton kernels interpreted and compiled."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels import segment_pool
from fastvlp_kernels._testing import assert_no_worse_than
from fastvlp_kernels.segment_pool import cpu, op
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CU = torch.tensor([0, 5, 5, 12], dtype=torch.int32)


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loop(x, lengths, mode, weight=None):
    """Token by token; of equal maxima the first is taken."""
    rows, start = [x[:0]], 0
    for n in lengths:
        row, total = torch.zeros_like(x[0]) if len(x) else x.new_zeros(x.shape[1]), 0.0
        for i in range(start, start + n):
            if mode == "max":
                row = x[i] if i == start else torch.where(x[i] > row, x[i], row)
            else:
                w = 1.0 if weight is None else weight[i]
                row, total = row + w * x[i], total + w
        rows.append((row / total if mode == "mean" and n else row)[None])
        start += n
    return torch.cat(rows)


@given(st.lists(st.integers(0, 30), max_size=8), st.sampled_from(["mean", "max", "weighted"]), st.sampled_from(["cpu", "reference"]),
       st.booleans(), st.integers(1, 4))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_segments_equal_the_loop(lengths, mode, impl, tiny, width):
    total = sum(lengths)
    x = randn(total, width).requires_grad_()
    if mode == "max":
        x = x.detach().round().requires_grad_()  # ties
    weight = (randn(total, seed=1).abs() + 0.1).requires_grad_() if mode == "weighted" else None
    name = "max" if mode == "max" else "mean"
    with pytest.MonkeyPatch.context() as patch:
        if tiny:
            patch.setattr(cpu, "ELEMENTS", 8)
        ours = segment_pool(x, cu(lengths), name, weight, impl=impl)
        exact = loop(x, lengths, name, weight)
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        leaves = [x] if weight is None else [x, weight]
        upstream, zero = randn(*exact.shape, seed=2), sum(0 * leaf.sum() for leaf in leaves)
        gradients = [torch.autograd.grad((y * upstream).sum() + zero, leaves, retain_graph=True) for y in (ours, exact)]
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [0, 7, 3]])
def test_gradcheck(lengths):
    x, weight = randn(sum(lengths), 3).requires_grad_(), (randn(sum(lengths), seed=1).abs() + 0.5).requires_grad_()
    for mode in ("mean", "max"):
        assert torch.autograd.gradcheck(lambda x, mode=mode: segment_pool(x, cu(lengths), mode), x)
    assert torch.autograd.gradcheck(lambda x, w: segment_pool(x, cu(lengths), "mean", w), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_no_larger_than_eager_pytorch(dtype, weighted):
    lengths = [200, 57, 57]
    x, weight, upstream = randn(314, 8).to(dtype), (randn(314, seed=1).abs() + 0.1).to(dtype), randn(3, 8, seed=2).to(dtype)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in ((x, weight) if weighted else (x,))]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream.to(dtype))

    def eager(x, weight=None):
        parts = x.split(lengths)
        if weight is None:
            return torch.stack([p.mean(0) for p in parts])
        return torch.stack([(p * w[:, None]).sum(0) / w.sum() for p, w in zip(parts, weight.split(lengths), strict=True)])

    ours = run(lambda x, weight=None: segment_pool(x, cu(lengths), "mean", weight), dtype)
    for name, mine, other, true in zip(("out", "x", "weight"), ours, run(eager, dtype), run(eager, torch.float64), strict=False):
        assert mine.dtype == dtype
        assert_no_worse_than(mine, other, true, tol=1e-6 if dtype == torch.float32 else 1e-3, name=name)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_weights_of_zero_infinities_and_nan(impl):
    x = randn(12, 2).requires_grad_()
    weight = torch.ones(12)
    weight[:5] = 0
    out = segment_pool(x, CU, "mean", weight, impl=impl)
    assert not out[:2].any() and torch.allclose(out[2], x[5:].mean(0))
    assert not torch.autograd.grad(out.sum(), x)[0][:5].any()
    spoiled = x.detach().clone()
    spoiled[0], spoiled[7, 0] = torch.inf, torch.nan
    for mode in ("mean", "max"):
        out = segment_pool(spoiled, CU, mode, impl=impl)
        assert out[0].isposinf().all() and out[2].isnan().tolist() == [True, False]


@pytest.mark.parametrize("case", ["mean", "max", "weighted", "weights only"])
def test_opcheck(case):
    x, mode = randn(12, 3, dtype=torch.float32).requires_grad_(case != "weights only"), "max" if case == "max" else "mean"
    weight = (torch.rand(12) + 0.1).requires_grad_() if case.startswith("weight") else None
    torch.library.opcheck(torch.ops.fastvlp.segment_pool.default, (x, CU, None, mode, weight, "cpu"))
    saved = [None if t is None else t.detach() for t in (x, weight, *torch.ops.fastvlp.segment_pool(x, CU, None, mode, weight, "cpu"))]
    needs = [x.requires_grad, weight is not None]
    backward = torch.ops.fastvlp.segment_pool_backward.default
    torch.library.opcheck(backward, (torch.randn(3, 3), *saved, CU, mode, needs, "cpu"))


def test_compiled_once_for_all_totals_and_on_meta_tensors():
    def step(x, weight, cu):
        return segment_pool(x * 2, cu, "mean", weight).square().sum() + segment_pool(x, cu, "max").sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 4], [9, 8], [3, 6]):
            leaves = [randn(sum(lengths), 3).requires_grad_(), randn(sum(lengths)).abs().requires_grad_()]
            ours, eager = (torch.autograd.grad(f(*leaves, cu(lengths)), leaves) for f in (compiled, step))
            for mine, true in zip(ours, eager, strict=True):
                torch.testing.assert_close(mine, true)
    x = torch.empty(12, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = segment_pool(x, CU.to("meta"))
    assert out.shape == (3, 4) and out.dtype == torch.bfloat16 and torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_only_needed_gradients_are_made_and_second_ones_refused(monkeypatch):
    seen, real = [], op.cpu.mean_backward
    monkeypatch.setattr(op.cpu, "mean_backward", lambda *args: seen.append(list(args[-1])) or real(*args))
    x, weight = randn(12, 2).requires_grad_(), torch.ones(12, dtype=torch.float64, requires_grad=True)
    segment_pool(x, CU, "mean", weight.detach()).sum().backward()
    segment_pool(x.detach(), CU, "mean", weight).sum().backward()
    assert seen == [[True, False], [False, True]]
    for mode in ("mean", "max"):
        out = segment_pool(x, CU, mode)
        expanded = torch.autograd.grad(out, x, torch.ones((), dtype=torch.float64).expand(3, 2), retain_graph=True)
        torch.testing.assert_close(expanded[0], torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)[0])
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="segment_pool: second derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(12)}, ValueError, r"x is torch.float32 \(12,\); it must be \[tokens, width\]"),
        ({"x": torch.zeros(12, 2, dtype=torch.int64)}, ValueError, "x is torch.int64"),
        ({"mode": "sum"}, ValueError, "mode='sum' is unknown; allowed: mean, max"),
        ({"mode": "max", "weight": torch.ones(12)}, ValueError, "they are for mode='mean'"),
        ({"weight": torch.ones(11)}, ValueError, r"weight has shape \(11,\)"),
        ({"weight": torch.ones(12, device="meta")}, ValueError, "move them to one device"),
        ({"cu_seqlens": CU.float()}, ValueError, "it must be int32"),
        ({"cu_seqlens": CU + 1}, ValueError, "it must start at 0"),
        ({"x": torch.zeros(11, 2)}, ValueError, "the segments hold 12 tokens, but there are 11 rows"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        segment_pool(**{"x": torch.zeros(12, 2), "cu_seqlens": CU} | changes)


def compare(lengths, width, dtype=torch.float32, device="cpu"):
    x, starts = randn(sum(lengths), width).to(dtype), cu(lengths)
    for mode in ("mean", "weighted", "max"):
        if mode == "max":
            x = x.round()
        weight, name = (randn(sum(lengths), seed=1).abs().float() + 0.1 if mode == "weighted" else None), mode.replace("weighted", "mean")

        def run(x, starts, weight, impl, name=name):
            leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
            out = segment_pool(leaves[0], starts, name, *leaves[1:], impl=impl)
            return out, *torch.autograd.grad(out, leaves, randn(*out.shape, seed=2).to(out.device, dtype).to(out.dtype))

        ours = run(x.to(device), starts.to(device), None if weight is None else weight.to(device), "triton")
        exact = run(x.double(), starts, None if weight is None else weight.double(), "reference")
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        for mine, true in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.cpu().double(), true, rtol=rounding, atol=rounding)


def interpreted_cases() -> None:
    """Small tiles; runs in a process where Triton interprets."""
    from fastvlp_kernels.segment_pool import triton

    triton.config = lambda width: {"BLOCK_N": 4, "BLOCK_C": 4}
    triton.PROGRAMS = 2
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare([9, 0, 1, 17, 3], 6)
    compare([9, 5], 3, torch.bfloat16)
    compare([2, 5], 3, torch.float16)
    compare([], 3)
    spoiled = torch.randn(12, 2)
    spoiled[1:5], spoiled[7, 0], spoiled[9, 0], spoiled[0] = -torch.inf, torch.nan, torch.inf, -torch.inf
    first = [torch.ops.fastvlp.segment_pool(spoiled, CU, None, "max", None, impl)[2] for impl in ("triton", "cpu")]
    assert torch.equal(*first) and first[0][0].tolist() == [0, 0] and first[0][2, 0] == 7
    torch.testing.assert_close(*(segment_pool(spoiled, CU, "max", impl=impl) for impl in ("triton", "cpu")), equal_nan=True)


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile(arch, monkeypatch):
    from fastvlp_kernels.segment_pool import triton

    recorders = [Recorder(getattr(triton, name)) for name in ("_pool_kernel", "_mean_backward_kernel")]
    monkeypatch.setattr(triton, "_pool_kernel", recorders[0])
    monkeypatch.setattr(triton, "_mean_backward_kernel", recorders[1])
    x, starts, weight = torch.zeros(400, 768, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32), torch.ones(400)
    triton.forward(x, starts, "max", None)
    out, total, _ = triton.forward(x, starts, "mean", weight)
    triton.mean_backward(out, x, weight, out, total, starts, [True, True])
    for recorder in recorders:
        for launch in range(len(recorder.launches)):
            recorder.compile(arch, launch).assert_fits()


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_device(dtype):
    compare([197, 0, 1, 700, 64], 768, dtype, "cuda")
    compare([50] * 20, 33, dtype, "cuda")
