"""The Triton kernels of bias_activation: interpreted, compiled ahead of time for three generations, and run where there is a GPU."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from fastvlp_kernels._testing import error
from fastvlp_kernels.bias_activation import bias_activation
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
MODULE = "fastvlp_kernels.bias_activation.triton"


def compare(T: int, H: int, dtype: torch.dtype, kind: str, biased: bool = True, device: str = "cpu") -> None:
    """The result and all gradients of the Triton path against the reference in float64."""
    random = torch.Generator().manual_seed(T)
    x = (2 * torch.randn(2 * T, H, generator=random)).to(device, dtype)[::2]
    bias = torch.randn(H, generator=random).to(device)
    upstream = torch.randn(T, H // 2 if kind == "geglu" else H, generator=random).to(device, dtype)

    def run(impl: str, exact: bool) -> list[torch.Tensor]:
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in ([x, bias] if biased else [x])]
        out = bias_activation(leaves[0], leaves[1] if biased else None, kind, impl=impl)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    for k, (mine, want) in enumerate(zip(run("triton", False), run("reference", True), strict=True)):
        # Triton's interpreter cuts float32 to bfloat16 where a device rounds.
        assert error(mine, want)[0] < 1e-5 + ROUNDING[mine.dtype] * (2 if device == "cpu" else 1), (k, T, H, dtype, kind, error(mine, want))


def interpreted_cases() -> None:
    """Small tiles, so that a program has several; runs in a process where Triton interprets."""
    triton = import_module(MODULE)
    triton.config = lambda width: {"ROWS": 2, "BLOCK": 8, "num_warps": 1}
    triton.PROGRAMS = 4
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare(23, 12, torch.float32, "gelu")
    compare(9, 16, torch.bfloat16, "geglu")
    compare(5, 22, torch.float16, "geglu", biased=False)
    compare(7, 12, torch.float32, "relu2")
    compare(1, 1, torch.bfloat16, "gelu", biased=False)
    x, bias = torch.zeros(0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    nothing = torch.autograd.grad(bias_activation(x, bias, impl="triton").sum(), [x, bias])
    assert nothing[0].shape == (0, 4) and not nothing[1].any()
    for kind in ("gelu", "relu2"):
        assert bias_activation(torch.tensor([[torch.nan, 1.0]]), None, kind, impl="triton").isnan().tolist() == [[True, False]]
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        bias_activation(torch.zeros(2, 2).double(), impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("width", "kind"), [(3072, "gelu"), (8192, "geglu"), (768, "relu2")])
def test_kernels_compile(arch, width, kind, monkeypatch):
    """As they are launched, with both gradients."""
    triton = import_module(MODULE)
    recorders = [Recorder(getattr(triton, name)) for name in ("_forward_kernel", "_backward_kernel")]
    for recorder in recorders:
        monkeypatch.setattr(triton, recorder.kernel.__name__, recorder)
    monkeypatch.setattr(triton, "processors", lambda device: 132)
    x, bias = torch.zeros(1000, width, dtype=torch.bfloat16), torch.zeros(width)
    triton.backward(triton.forward(x, bias, kind), x, bias, kind, [True, True])
    for recorder in recorders:
        recorder.compile(arch).assert_fits()


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_the_device(dtype):
    compare(1000, 3072, dtype, "gelu", device="cuda")
    compare(5000, 200, dtype, "geglu", device="cuda")
    compare(300, 5001, dtype, "relu2", biased=False, device="cuda")
