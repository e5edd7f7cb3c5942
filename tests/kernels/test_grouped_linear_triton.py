"""The Triton kernels of grouped_linear: interpreted, compiled ahead of time for three generations, and run where there is a GPU."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from fastvlp_kernels._testing import error
from fastvlp_kernels.grouped_linear import grouped_linear
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
MODULE = "fastvlp_kernels.grouped_linear.triton"


def compare(counts: list[int], width: int, out: int, dtype: torch.dtype, biased: bool = True, device: str = "cpu") -> None:
    """The result and all gradients of the Triton path against the reference in float64; ``counts``: tokens of each type."""
    random = torch.Generator().manual_seed(sum(counts))
    types = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts), generator=random)].to(device)
    x = torch.randn(2 * sum(counts), width, generator=random)[::2]
    weight = torch.randn(len(counts), width, out, generator=random).transpose(1, 2)
    given = [t.to(device, dtype) for t in (x, weight)] + ([torch.randn(len(counts), out, generator=random).to(device)] if biased else [])
    upstream = torch.randn(sum(counts), out, generator=random).to(device, dtype)

    def run(impl: str, exact: bool) -> list[torch.Tensor]:
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in given]
        found = grouped_linear(leaves[0], types, *leaves[1:], impl=impl)
        return [found, *torch.autograd.grad(found, leaves, upstream.to(found.dtype))]

    for k, (mine, want) in enumerate(zip(run("triton", False), run("reference", True), strict=True)):
        # Triton's interpreter cuts float32 to bfloat16 where a device rounds.
        if not want.numel():
            continue
        tolerance = 1e-5 + ROUNDING[mine.dtype] * (2 if device == "cpu" else 1)
        assert error(mine, want)[0] < tolerance, (k, counts, width, out, dtype, error(mine, want))


def interpreted_cases() -> None:
    """Small tiles, so that a type has several; runs in a process where Triton interprets."""
    triton = import_module(MODULE)
    triton.config = lambda dtype: {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    triton.SHARES = 2
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare([20, 0, 33, 1], 5, 18, torch.float32)
    compare([7, 40], 33, 16, torch.bfloat16)
    compare([3], 70, 3, torch.float16, biased=False)
    compare([0, 0], 4, 4, torch.float32)
    x, weight = torch.randn(40, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    types = torch.arange(40) % 2
    first, second = (torch.autograd.grad(grouped_linear(x, types, weight, impl="triton").square().sum(), (x, weight)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        grouped_linear(x.double(), types, weight.double(), impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize(
    ("arch", "dtype", "width"),
    [(80, torch.bfloat16, 768), (90, torch.bfloat16, 768), (100, torch.bfloat16, 768), (90, torch.float16, 1152), (90, torch.float32, 768)],
)  # fmt: skip
def test_kernels_compile(arch, dtype, width, monkeypatch):
    """As they are launched, forward, both gradients and the bias's."""
    triton = import_module(MODULE)
    recorders = [Recorder(getattr(triton, name)) for name in ("_product_kernel", "_weight_kernel", "_bias_kernel")]
    for recorder in recorders:
        monkeypatch.setattr(triton, recorder.kernel.__name__, recorder)
    x, weight, bias = torch.zeros(1000, width, dtype=dtype), torch.zeros(3, 4 * width, width, dtype=dtype), torch.zeros(3, 4 * width)
    order, starts = torch.arange(1000), torch.tensor([0, 500, 500, 1000], dtype=torch.int32)
    triton.backward(triton.forward(x, order, starts, weight, bias), x, order, starts, weight, [True] * 3)
    for recorder in recorders:
        for launch in range(len(recorder.launches)):
            product = dtype != torch.float32 and recorder.kernel.__name__ != "_bias_kernel"
            recorder.compile(arch, launch).assert_fits(product=product)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_the_device(dtype):
    compare([1000, 0, 3, 500], 768, 320, dtype, device="cuda")
    compare([70, 4000], 100, 33, dtype, biased=False, device="cuda")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_by_pytorchs_grouped_product_on_the_device():
    random = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=random).cuda().bfloat16().requires_grad_() for size in ((500, 64), (3, 96, 64), (3, 96))]
    types = torch.randint(0, 3, (500,), generator=random).cuda()
    found = grouped_linear(given[0], types, *given[1:], impl="cpu")
    want = grouped_linear(*(t if t.dtype == torch.int64 else t.double() for t in (given[0], types, *given[1:])), impl="reference")
    assert error(found, want)[0] < 2**-8
    ours, exact = (torch.autograd.grad(out.sum(), given) for out in (found, want))
    assert all(error(a, b)[0] < 2**-7 for a, b in zip(ours, exact, strict=True))
