"""The Triton kernels of token_merge: interpreted, compiled ahead of time for three generations, and run where there is a GPU."""

from importlib.util import find_spec

import pytest
import torch

from fastvlp_kernels import Packed, merge_plan
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
FIELDS = ("cu_seqlens", "source", "order", "starts", "lengths")


def signs(tokens, width=16):
    """Vectors of +-1: exact cosines and many ties."""
    return torch.randint(0, 2, (tokens, width), generator=torch.Generator().manual_seed(tokens)) * 2.0 - 1


def compare(lengths, options, dtype=torch.float32, width=7, modes=("mean", "sum", "amax"), device="cpu"):
    """The plan equals that of the reference; merging, and all gradients, those of the CPU path in float64."""
    generator = torch.Generator().manual_seed(sum(lengths))
    packed = Packed.of(signs(sum(lengths)).to(device, dtype), lengths)
    plan = merge_plan(packed.x, packed.cu_seqlens, **options, lengths=packed.lengths, impl="triton")
    options = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    exact = merge_plan(packed.x.cpu(), packed.cu_seqlens.cpu(), **options, impl="reference")
    for field in FIELDS:
        mine = getattr(plan, field)
        if mine is not None and plan.total == exact.total:
            assert torch.equal(mine.cpu(), getattr(exact, field)), (field, lengths, options)
    x, sizes = torch.randn(sum(lengths), width, generator=generator), torch.rand(sum(lengths), generator=generator) + 0.1
    x = x.to(dtype)
    for mode in modes:
        for sized in (False, True):
            def run(plan, x, size, mode=mode):
                leaves = [x.requires_grad_()] + ([] if size is None else [size.requires_grad_()])
                random = torch.Generator().manual_seed(1)
                results = [t for t in plan.merge(x, size, mode) if t.requires_grad]
                upstream = [torch.randn(t.shape, generator=random).to(dtype).to(t.device, t.dtype) for t in results]
                return *results, *torch.autograd.grad(results, leaves, upstream)

            ours = run(plan, x.to(device).clone(), sizes.to(device).clone() if sized else None)
            theirs = run(exact, x.double(), sizes.double() if sized else None)
            rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
            for mine, true in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine.cpu().double(), true, rtol=rounding, atol=rounding)


def interpreted_cases() -> None:
    """Small tiles, so that several of each occur; runs in a process where Triton interprets."""
    from fastvlp_kernels import _ragged_triton
    from fastvlp_kernels.token_merge import triton

    triton.match_config = lambda dtype: {"BLOCK_A": 4, "BLOCK_B": 4, "BLOCK_D": 8}
    triton.rank_config = lambda: {"BLOCK": 8, "BLOCK_A": 4}
    triton.merge_config = lambda width: {"BLOCK_R": 8, "BLOCK_C": 4}
    _ragged_triton.BLOCK_S = 4
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    lengths, few = [13, 0, 1, 2, 20, 3, 0], [13, 9]
    compare(lengths, {"r": 3, "protected": 1})
    compare(few, {"r": 0.4, "keep_order": False}, torch.bfloat16, modes=("mean", "amax"))
    compare(few, {"threshold": 0.25}, torch.float16, modes=("sum", "mean"))
    for options in (
        {"r": 100}, {"r": 4, "keep_order": False, "protected": 2}, {"threshold": 0.0, "keep_order": False},
        {"r": torch.tensor([3, 1, 2, 0, 9, 1, 1])}, {"r": torch.rand(7, dtype=torch.float64)}, {"r": 0.29, "ghost": True},
        {"threshold": 0.25, "ghost": True, "protected": 3},
    ):  # fmt: skip
        compare(lengths, options, modes=())
    compare([], {"r": 2}, modes=())
    compare([0], {"threshold": 0.1}, width=0, modes=())
    spoiled = signs(9)
    spoiled[3], spoiled[4], spoiled[5] = 0, torch.nan, torch.inf
    plans = [merge_plan(spoiled, torch.tensor([0, 9]), 2, impl=impl) for impl in ("triton", "reference")]
    assert torch.equal(plans[0].source, plans[1].source)
    rows = torch.randn(plans[0].total, 3, requires_grad=True)
    gradients = [torch.autograd.grad(plan.unmerge(rows), rows, torch.arange(27.0).view(9, 3))[0] for plan in plans]
    torch.testing.assert_close(*gradients)
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        merge_plan(spoiled.double(), torch.tensor([0, 9]), 2, impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@pytest.fixture
def kernels(monkeypatch):
    from fastvlp_kernels import _ragged_triton
    from fastvlp_kernels.token_merge import triton

    recorders = {}
    for module in (triton, _ragged_triton):
        for name in [name for name in dir(module) if name.endswith("_kernel")]:
            recorders[name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, recorders[name])
    return recorders


@needs_triton
@pytest.mark.parametrize(("dtype", "arch"), [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.bfloat16, 100), (torch.float32, 80)])
def test_matching_compiles(dtype, arch, kernels):
    from fastvlp_kernels.token_merge import triton

    metric, cu = torch.zeros(400, 64, dtype=dtype), torch.zeros(3, dtype=torch.int32)
    triton.match(metric, cu, 200, 8.0, False, None, None, 1, True, 0, 384)
    triton.match(metric, cu, 200, 0.0, True, torch.zeros(2), 0.5, 0, False, 1, 400)
    kernels["_similarity_kernel"].compile(arch).assert_fits(product=dtype != torch.float32)
    if arch == 90:
        for name in ("_rank_kernel", "_list_kernel", "_count_kernel", "_starts_kernel"):
            for launch in range(2):
                kernels[name].compile(arch, launch).assert_fits()


@needs_triton
@pytest.mark.parametrize(("mode", "arch"), [("mean", 90), ("mean", 100), ("amax", 80), ("sum", 90)])
def test_merging_compiles(mode, arch, kernels):
    from fastvlp_kernels.token_merge import triton

    x, size, places = torch.zeros(400, 768, dtype=torch.bfloat16), torch.ones(400), torch.zeros(400, dtype=torch.int64)
    starts = torch.zeros(385, dtype=torch.int64)
    out, size_out = triton.merge(x, size, places, starts, mode)
    triton.merge_backward(out, size_out, x, size, out, size_out, places, places, starts, mode, [True, True])
    triton.merge(x.float(), None, places, starts, mode)
    triton.merge_backward(out, size_out, x.float(), None, out.float(), size_out, places, places, starts, mode, [True, False])
    for name in ("_merge_kernel", "_spread_kernel", "_first_maximum_kernel"):
        for launch in range(len(kernels[name].launches)):
            kernels[name].compile(arch, launch).assert_fits()


@needs_triton
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_device(dtype):
    lengths = [197, 0, 1, 50, 256, 3, 64, 700]
    compare(lengths, {"r": 13, "protected": 1}, dtype, 768, device="cuda")
    compare(lengths, {"r": 0.3, "keep_order": False}, dtype, 100, device="cuda")
    compare(lengths, {"threshold": 0.5, "protected": 2}, dtype, 33, device="cuda")
    compare(lengths, {"r": torch.arange(8, device="cuda"), "ghost": True}, dtype, 640, device="cuda")


@needs_triton
@needs_cuda
def test_on_the_device_without_synchronising_captured_and_repeatable():
    packed = Packed.of(torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16), [250] * 4)

    def step():
        plan = merge_plan(packed.x, packed.cu_seqlens, 20, lengths=packed.lengths)
        return plan.merge(packed.x)[0]

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert torch.equal(step(), first)
        assert merge_plan(packed.x, packed.cu_seqlens, threshold=0.3, lengths=packed.lengths).lengths is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    packed.x.copy_(packed.x.flip(0))
    graph.replay()
    assert torch.equal(captured, step())
