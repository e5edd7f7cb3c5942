"""The Triton kernels of linear_cross_entropy: interpreted, compiled ahead of time for three generations, and run where there is a GPU."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fastvlp_kernels._testing import error, forbid_large_tensors
from fastvlp_kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# The gradient of the logits and the results are rounded once each.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
MODULE = "fastvlp_kernels.linear_cross_entropy.triton"


def compare(T: int, V: int, D: int, dtype: torch.dtype, bias: bool = True, device: str = "cpu", **options: object) -> None:
    """Value and all gradients of the Triton path against the reference in float64, and the value alone under no_grad."""
    random = torch.Generator().manual_seed(T)
    leaves = [torch.randn(size, generator=random).to(device, dtype) for size in ((T, D), (V, D))]
    leaves += [torch.randn(V, generator=random).to(device)] if bias else []
    targets = torch.randint(0, V, (T,), generator=random).to(device)
    targets[1::4] = -100
    upstream = torch.rand(T if options.get("reduction") == "none" else (), generator=random).to(device)

    def run(impl: str, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, *leaves[2:], impl=impl, **options)
        return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves)]

    ours, exact = run("triton", leaves), run("reference", [t.double() for t in leaves])
    for k, (mine, want) in enumerate(zip(ours, exact, strict=True)):
        # Triton's interpreter cuts float32 to bfloat16 where a device rounds.
        rounding = ROUNDING[dtype] * (2 if dtype == torch.bfloat16 and device == "cpu" else 1)
        tolerance = 1e-5 + (rounding if k in (1, 2) else 0.0)
        assert error(mine, want)[0] < tolerance, f"{k} of {(T, V, D, dtype, bias, options)}: {error(mine, want)}"
    with torch.no_grad():
        value = linear_cross_entropy(leaves[0], leaves[1], targets, *leaves[2:], impl="triton", **options)
    torch.testing.assert_close(value, ours[0], rtol=1e-6, atol=1e-7)


def interpreted_cases() -> None:
    """Small tiles and waves, so that several of each occur; runs in a process where Triton interprets."""
    triton = import_module(MODULE)
    usual = triton.config
    triton.config = lambda *size: {**usual(*size), "BLOCK_M": 64, "BLOCK_N": 64}
    triton.WORKSPACE_BYTES = 1
    triton.processors = lambda device: 2  # so that a share has several tiles
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare(90, 330, 5, torch.float32, label_smoothing=0.1, z_loss=0.01)
    compare(70, 200, 40, torch.bfloat16, bias=False, reduction="none")
    compare(17, 140, 65, torch.float16, label_smoothing=0.2, reduction="sum", classes=torch.arange(140).flip(0))
    compare(2, 1, 3, torch.float32)
    x, weight = (torch.randn(n, 4, requires_grad=True) for n in (0, 3))
    nothing = torch.autograd.grad(linear_cross_entropy(x, weight, torch.empty(0, dtype=torch.int64), impl="triton"), [x, weight])
    assert not nothing[1].any() and nothing[0].shape == (0, 4)

    # 1e-10 of loss and of gradient keep their digits; a class taken out by its bias, and a row that is not a number.
    sure = torch.eye(3).mul_(24.0).requires_grad_()
    loss = linear_cross_entropy(sure, torch.eye(3), torch.arange(3), reduction="sum", impl="triton")
    assert float(loss) == pytest.approx(6 * 2.718281828459045**-24, rel=1e-5)
    assert float(torch.autograd.grad(loss, sure)[0][1, 1]) == pytest.approx(-2 * 2.718281828459045**-24, rel=1e-5)
    masked = torch.tensor([0.0, -torch.inf, 0.0])
    value = linear_cross_entropy(torch.zeros(1, 4), torch.zeros(3, 4), torch.tensor([2]), masked, impl="triton")
    assert float(value) == pytest.approx(0.69314718, rel=1e-6)
    x = torch.full((2, 4), torch.nan)
    assert linear_cross_entropy(x, torch.zeros(3, 4), torch.tensor([2, 0]), impl="triton").isnan()

    x, weight, targets = torch.randn(160, 4, requires_grad=True), torch.randn(640, 4, requires_grad=True), torch.arange(160)
    triton.WORKSPACE_BYTES = 4 * 256 * 128
    with forbid_large_tensors(160 * 640 // 2):
        linear_cross_entropy(x, weight, targets, impl="triton").backward()
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        linear_cross_entropy(x.double(), weight.double(), targets, impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "T", "V", "smoothing", "arch"),
    [(torch.bfloat16, 4096, 8192, 0.1, 80), (torch.bfloat16, 4096, 8192, 0.1, 90), (torch.bfloat16, 4096, 8192, 0.1, 100),
     (torch.bfloat16, 4096, 8192, 0.0, 90), (torch.bfloat16, 128, 1024, 0.1, 80), (torch.bfloat16, 128, 1024, 0.1, 90),
     (torch.bfloat16, 128, 1024, 0.1, 100), (torch.float32, 512, 1024, 0.1, 90)],
)  # fmt: skip
def test_kernels_compile(dtype, T, V, smoothing, arch, monkeypatch):
    """As they are launched: both with a bias where there is smoothing, and without either."""
    triton, rows = import_module(MODULE), import_module("fastvlp_kernels.linear_cross_entropy.rows")
    recorders = [Recorder(getattr(triton, name)) for name in ("_forward_kernel", "_gradient_kernel")]
    for recorder in recorders:
        monkeypatch.setattr(triton, recorder.kernel.__name__, recorder)
    monkeypatch.setattr(triton, "processors", lambda device: 132)
    monkeypatch.setattr(triton, "multiply", lambda *given, **options: None)
    x, weight = torch.zeros(T, 768, dtype=dtype), torch.zeros(V, 768, dtype=dtype)
    targets = torch.zeros(T, dtype=torch.int64)
    inputs = rows.Inputs(x, weight, torch.zeros(V) if smoothing else None, targets, smoothing, 0.0, dtype)
    triton.backward(inputs, torch.ones(T), triton.forward(inputs), (True, True, bool(smoothing)))
    for recorder in recorders:
        recorder.compile(arch).assert_fits(product=dtype != torch.float32)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_the_device(dtype):
    compare(1000, 777, 640, dtype, device="cuda", label_smoothing=0.1, z_loss=0.01)
    compare(300, 50_000, 48, dtype, bias=False, device="cuda", reduction="none")
    compare(5000, 130, 512, dtype, device="cuda", reduction="sum")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_the_device_captured_and_repeatable():
    x, weight = (torch.randn(n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (600, 5000))
    targets = torch.randint(0, 5000, (600,), device="cuda")

    def run() -> list[Tensor]:
        loss = linear_cross_entropy(x, weight, targets, label_smoothing=0.1)
        return [loss, *torch.autograd.grad(loss, [x, weight])]

    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for a, b in zip(first, captured, strict=True):
        assert torch.equal(a, b)
