"""The Triton kernels of maxsim: interpreted on the CPU, compiled for GPUs that are not here, and run where there is one."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from fastvlp_kernels._testing import error, forbid_large_tensors
from fastvlp_kernels.maxsim import maxsim
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = ("_tile_kernel", "_sum_kernel", "_first_kernel", "_coefficients_kernel")
# Coefficients and the result are rounded once each; the interpreter of Triton truncates to bfloat16 where GPUs round.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def starts(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def compare(lengths_x, lengths_y, D, dtype, longest=None, ties=False, device="cpu", tokens_x=0, scale=1.0, **options) -> None:
    """Scores and gradients of the Triton path against the reference in float64; ``tokens_x`` more tokens are of no segment."""
    random = torch.Generator().manual_seed(D)
    sizes = sum(lengths_x) + tokens_x, sum(lengths_y)
    if ties:
        x, y = (torch.randint(-2, 3, (size, D), generator=random).to(device, dtype) for size in sizes)
    else:
        x, y = (F.normalize(torch.randn(size, D, generator=random), dim=1).to(device, dtype) for size in sizes)
    products = options.get("compute_dtype", dtype)
    results = []
    for impl in ("triton", "reference"):
        x_leaf, y_leaf = (t.to(dtype if impl == "triton" else torch.float64).requires_grad_() for t in (x, y))
        cu_x, cu_y = starts(lengths_x, device), starts(lengths_y, device)
        scores = maxsim(x_leaf, cu_x, y_leaf, cu_y, impl=impl, max_seqlen_x=longest, **options)
        scores = scores if isinstance(scores, tuple) else (scores,)
        random = torch.Generator().manual_seed(1)
        upstream = [scale * torch.randn(s.shape, generator=random).to(device, s.dtype) for s in scores]
        results.append((*scores, *torch.autograd.grad(scores, (x_leaf, y_leaf), upstream)))
    for k, (mine, want) in enumerate(zip(*results, strict=True)):
        assert mine.shape == want.shape
        tolerance = ROUNDING[products] if k >= len(results[0]) - 2 else 1e-6
        if want.numel():
            found = error(mine, want)
            assert found[0] < tolerance, f"{k} of {(lengths_x, lengths_y, D, dtype, longest, options)}: {found}"


def interpreted_cases() -> None:
    """Small tiles and waves, so that several of each occur; uninitialised memory is full of NaN and impossible indices."""
    from fastvlp_kernels.maxsim import triton

    usual = triton.config
    triton.config = lambda *kinds: {**usual(*kinds), "BLOCK_M": 16, "BLOCK_N": 16}
    torch.use_deterministic_algorithms(True)
    compare([3, 0, 20, 1, 5], [2, 7, 0, 37, 3, 3], 5, torch.float32, ties=True)
    compare([40, 3], [18, 40], 70, torch.bfloat16, reduce="sum")
    compare([7, 8, 2], [5, 0, 30], 64, torch.float16, directions="x_to_y", reduce="sum", tokens_x=3)
    compare([7, 8, 2], [5, 0, 30], 64, torch.float16, directions="y_to_x")
    compare([7, 8, 2], [5, 0, 30], 64, torch.float32, compute_dtype=torch.float16, scale=1e-9)
    compare([1], [1], 1, torch.float32)
    compare([0, 0], [4], 3, torch.float32)
    compare([], [4], 3, torch.float32)
    triton.PARTIAL_BYTES = {"forward": 1, "backward": 1}
    triton.WORKSPACE_ROWS = 128
    compare([9, 0, 20, 4, 20], [2, 33, 3], 8, torch.float32, longest=20, ties=True)
    compare([9, 0, 20, 4, 20], [2, 33, 3], 8, torch.bfloat16, longest=31, tokens_x=5)

    x, y, cu_x, cu_y = torch.randn(12, 8), torch.randn(18, 8), starts([4, 8]), starts([10, 8])
    with pytest.raises(ValueError, match="max_seqlen_x=7, but there is a segment of 8"):
        maxsim(x, cu_x, y, cu_y, max_seqlen_x=7, impl="triton")
    # Where the host does not know the lengths.
    given, ones = (x, y, cu_x, cu_y, 7, True), torch.ones(2, 2)
    assert all(scores.isnan().all() for scores in triton.forward(*given, True, True, torch.float32))
    assert all(g.isnan().any() for g in triton.backward(ones, ones, *given, torch.float32, True, True))
    x[5, 2] = torch.nan
    row, col = maxsim(x, cu_x, y, cu_y, impl="triton")
    assert row[1].isnan().all() and col[1].isnan().all() and not row[0].isnan().any() and not col[0].isnan().any()
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        maxsim(x.double(), cu_x, y.double(), cu_y, impl="triton")


def no_large_tensors() -> None:
    """Blocks as they run on a GPU."""
    from fastvlp_kernels.maxsim import triton

    triton.WORKSPACE_ROWS = 256
    x, y = (torch.randn(600, 16).bfloat16().requires_grad_() for _ in range(2))
    cu = starts([75] * 8)
    with forbid_large_tensors(600 * 600 // 8):
        row, col = maxsim(x, cu, y, cu, impl="triton", max_seqlen_x=75)
        (row.sum() + col.sum()).backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


def test_interpreted():
    interpreted(interpreted_cases)


def test_interpreted_memory():
    interpreted(no_large_tensors)


def launches(monkeypatch, dtype, lengths: tuple[int, int], directions: tuple[bool, bool]) -> dict[str, Recorder]:
    """The launches of a forward and a backward with segments of these lengths, not run."""
    module = import_module("fastvlp_kernels.maxsim.triton")
    recorders = {name: Recorder(getattr(module, name)) for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(module, name, recorder)
    monkeypatch.setattr(module, "multiply", lambda *args, **kwargs: None)
    M, N = 5, 7
    x, y = torch.zeros(M * lengths[0], 256, dtype=dtype), torch.zeros(N * lengths[1], 256, dtype=dtype)
    cu_x, cu_y = starts([lengths[0]] * M), starts([lengths[1]] * N)
    module.forward(x, y, cu_x, cu_y, None, True, *directions, dtype)
    grads = [torch.ones(M, N) if wanted else None for wanted in directions]
    module.backward(*grads, x, y, cu_x, cu_y, None, True, dtype, True, True)
    return recorders


COMPILED = {
    "FILIP": (torch.bfloat16, (197, 77), (True, True)),
    "ColBERT": (torch.bfloat16, (32, 300), (True, False)),
    "short": (torch.float16, (9, 5), (True, True)),
    "float32": (torch.float32, (197, 5), (True, True)),
}


@pytest.mark.parametrize(("case", "arch"), [*((case, 90) for case in COMPILED), ("FILIP", 80), ("FILIP", 100)])
def test_compiled_ahead_of_time(case, arch, monkeypatch):
    dtype, lengths, directions = COMPILED[case]
    recorders = launches(monkeypatch, dtype, lengths, directions)
    for name in KERNELS if lengths[1] == 77 else KERNELS[:1]:
        for launch in (0, -1) if name == "_tile_kernel" else (-1,):
            recorders[name].compile(arch, launch).assert_fits(product=name == "_tile_kernel" and dtype != torch.float32)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@needs_gpu
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_the_device(dtype):
    random = torch.Generator().manual_seed(0)
    lengths_x, lengths_y = (torch.randint(0, high, (40,), generator=random).tolist() for high in (260, 80))
    compare(lengths_x, lengths_y, 96, dtype, device="cuda")
    compare(lengths_x, lengths_y, 96, dtype, longest=max(lengths_x), device="cuda", reduce="sum")
    compare([3000, 1], [5, 5000], 640, dtype, device="cuda")
    compare([1] * 300, [7] * 200, 16, dtype, device="cuda", directions="y_to_x")


@needs_gpu
def test_on_the_device_captured_and_repeatable():
    lengths_x, lengths_y = [50, 197, 64] * 8, [77, 12] * 9
    x, y = (torch.randn(sum(n), 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (lengths_x, lengths_y))
    cu_x, cu_y = starts(lengths_x, "cuda"), starts(lengths_y, "cuda")

    def run():
        scores = maxsim(x, cu_x, y, cu_y, max_seqlen_x=197)
        return *scores, *torch.autograd.grad(scores[0].sum() + scores[1].sum(), (x, y))

    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


@needs_gpu
def test_on_the_device_in_bounded_memory():
    """FILIP's batch of TARGETS: products of 63 GB in float32, in 2 GB."""
    x, y = (torch.randn(1024 * n, 256, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (196, 77))
    cu_x, cu_y = starts([196] * 1024, "cuda"), starts([77] * 1024, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row, col = maxsim(x, cu_x, y, cu_y, max_seqlen_x=196)
    (row.diagonal().sum() + col.diagonal().sum()).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 << 30
    assert x.grad.isfinite().all() and y.grad.isfinite().all()
