"""The Triton kernels of pairwise_sigmoid: interpreted, compiled ahead of time for three generations, and run where there is a GPU."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from fastvlp_kernels._testing import error, forbid_large_tensors
from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid, sigmoid_forward
from tests.kernels.aot import compile_for
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
NAMES = ("row_bias", "col_bias", "row_weight", "col_weight")
# Coefficients and the result are rounded once each.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def compare(M: int, N: int, D: int, dtype: torch.dtype, ids: str | None, offset: int | None, vectors: bool, device: str = "cpu") -> None:
    """Value and all gradients of the Triton path against the reference in float64, and the value alone under no_grad."""
    random = torch.Generator().manual_seed(M)
    x, y = (F.normalize(torch.randn(size, D, generator=random), dim=1).to(device, dtype) for size in (M, N))
    leaves = [x, y, torch.tensor(9.0, device=device), torch.tensor([-3.0], device=device)]
    options: dict[str, object] = {"offset": offset}
    if ids is not None:
        row_ids, col_ids = (torch.randint(-1, 4, (size,), generator=random).to(device) for size in (M, N))
        options |= {"ids": ids, "row_ids": row_ids, "col_ids": col_ids}
    leaves += [draw(size, generator=random).to(device) for draw in (torch.randn, torch.rand) for size in (M, N)] if vectors else []

    def run(impl: str, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        loss = pairwise_sigmoid(*leaves[:4], **dict(zip(NAMES, leaves[4:], strict=False)), **options, impl=impl)
        return [loss.detach(), *torch.autograd.grad(loss / 7, leaves)]

    ours, exact = run("triton", leaves), run("reference", [t.double() for t in leaves])
    for k, (mine, want) in enumerate(zip(ours, exact, strict=True)):
        tolerance = 1e-5 + (ROUNDING[dtype] if k in (1, 2) else 0.0)
        assert error(mine, want)[0] < tolerance, f"{k} of {(M, N, D, dtype, ids, offset)}: {error(mine, want)}"
    with torch.no_grad():
        value = pairwise_sigmoid(*leaves[:4], **dict(zip(NAMES, leaves[4:], strict=False)), **options, impl="triton")
    torch.testing.assert_close(value, ours[0], rtol=1e-6, atol=0.0)


def interpreted_cases() -> None:
    """Small tiles and waves, so that several of each occur; runs in a process where Triton interprets."""
    from fastvlp_kernels.pairwise_sigmoid import triton

    usual, products = triton.config, triton.product_config
    triton.config = lambda dtype, vectors: {**usual(dtype, vectors), "BLOCK_M": 16, "BLOCK_N": 16}
    triton.product_config = lambda: {**products(), "BLOCK_M": 16, "BLOCK_D": 32, "BLOCK_K": 16}
    triton.WAVE_TILES = range(1, 2)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare(21, 18, 5, torch.float32, None, 1, False)
    compare(18, 21, 40, torch.bfloat16, None, 0, False)
    compare(20, 37, 65, torch.float32, "exclude", -3, True)
    compare(37, 20, 40, torch.bfloat16, "positive", 5, True)
    compare(19, 33, 64, torch.float16, "positive", None, True)
    compare(1, 1, 1, torch.float16, None, 0, False)

    x, y = torch.randn(20, 8), torch.randn(18, 8)
    whole = sigmoid_forward(x, y, 3.0, needs=[True] * 4, impl="triton")
    frozen = sigmoid_forward(x, y, 3.0, needs=[False, True], impl="triton")
    torch.testing.assert_close(frozen.y, whole.y)
    assert frozen.x.numel() == frozen.scale.numel() == 0
    x[3, 2] = torch.nan
    assert sigmoid_forward(x, y, 3.0, needs=[True] * 4, impl="triton").loss.isnan()
    # All 16 pairs of a row at logit 0: the product of their 1 + a is the largest there is; then logits of +-1000.
    ones = torch.ones(16, 1)
    assert float(pairwise_sigmoid(0 * ones, ones, impl="triton")) == pytest.approx(256 * 0.69314718, rel=1e-6)
    assert float(pairwise_sigmoid(ones, ones, 1000.0, offset=None, impl="triton")) == pytest.approx(256000.0, rel=1e-6)
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        pairwise_sigmoid(x.double(), y.double(), impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


LOGITS = {
    "all gradients": (torch.bfloat16, "ieee", ("G_ptr", "dscale_ptr", "dbias_ptr")),
    "value": (torch.bfloat16, "ieee", ()),
    "vectors and ids": (torch.bfloat16, "ieee", None),
    "float32": (torch.float32, "ieee", ("G_ptr", "dscale_ptr", "dbias_ptr")),
}
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@needs_triton
@pytest.mark.parametrize(
    ("case", "arch"),
    [("all gradients", 80), ("all gradients", 90), ("all gradients", 100), ("vectors and ids", 80), ("vectors and ids", 90),
     ("vectors and ids", 100), ("value", 90), ("float32", 90)],
)  # fmt: skip
def test_logits_kernel_compiles(case, arch):
    from fastvlp_kernels.pairwise_sigmoid import triton

    dtype, precision, results = LOGITS[case]
    vectors = results is None
    options = triton.config(dtype, vectors)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    signature = {"x_ptr": f"*{TYPES[dtype]}", "y_ptr": f"*{TYPES[dtype]}", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "loss_ptr": "*fp32"}
    sides = [f"{side}_{what}_ptr" for side in ("row", "col") for what in ("bias", "weight", "sum", "loss")]
    gradients = ["G_ptr", "dscale_ptr", "dbias_ptr"]
    signature |= {name: "*fp32" for name in (gradients + sides if vectors else results)}
    signature |= {name: "*i64" for name in ("row_ids_ptr", "col_ids_ptr") if vectors}
    signature |= {"G_ptr": f"*{TYPES[dtype]}"} if "G_ptr" in signature else {}
    pointers = [name for name in triton._logits_kernel.arg_names if name.endswith("_ptr")]
    constants = {name: None for name in pointers if name not in signature}
    constants |= {"HAS_OFFSET": True, "EXCLUDE": False, "WEIGHTED": vectors, "MAKE_G": "G_ptr" in signature, "FACTOR": 1.0}
    constants |= {"PRECISION": precision, "UPCAST": False, **options}
    signature |= {name: "i32" for name in ("M", "N", "D", "offset", "stride_x", "stride_y", "stride_G")}
    aligned = [name for name in (*pointers, "D", "stride_x", "stride_y", "stride_G")]
    compiled = compile_for(triton._logits_kernel, signature, constants, arch, num_warps=warps, num_stages=stages, aligned=aligned)
    compiled.assert_fits(product=dtype != torch.float32)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_products_kernel_compiles(arch):
    from fastvlp_kernels.pairwise_sigmoid import triton

    options = triton.product_config()
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    signature = {"G_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16", "dx_ptr": "*fp32", "dy_ptr": "*fp32"}
    aligned = [*signature, "D", "stride_G", "stride_x", "stride_y"]
    signature |= {name: "i32" for name in ("M", "N", "D", "stride_G", "stride_x", "stride_y")}
    constants = {"UPCAST": False, **options}
    compiled = compile_for(triton._products_kernel, signature, constants, arch, num_warps=warps, num_stages=stages, aligned=aligned)
    compiled.assert_fits(product=True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_on_the_device(dtype):
    compare(1000, 777, 640, dtype, None, 3, False, "cuda")
    compare(300, 5000, 48, dtype, "positive", -7, True, "cuda")
    compare(5000, 4700, 512, dtype, "exclude", None, False, "cuda")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_the_device_captured_and_repeatable():
    x, y = (torch.randn(600, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scale = torch.tensor(5.0, device="cuda")
    first = sigmoid_forward(x, y, scale, needs=[True] * 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sigmoid_forward(x, y, scale, needs=[True] * 4)
    graph.replay()
    for a, b in zip(first, captured, strict=True):
        assert torch.equal(a, b)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_the_device_beyond_32_bits():
    """M * N > 2^31, and a bounded workspace: the same rows repeated give the loss of one, many times over."""
    x = F.normalize(torch.randn(48, 64, device="cuda"), dim=1).bfloat16().repeat(1024, 1)
    with forbid_large_tensors(len(x) ** 2 // 32):
        loss = pairwise_sigmoid(x, x, 10.0, -10.0, offset=None)
    one = pairwise_sigmoid(x[:48].double(), x[:48].double(), 10.0, -10.0, offset=None, impl="reference")
    assert float(loss) == pytest.approx(float(one) * 1024**2, rel=1e-5)
