"""bi_wkv against a loop over pairs in float64, as an operator, and its Triton kernels interpreted and compiled."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels import bi_wkv
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors
from fastvlp_kernels.bi_wkv import cpu, op
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
NAMES = ("r", "k", "v", "w", "u")


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(T, H, K, V, dtype=torch.float64, decay=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, H, K), (T, H, K), (T, H, V), (T, H, K), (H, K))
    r, k, v, w, u = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in (r, k, v, decay * w - 1, u)]


def loop(r, k, v, w, u, lengths, scale):
    """Every pair on its own, the product of the decays between them taken factor by factor."""
    rows, start = [], 0
    for n in lengths:
        decay = [(-w[start + t].exp()).exp() for t in range(n)]
        for t in range(n):
            y = 0 * v[start + t]
            for s in range(n):
                weight = u if s == t else torch.ones_like(u)
                for between in range(min(s, t) + 1, max(s, t)):
                    weight = weight * decay[between]
                y = y + (r[start + t] * weight * k[start + s]).sum(1, keepdim=True) * v[start + s]
            rows.append(scale * y)
        start += n
    return torch.stack(rows) if rows else v


def recurrence(r, k, v, w, u, lengths, scale):
    """A state per direction, token after token, in the dtype of the inputs."""
    decay, out = (-w.exp()).exp(), scale * (r * u * k).sum(2, keepdim=True) * v
    for tokens in torch.arange(len(v)).split(lengths):
        for order in (tokens.tolist(), tokens.flip(0).tolist()):
            state = v.new_zeros(*k.shape[1:], v.shape[2])
            for t in order:
                out = out.index_add(0, torch.tensor([t]), scale * (r[t, :, None] @ state).mT.squeeze(2)[None])
                state = decay[t, :, :, None] * state + k[t, :, :, None] * v[t, :, None]
    return out


def both(first, second, leaves, seed=9):
    """Values and gradients of two functions of the leaves."""
    results = []
    for function in (first, second):
        out = function(*leaves)
        upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(out)
        results.append([out, *torch.autograd.grad((out * upstream).sum() + sum(0 * x.sum() for x in leaves), leaves)])
    return results


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3),
       st.sampled_from(["cpu", "reference"]), st.sampled_from([2, 4, 16]), st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_segments_equal_the_loop(lengths, H, K, V, impl, chunk, tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK", chunk)
        if tiny:
            patch.setattr(cpu, "ELEMENTS", 1)
        leaves = inputs(sum(lengths), H, K, V)
        ours, exact = both(lambda *x: bi_wkv(*x, cu(lengths), 0.7, impl=impl), lambda *x: loop(*x, lengths, 0.7), leaves)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("decay", [0.1, 1.0, 4.0])
def test_long_segments_equal_the_recurrence(decay):
    lengths = [150, 0, 33, 1]
    leaves = inputs(sum(lengths), 2, 8, 4, decay=decay)
    for impl in ("cpu", "reference"):
        ours, exact = both(lambda *x, impl=impl: bi_wkv(*x, cu(lengths), impl=impl), lambda *x: recurrence(*x, lengths, 1.0), leaves)
        for name, mine, true in zip(("y", *NAMES), ours, exact, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    leaves = inputs(20, 1, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: bi_wkv(*x, cu([17, 0, 3]), 0.5), tuple(leaves), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80])
def test_errors_are_no_larger_than_eager_pytorch(dtype, width):
    lengths = [40, 21]
    leaves = [x.detach().requires_grad_() for x in inputs(61, 1, width, width, dtype)]
    ours, eager = both(lambda *x: bi_wkv(*x, cu(lengths), 0.1), lambda *x: recurrence(*x, lengths, 0.1), leaves)
    upstream = torch.randn(ours[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype).double()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out = recurrence(*wide, lengths, 0.1)
    exact = [out, *torch.autograd.grad(out, wide, upstream)]
    for name, mine, other, true in zip(("y", *NAMES), ours, eager, exact, strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than(mine, other, true, tol=1e-6 if dtype == torch.float32 else 1e-3, name=name)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_strong_weak_and_infinite_decay(impl):
    lengths, strong = [40, 5], torch.tensor([-torch.inf, -50.0, 0.0, 5.0, 50.0, 1e4, torch.inf], dtype=torch.float64)
    r, k, v, w, u = inputs(45, 1, 7, 3)
    w = strong.expand(45, 1, 7).clone()
    w[::3] = w[::3].flip(2)
    leaves = [x.detach().requires_grad_() for x in (r, k, v, w, u)]
    results = both(lambda *x: bi_wkv(*x, cu(lengths), impl=impl), lambda *x: recurrence(*x, lengths, 1.0), leaves)
    for name, mine, true in zip(("y", *NAMES), *results, strict=True):
        assert mine.isfinite().all(), name
        # Where the decay is 0 the recurrence has 0 * inf in the gradient of w; it is 0.
        torch.testing.assert_close(mine, torch.where((w > 9).expand_as(true), 0, true) if name == "w" else true, rtol=1e-9, atol=1e-9)
    single = [x.detach().float().requires_grad_() for x in leaves]
    out = bi_wkv(*single, cu(lengths), impl=impl)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), single)))


def test_no_tensor_of_pairs():
    T = 4096
    leaves = inputs(T, 1, 4, 4, torch.float32)
    with forbid_large_tensors(T * T // 8) as seen:
        bi_wkv(*leaves, cu([T])).square().sum().backward()
    assert T * 4 <= seen.largest


@pytest.mark.parametrize("needed", [NAMES, ("r",), ("v", "u"), ("w",)])
def test_opcheck_and_only_needed_gradients(needed):
    leaves = [x.detach().requires_grad_(name in needed) for name, x in zip(NAMES, inputs(20, 2, 3, 2, torch.float32), strict=True)]
    starts = cu([13, 7])
    torch.library.opcheck(torch.ops.fastvlp.bi_wkv.default, (*leaves, starts, None, 0.5, "cpu"))
    needs = [name in needed for name in NAMES]
    held = [x.detach() for x in leaves]
    backward = (torch.randn(20, 2, 2), *held, starts, None, 0.5, needs, "cpu")
    torch.library.opcheck(torch.ops.fastvlp.bi_wkv_backward.default, backward)
    parts, whole = (torch.ops.fastvlp.bi_wkv_backward(*backward[:-2], n, "cpu") for n in (needs, [True] * 5))
    for part, full, need in zip(parts, whole, needs, strict=True):
        assert torch.equal(part, full) if need else part.shape == (0,)


def test_adjoint_states_are_made_only_where_needed(monkeypatch):
    calls, real = [], op.cpu._states
    monkeypatch.setattr(op.cpu, "_states", lambda *args: calls.append(args) or real(*args))
    for name, states in (("r", 1), ("k", 1), ("v", 1), ("u", 0), ("w", 2)):
        leaves = [x.detach().requires_grad_(name == other) for other, x in zip(NAMES, inputs(10, 1, 2, 2), strict=True)]
        out = bi_wkv(*leaves, cu([10]))
        calls.clear()
        out.sum().backward()
        assert len(calls) == states, name


def test_compiled_once_for_all_totals_on_meta_tensors_and_under_autocast():
    def step(r, k, v, w, u, starts):
        return bi_wkv(r * 1, k, v, w, u, starts).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([15, 14, 7, 9], [9, 18, 8], [3, 6, 4, 5, 6]):
            leaves = inputs(sum(lengths), 2, 3, 2)
            for mine, true in zip(*(torch.autograd.grad(f(*leaves, cu(lengths)), leaves) for f in (compiled, step)), strict=True):
                torch.testing.assert_close(mine, true)
    meta = [x.detach().to("meta", torch.bfloat16).requires_grad_() for x in inputs(12, 2, 3, 4)]
    out = bi_wkv(*meta, cu([5, 7]).to("meta"))
    assert out.shape == (12, 2, 4) and out.dtype == torch.bfloat16
    assert [g.shape for g in torch.autograd.grad(out.sum(), meta)] == [x.shape for x in meta]
    single = inputs(40, 2, 3, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = bi_wkv(*single, cu([40]))
        gradient = torch.autograd.grad(out.sum(), single)
    torch.testing.assert_close(out, bi_wkv(*single, cu([40])))
    torch.testing.assert_close(gradient, torch.autograd.grad(bi_wkv(*single, cu([40])).sum(), single))


def test_second_derivatives_are_refused():
    leaves = inputs(6, 1, 2, 2)
    (gradient,) = torch.autograd.grad(bi_wkv(*leaves, cu([6])).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="bi_wkv: second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": torch.zeros(12, 2)}, ValueError, r"r, k and w must be \[T, H, K\]"),
        ({"w": torch.zeros(12, 1, 4)}, ValueError, r"w \(12, 1, 4\)"),
        ({"u": torch.zeros(4)}, ValueError, r"u \[H, K\]"),
        ({"v": torch.zeros(12, 2, 0)}, ValueError, "at least one head and one channel"),
        ({"k": torch.zeros(12, 2, 4).half()}, TypeError, "cast them to one dtype"),
        ({"w": torch.zeros(12, 2, 4).int()}, TypeError, "w is torch.int32"),
        ({"u": torch.zeros(2, 4, device="meta")}, ValueError, "move them to one device"),
        ({"cu_seqlens": cu([5, 7]).float()}, ValueError, "it must be int32"),
        ({"cu_seqlens": cu([5, 6])}, ValueError, "the segments hold 11 tokens, but there are 12 rows"),
        ({"cu_seqlens": cu([5, 7]) + 1}, ValueError, "it must start at 0"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    usual = {name: torch.zeros(12, 2, 4) for name in ("r", "k", "v", "w")} | {"u": torch.zeros(2, 4), "cu_seqlens": cu([5, 7])}
    with pytest.raises(error, match=message):
        bi_wkv(**usual | changes)


def compare(lengths, H, K, V, dtype=torch.float32, device="cpu", decay=1.0, needs=NAMES):
    leaves = [x.detach() for x in inputs(sum(lengths), H, K, V, dtype, decay)]
    results = []
    for here, kind, impl in ((device, dtype, "triton"), ("cpu", torch.float64, "cpu")):
        copies = [x.to(here, kind).requires_grad_(name in needs) for name, x in zip(NAMES, leaves, strict=True)]
        out = bi_wkv(*copies, cu(lengths).to(here), 0.5, impl=impl)
        upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype)
        wanted = [x for x in copies if x.requires_grad]
        results.append([out, *torch.autograd.grad((out * upstream.to(here, kind)).sum() + sum(0 * x.sum() for x in wanted), wanted)])
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for mine, true in zip(*results, strict=True):
        scale = true.square().mean().sqrt().item() if true.numel() else 1.0
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.cpu().double(), true, rtol=rounding, atol=rounding * max(1.0, 4 * scale))


def interpreted_cases() -> None:
    """Small tiles; runs in a process where Triton interprets."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare([70, 0, 1, 33], 2, 5, 3)
    compare([40, 3], 1, 40, 40, decay=4.0)
    compare([35, 40], 1, 16, 20, torch.bfloat16)
    compare([35], 1, 6, 4, torch.float16)
    compare([], 1, 3, 3)
    for needs in (("r",), ("v", "u"), ("k",)):
        compare([20], 1, 3, 3, needs=needs)
    leaves = inputs(33, 1, 3, 3, torch.float32)
    strong = [*leaves[:3], torch.tensor([-torch.inf, 60.0, torch.inf]).expand(33, 1, 3).clone().requires_grad_(), leaves[4]]
    ours, exact = both(lambda *x: bi_wkv(*x, cu([33]), impl="triton"), lambda *x: bi_wkv(*x, cu([33]), impl="reference"), strong)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile(arch, monkeypatch):
    from fastvlp_kernels.bi_wkv import triton

    recorders = {name: Recorder(getattr(triton, name)) for name in ("_states_kernel", "_forward_kernel", "_backward_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(triton, name, recorder)
    others = ((64, torch.bfloat16), (80, torch.float32)) if arch == 90 else ()
    for width, dtype in ((80, torch.bfloat16), *others):
        r, k, v, w = (torch.zeros(400, 10, width, dtype=dtype) for _ in range(4))
        triton.backward(v, r, k, v, w, torch.zeros(10, width), cu([400]), True, 1.0, [True] * 5)
        for recorder in recorders.values():
            compiled = recorder.compile(arch)
            compiled.assert_fits()
            assert any(compiled.holds(product) for product in ("mma", "wgmma", "tcgen05"))


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80])
def test_on_the_device(dtype, width):
    compare([196, 0, 1, 700, 64], 3, width, width, dtype, "cuda")
    compare([50] * 9, 2, width, 33, dtype, "cuda", decay=4.0)
