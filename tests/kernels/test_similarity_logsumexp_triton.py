"""The Triton kernels of similarity_logsumexp: interpreted on the CPU, and compiled for GPUs that are not here."""

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp_kernels._testing import error, forbid_large_tensors
from fastvlp_kernels.similarity_logsumexp import ResultGrads, similarity_logsumexp
from fastvlp_kernels.similarity_logsumexp.arguments import Inputs, Needs
from tests.kernels.aot import SHARED_LIMIT, Recorder
from tests.kernels.interpreter import in_a_process, interpreted

pytest.importorskip("triton", reason="Triton is not installed")

VECTORS = ("row_bias", "col_bias", "row_scale", "col_scale")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _features(M: int, N: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(size, D, generator=random), dim=1) for size in (M, N))


def _compare(
    leaves: list[Tensor], weight: float = 1.0, used: tuple[int, ...] = (0, 1, 2, 3, 4), tol: float = 1e-5, device: str = "cpu", **options
) -> None:
    """Results and gradients of the kernels on ``device`` against the dense reference in float64 on the same (rounded) inputs."""
    dtype = options.get("compute_dtype") or leaves[0].dtype
    vectors = [options.pop(name) for name in VECTORS if name in options]
    names = VECTORS[: len(vectors)]
    kinds = []
    for kind in ("triton", "reference"):
        exact = kind == "reference"
        inputs = [(t.double() if exact else t).detach().to(device) for t in (*leaves, *vectors)]
        if exact:
            inputs[:2] = [t.to(dtype).double() for t in inputs[:2]]
        inputs = [t.requires_grad_(old.requires_grad) for t, old in zip(inputs, (*leaves, *vectors), strict=True)]
        rest = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        rest |= {"compute_dtype": None} if exact else {}
        results = similarity_logsumexp(*inputs[:3], impl=kind, **dict(zip(names, inputs[3:], strict=True)), **rest)
        random = torch.Generator().manual_seed(1)
        parts = [(torch.where(r.isfinite(), r, 0.0).double() * torch.randn(r.shape, generator=random).to(device)).sum() for r in results]
        total = weight * sum(part for k, part in enumerate(parts) if k in used)
        wanted = [t for t in inputs if t.requires_grad]
        kinds.append((results, torch.autograd.grad(total, wanted)))
    for mine, want in zip(kinds[0][0], kinds[1][0], strict=True):
        there = want.isfinite()
        assert torch.equal(there, mine.isfinite())
        assert mine.dtype == torch.float32 and max(error(mine[there], want[there])) < 2e-6
    for mine, want in zip(kinds[0][1], kinds[1][1], strict=True):
        # Coefficients are rounded to the operands' dtype before their products, features' gradients once more after; the
        # interpreter of Triton truncates to bfloat16 (a mean relative error of 2.7e-3 each time) where GPUs round.
        rounded = {torch.float32: tol, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
        # With a stash, the gradient of the scale comes out of those products too.
        assert error(mine, want)[0] < (tol if mine.ndim < 2 and not options.get("stash_bytes") else rounded)


def kernels_against_float64(dtype_name: str, device: str = "cpu") -> None:
    """Blocks as they run on a GPU, several waves, odd sizes, uninitialised memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    compare = partial(_compare, device=device)
    dtype = DTYPES[dtype_name]
    x, y = (t.to(dtype).requires_grad_() for t in _features(300, 207, 72))
    scale = torch.tensor([20.0], requires_grad=True)
    random = torch.Generator().manual_seed(3)
    sizes = dict(zip(VECTORS, (300, 207, 300, 207), strict=True))
    vectors = {name: (torch.rand(n, generator=random) + 0.5).requires_grad_() for name, n in sizes.items()}
    ids = {"row_ids": torch.arange(300) % 90 - 1, "col_ids": torch.arange(207) % 80 - 1}
    compare([x, y, scale], offset=0)
    compare([x, y, scale], offset=-40, ids="both", **vectors, **ids)
    compare([x, y, scale], offset=-40, ids="sums", **vectors, **ids)
    small = [t[:70].detach().T.contiguous().T.requires_grad_() for t in (x, y)]
    pairs = {name: value[:70] for name, value in ids.items()}
    for mode in ("exclude", "only"):
        compare([*small, scale], offset=150, ids=mode, **pairs, **{name: v[:70].detach().requires_grad_() for name, v in vectors.items()})
    for used in ((2,), (0, 3)):
        compare([*small, scale], used=used, ids="sums", **pairs)
    for used in ((0,), (1,)):
        compare([small[0].detach(), small[1], scale], used=used)
        compare([small[0], small[1].detach(), scale.detach()], used=used)
    compare([small[0].detach(), small[1].detach(), scale])
    # A stash of some of the tiles and of all, with and without positives, and for one side or for both.
    for stash_bytes in (40_000, 1 << 20):
        compare([x, y, scale], offset=-40, stash_bytes=stash_bytes)
        compare([x.detach(), y, scale], stash_bytes=stash_bytes)
        compare([x, y.detach(), scale.detach()], offset=3, used=(0, 2), stash_bytes=stash_bytes)
    one = [t[:1, :1].detach().requires_grad_() for t in small]
    compare([*one, scale.detach()], offset=0)


def extreme_logits() -> None:
    direction = F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(4)), dim=0)
    x, y = _features(140, 150, 24)
    x = F.normalize(0.05 * x + torch.where(torch.arange(140)[:, None] < 70, -direction, direction), dim=1).requires_grad_()
    y = F.normalize(0.05 * y + direction, dim=1).requires_grad_()
    _compare([x, y, torch.tensor(100.0, requires_grad=True)], offset=0, tol=2e-5)
    # Some tiles of rows that are far apart have no common maximum, and are not kept.
    _compare([x, y, torch.tensor(100.0, requires_grad=True)], offset=0, compute_dtype=torch.bfloat16, stash_bytes=1 << 20)
    # The mean over a batch of 65,536 with float16 products.
    _compare([x, y, torch.tensor(30.0, requires_grad=True)], weight=1 / 131072, offset=0, compute_dtype=torch.float16, tol=2e-5)
    # Rows further apart than 2^31 elements; only the pages that are touched exist.
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1)).copy_(torch.randn(3, 64) / 8)
    row, _ = similarity_logsumexp(far, far, 2.0, impl="triton")
    assert torch.equal(row, similarity_logsumexp(far.clone(), far.clone(), 2.0, impl="triton")[0])
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        similarity_logsumexp(x.double(), y.double(), impl="triton")


def confident_pairs() -> None:
    x, y = _features(256, 256, 64)
    x = F.normalize(y + 0.5 * x, dim=1)
    grads = []
    kinds = ((torch.bfloat16, "triton", 0), (torch.bfloat16, "triton", 1 << 20), (torch.float64, "reference", 0))
    for dtype, impl, stash_bytes in kinds:
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (x, y)] + [torch.tensor(14.0, requires_grad=True)]
        row, col, positive = similarity_logsumexp(*leaves, offset=0, impl=impl, stash_bytes=stash_bytes)
        loss = (row + col - 2 * positive).mean() / 2
        assert float(loss.detach()) < 0.01
        grads.append(torch.autograd.grad(loss, leaves))
    for found in grads[:2]:
        for mine, want in zip(found, grads[2], strict=True):
            assert error(mine, want)[0] < 2**-7


def no_large_tensors() -> None:
    x, y = (t.bfloat16().requires_grad_() for t in _features(1280, 1280, 16))
    with forbid_large_tensors(1280 * 1280 // 8):
        row, col, positive = similarity_logsumexp(x, y, 10.0, offset=0, impl="triton")
        (row + col - positive).sum().backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_interpreted(dtype):
    interpreted(kernels_against_float64, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_on_the_device(dtype):
    """In a process of its own, because it turns determinism on, for which cuBLAS needs a setting from the start."""
    in_a_process(kernels_against_float64, dtype, "cuda", CUBLAS_WORKSPACE_CONFIG=":4096:8")


def test_interpreted_extremes():
    interpreted(extreme_logits)


def test_interpreted_memory_and_cancellation():
    interpreted(confident_pairs)
    interpreted(no_large_tensors)


def test_products_of_float32_obey_pytorch():
    from fastvlp_kernels._triton import precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


CASES = {
    "clip": {"offset": 0},
    "ids": {"offset": 0, "ids": "exclude"},
    "both": {"offset": 0, "ids": "both"},
    "sums": {"ids": "sums"},
    "vectors": {"offset": 0, "vectors": True},
    "everything": {"offset": 0, "ids": "both", "vectors": True},
    "stash": {"offset": 0, "stash_bytes": 1 << 30},
}


def _launches(monkeypatch: pytest.MonkeyPatch, arch: int, dtype: torch.dtype, width: int, case: dict) -> dict[str, Recorder]:
    """The launches of a forward and a backward at M = 4096, N = 2048, not run."""
    module, product = import_module("fastvlp_kernels.similarity_logsumexp.triton"), import_module("fastvlp_kernels._product")
    names = dict.fromkeys(("_forward_kernel", "merge_kernel", "own_kernel", "_backward_kernel", "stashed_kernel"), module)
    names |= {"_product_kernel": product}
    recorders = {name: Recorder(getattr(where, name)) for name, where in names.items()}
    for name, where in names.items():
        monkeypatch.setattr(where, name, recorders[name])
    tile = import_module("fastvlp_kernels.similarity_logsumexp.triton_tile")
    monkeypatch.setattr(tile, "architecture", lambda device: arch // 10)
    M, N = 4096, 2048
    x, y = torch.zeros(M, width, dtype=dtype), torch.zeros(N, width, dtype=dtype)
    sides = [(torch.zeros(n), torch.ones(n)) for n in (M, N)] if "vectors" in case else [(None, None)] * 2
    pairs = [torch.zeros(n, dtype=torch.int64) if "ids" in case else None for n in (M, N)]
    about = (*pairs, case.get("ids", "exclude"), case.get("offset"), dtype)
    inputs = Inputs(x, y, torch.ones(()), sides[0][0], sides[1][0], sides[0][1], sides[1][1], *about)
    shape = import_module("fastvlp_kernels.similarity_logsumexp.triton_stash").stash_shape
    stash = torch.zeros(shape(inputs, case.get("stash_bytes", 0)), dtype=dtype)
    results = module.forward(inputs, stash)
    given = [*(part.log for part in results[:4]), results.positive]
    grads = ResultGrads(*(torch.ones(len(r), dtype=torch.float32) if r.numel() else None for r in given))
    module.backward(grads, inputs, results, Needs(*[True] * 3, *["vectors" in case] * 4), stash)
    return recorders


# float16 compiles to what bfloat16 does; on Ampere, cases with the tiles of another one that takes more registers are left out.
@pytest.mark.parametrize(
    ("arch", "dtype", "case"),
    [*((arch, "bfloat16", case) for arch in SHARED_LIMIT for case in CASES if arch > 80 or case in ("both", "stash", "everything"))]
    + [(arch, "float32", "clip") for arch in SHARED_LIMIT],
)
def test_compiled_ahead_of_time(arch, dtype, case, monkeypatch):
    recorders = _launches(monkeypatch, arch, DTYPES[dtype], 512, CASES[case])
    for name in ("_forward_kernel", "stashed_kernel" if case == "stash" else "_backward_kernel"):
        recorders[name].compile(arch).assert_fits(product=dtype != "float32")
    for name in ["merge_kernel", "own_kernel"] if dtype == "float32" else ["own_kernel"] if case == "everything" else []:
        recorders[name].compile(arch).assert_fits()


@pytest.mark.parametrize(
    ("arch", "width", "case"), [*((arch, 512, "clip") for arch in SHARED_LIMIT), (90, 640, "stash"), (100, 640, "stash")]
)
def test_products_compiled_ahead_of_time(arch, width, case, monkeypatch):
    recorder = _launches(monkeypatch, arch, torch.bfloat16, width, CASES[case])["_product_kernel"]
    # One wave: into the gradient of x; into the sum for y at first, in the middle, at last.
    for launch in (0, 1, 3, -1):
        recorder.compile(arch, launch).assert_fits(product=True)
