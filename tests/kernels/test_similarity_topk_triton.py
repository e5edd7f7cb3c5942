"""The Triton kernel of similarity_topk: interpreted, compiled ahead of time for three generations, and run where there is a GPU."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from fastvlp_kernels._testing import forbid_large_tensors
from fastvlp_kernels.similarity_topk import similarity_topk
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
MODULE = "fastvlp_kernels.similarity_topk.triton"


def compare(M: int, N: int, D: int, k: int, dtype: torch.dtype, ids: bool = False, offset: int | None = None, device: str = "cpu") -> None:
    """Equal to the reference: small whole numbers have exact products, and many ties."""
    random = torch.Generator().manual_seed(M)
    x, y = (torch.randint(-2, 3, (n, D), generator=random).to(device, dtype) for n in (M, N))
    options: dict[str, object] = {"offset": offset, "columns": ids}
    if ids:
        options |= {"row_ids": torch.arange(M, device=device) % 5 - 1, "col_ids": torch.arange(2 * N, device=device)[::2] % 7 - 1}
    ours, exact = (similarity_topk(x, y, k, **options, impl=impl) for impl in ("triton", "reference"))
    for mine, want in zip(ours, exact, strict=True):
        assert torch.equal(mine, want), (M, N, D, k, dtype, ids, offset)


def interpreted_cases() -> None:
    """Small tiles and two shares of the columns; runs in a process where Triton interprets."""
    triton = import_module(MODULE)
    usual = triton.config
    triton.config = lambda *given: {**usual(*given), "BLOCK_M": 16, "BLOCK_N": 16}
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare(5, 70, 3, 5, torch.float32)
    compare(18, 50, 40, 3, torch.bfloat16, ids=True, offset=-2)
    compare(20, 33, 2, 64, torch.float16, offset=4)
    compare(1, 1, 1, 1, torch.float32, offset=0)
    compare(0, 3, 2, 2, torch.float32)
    compare(3, 0, 2, 2, torch.float32)
    compare(3, 100, 2, 65, torch.float32)
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        similarity_topk(torch.ones(2, 2).double(), torch.ones(2, 2).double(), 1, impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("M", "k", "ids"), [(20_000, 10, True), (20_000, 16, False), (500, 64, True)])
def test_kernel_compiles(arch, M, k, ids, monkeypatch):
    check(torch.bfloat16, M, k, ids, arch, monkeypatch)


@needs_triton
def test_kernel_compiles_in_float32(monkeypatch):
    check(torch.float32, 500, 64, True, 90, monkeypatch)


def check(dtype: torch.dtype, M: int, k: int, ids: bool, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is launched: it fits, nothing spills, and the tensor cores make the products."""
    triton = import_module(MODULE)
    recorder = Recorder(triton._search_kernel)
    monkeypatch.setattr(triton, "_search_kernel", recorder)
    monkeypatch.setattr(triton, "processors", lambda device: 132)
    numbers = [torch.zeros(n, dtype=torch.int64) if ids else None for n in (M, 1024)]
    triton.search(torch.zeros(M, 512, dtype=dtype), torch.zeros(1024, 512, dtype=dtype), k, *numbers, 3 if ids else None, dtype)
    recorder.compile(arch).assert_fits(product=dtype != torch.float32)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_device(dtype):
    compare(1000, 777, 640, 10, dtype, offset=3, device="cuda")
    compare(300, 5000, 48, 64, dtype, ids=True, offset=-7, device="cuda")
    compare(20_000, 130, 16, 5, dtype, device="cuda")
    with forbid_large_tensors(20_000 * 20_000 // 8):
        x = torch.randn(20_000, 64, device="cuda").to(dtype)
        values, indices = similarity_topk(x, x, 10, offset=0)
    S = x[:100].double() @ x.double().T
    S.diagonal().fill_(-torch.inf)
    torch.testing.assert_close(values[:100].double(), S.gather(1, indices[:100]), rtol=1e-2 if dtype == torch.float32 else 1e-5, atol=1e-3)
