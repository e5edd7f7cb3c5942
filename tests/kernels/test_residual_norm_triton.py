"""The Triton kernels of residual_norm: interpreted, compiled ahead of time for three generations, and run where there is a GPU."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from fastvlp_kernels._testing import error
from fastvlp_kernels.residual_norm import residual_norm
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
MODULE = "fastvlp_kernels.residual_norm.triton"


def compare(T: int, C: int, dtype: torch.dtype, kind: str, vectors: int, stream: torch.dtype | None = None, device: str = "cpu") -> None:
    """Both results and all gradients of the Triton path against the reference in float64; ``stream``: the dtype of x."""
    random = torch.Generator().manual_seed(T)
    sizes = ((2 * T, C), (T, C), *[(C,)] * vectors)
    given = [torch.randn(size, generator=random).to(device, dtype) for size in sizes]
    given[0] = given[0][::2].to(stream or dtype)
    upstream = [torch.randn(T, C, generator=random).to(device) for _ in range(2)]

    def run(impl: str, exact: bool) -> list[torch.Tensor]:
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in given]
        gamma = leaves[4] if vectors == 3 else None
        outs = residual_norm(leaves[0], leaves[1], leaves[2], leaves[3] if vectors > 1 else None, gamma=gamma, kind=kind, impl=impl)
        return [*outs, *torch.autograd.grad(outs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)])]

    for k, (mine, want) in enumerate(zip(run("triton", False), run("reference", True), strict=True)):
        # Triton's interpreter cuts float32 to bfloat16 where a device rounds.
        rounding = ROUNDING[mine.dtype] + ROUNDING[dtype] * (2 if device == "cpu" else 1)
        assert error(mine, want)[0] < 1e-5 + rounding, f"{k} of {(T, C, dtype, kind, vectors)}: {error(mine, want)}"


def interpreted_cases() -> None:
    """Small blocks, so that a program has several; runs in a process where Triton interprets."""
    triton = import_module(MODULE)
    triton.config = lambda width, tensors: {"ROWS": 2, "BLOCK": triton.triton.next_power_of_2(width), "num_warps": 1}
    triton.PROGRAMS = 3
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare(23, 6, torch.float32, "layer", 3)
    compare(9, 16, torch.bfloat16, "rms", 1)
    compare(5, 33, torch.float16, "layer", 2)
    compare(7, 12, torch.bfloat16, "rms", 3, stream=torch.float32)
    compare(1, 1, torch.float32, "rms", 2)
    x = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    outs = residual_norm(x, x.detach(), weight, impl="triton")
    nothing = torch.autograd.grad(outs[0].sum() + outs[1].sum(), [x, weight])
    assert nothing[0].shape == (0, 4) and not nothing[1].any()
    leaves = [torch.randn(30, 4).requires_grad_(), torch.randn(30, 4).requires_grad_(), torch.randn(4).requires_grad_()]
    first, second = (torch.autograd.grad(residual_norm(*leaves, impl="triton")[0].square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        residual_norm(*(t.double() for t in leaves), impl="triton")
    wide = torch.zeros(1, 8193)
    with pytest.raises(RuntimeError, match="takes rows of at most 8192 features, not 8193; use impl='cpu'"):
        residual_norm(wide, wide, wide[0], impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize(
    ("arch", "width", "kind", "scaled"),
    [(80, 768, "layer", True), (90, 768, "layer", True), (100, 768, "layer", True), (90, 768, "layer", False), (90, 1152, "rms", False),
     (80, 4096, "rms", True), (90, 4096, "layer", True), (100, 8192, "layer", True), (90, 8192, "layer", True)],
)  # fmt: skip
def test_kernels_compile(arch, width, kind, scaled, monkeypatch):
    """As they are launched, with every gradient."""
    triton, arguments = import_module(MODULE), import_module("fastvlp_kernels.residual_norm.arguments")
    recorders = [Recorder(getattr(triton, name)) for name in ("_forward_kernel", "_backward_kernel")]
    for recorder in recorders:
        monkeypatch.setattr(triton, recorder.kernel.__name__, recorder)
    monkeypatch.setattr(triton, "processors", lambda device: 132)
    x, vector = torch.zeros(1000, width, dtype=torch.bfloat16), torch.zeros(width)
    a = arguments.Inputs(x, x, vector if scaled else None, vector, vector if kind == "layer" else None, 1e-5, kind == "rms", x.dtype)
    out, total, mean, rstd = triton.forward(a)
    saved = arguments.Saved(x if scaled else None, a.gamma, a.weight, a.bias, total, mean, rstd, x.dtype, x.dtype, a.rms)
    triton.backward(saved, out, total, arguments.Needs(True, True, scaled, True, kind == "layer"))
    for recorder in recorders:
        recorder.compile(arch).assert_fits()


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_the_device(dtype):
    compare(1000, 768, dtype, "layer", 3, device="cuda")
    compare(5000, 100, dtype, "rms", 1, device="cuda")
    compare(300, 5000, dtype, "layer", 2, torch.float32, device="cuda")
