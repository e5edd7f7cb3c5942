"""The Triton kernels of similarity_attend: interpreted on the CPU, and compiled for GPUs that are not here."""

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp_kernels._logsumexp import merge
from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors
from fastvlp_kernels.similarity_attend import Needs, ResultGrads, Results, attend_backward, attend_forward, similarity_attend
from fastvlp_kernels.similarity_attend.arguments import Inputs
from tests.kernels.aot import SHARED_LIMIT, Recorder
from tests.kernels.interpreter import in_a_process, interpreted

pytest.importorskip("triton", reason="Triton is not installed")

BIASES = ("row_bias", "col_bias")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Probabilities are rounded to the operands' dtype before their products, results once more after; the interpreter of Triton truncates to
# bfloat16 (a mean relative error of 2.7e-3 each time) where GPUs round.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def _problem(M: int, N: int, D: int, E: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    x, y, v = (torch.randn(size, generator=random) for size in ((M, D), (N, D), (N, E)))
    return [t.to(dtype).requires_grad_() for t in (F.normalize(x, dim=1), F.normalize(y, dim=1), v)]


def _eager(x: Tensor, y: Tensor, v: Tensor, scale: Tensor, row_bias=None, col_bias=None, counted=None) -> tuple[Tensor, Tensor]:
    """Softmax of float32 logits (float64 for float64), everything between products rounded to their dtype."""
    S = ((scale.to(x.dtype) * x) @ y.T).to(torch.promote_types(x.dtype, torch.float32))
    S = S if row_bias is None else S + row_bias[:, None] + col_bias
    S = S if counted is None else S.masked_fill(~counted, -torch.inf)
    empty = (S == -torch.inf).all(1, keepdim=True)
    return S.masked_fill(empty, 0.0).softmax(1).masked_fill(empty, 0.0).to(v.dtype) @ v, S.logsumexp(1)


def _compare(
    leaves: list[Tensor], ids: str = "", used: tuple[int, ...] = (0, 1), weight: float = 1.0, tol: float = 1e-5, device: str = "cpu"
) -> None:
    """Results and gradients on ``device`` are no worse than eager's in the same dtype: x, y, v, scale and perhaps biases."""
    M, N, options, counted = len(leaves[0]), len(leaves[1]), {}, None
    if ids:
        row_ids, col_ids = torch.arange(M, device=device) % 90 - 1, torch.arange(N, device=device) % 80 - 1
        options = {"ids": ids, "row_ids": row_ids, "col_ids": col_ids}
        same = (row_ids[:, None] == col_ids) & (row_ids[:, None] >= 0)
        counted = same if ids == "only" else ~same
    kinds = []
    for kind in ("ours", "eager", "exact"):
        inputs = [(t.double() if kind == "exact" else t).detach().to(device).requires_grad_(t.requires_grad) for t in leaves]
        if kind == "ours":
            results = similarity_attend(*inputs[:4], **dict(zip(BIASES, inputs[4:], strict=False)), impl="triton", **options)
        else:
            results = _eager(*inputs, counted=counted)
        random = torch.Generator().manual_seed(1)
        upstream = [torch.randn(r.shape, generator=random).bfloat16().double().to(device) * weight for r in results]
        parts = [(torch.where(r.isfinite(), r, 0.0).double() * g).sum() for r, g in zip(results, upstream, strict=True)]
        wanted = [t for t in inputs if t.requires_grad]
        kinds.append([*results, *torch.autograd.grad(sum(parts[k] for k in used), wanted, materialize_grads=True)])
    names = ("out", "lse", *(name for name, t in zip(("x", "y", "v", "scale", *BIASES), leaves, strict=False) if t.requires_grad))
    for name, *three in zip(names, *kinds, strict=True):
        rounding = ROUNDING[leaves[0].dtype] if name in ("out", "x", "y", "v") else 0.0
        assert_no_worse_than(*three, (2e-6 if name == "lse" else tol) + rounding, name)


def kernels_against_float64(dtype_name: str, device: str = "cpu") -> None:
    """Blocks as they run on a GPU, several waves, odd sizes, uninitialised memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    compare = partial(_compare, device=device)
    leaves = _problem(300, 207, 72, 150, DTYPES[dtype_name])
    scale = torch.tensor([20.0], requires_grad=True)
    random = torch.Generator().manual_seed(3)
    biases = [torch.randn(n, generator=random).requires_grad_() for n in (300, 207)]
    for mode in {"float32": ("exclude", "only"), "bfloat16": ("exclude",), "float16": ("only",)}[dtype_name]:
        compare([*leaves, scale, *biases], ids=mode)
    x, y, v = (t[:70].detach().T.contiguous().T.requires_grad_() for t in leaves)
    for used in ((0,), (1,)):
        compare([x.detach(), y, v, scale], used=used)
        compare([x, y.detach(), v.detach(), scale.detach()], used=used)
        compare([x.detach(), y.detach(), v.detach(), scale, *(b[:70].detach().requires_grad_() for b in biases)], used=used)
    compare([x.detach(), y.detach(), v, scale.detach()], used=(0,))
    compare([*(t[:1, :1].detach().requires_grad_() for t in (x, y, v)), scale])


def extreme_logits() -> None:
    """Rows near -100 beside rows near +100, and rows whose tiles lie far apart, so that references differ and tiles are shifted."""
    for dtype in DTYPES.values():
        x, y, v = (t.detach().float() for t in _problem(140, 300, 24, 40, dtype))
        direction = F.normalize(torch.ones(24), dim=0)
        x = F.normalize(0.05 * x + torch.where(torch.arange(140)[:, None] < 70, -direction, direction), dim=1)
        y = F.normalize(0.05 * y + torch.where(torch.arange(300)[:, None] < 140, -direction, direction), dim=1)
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, v)]
        _compare([*leaves, torch.tensor(100.0, requires_grad=True)], tol=2e-5)
    # The mean over a batch of 65,536 in float16.
    _compare([*_problem(140, 150, 24, 40, torch.float16), torch.tensor(30.0, requires_grad=True)], used=(1,), weight=1 / 131072, tol=2e-5)
    # Rows further apart than 2^31 elements; only the pages that are touched exist.
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1)).copy_(torch.randn(3, 64) / 8)
    out, lse = similarity_attend(far, far, far, 2.0, impl="triton")
    near = similarity_attend(far.clone(), far.clone(), far.clone(), 2.0, impl="triton")
    assert torch.equal(out, near[0]) and torch.equal(lse, near[1])
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        similarity_attend(x.double(), y.double(), v.double(), impl="triton")


def small_gradients_and_confident_rows() -> None:
    """Gradients of a mean over 65,536 rows do not underflow in float16, and the small rest of a nearly one-hot row survives."""
    x, y, v = (t.detach() for t in _problem(256, 256, 64, 32, torch.float32))
    x = F.normalize(y + 0.4 * x, dim=1)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = [t.to(dtype).float() for t in (x, y, v)] + [torch.tensor(16.0)]
        grads = []
        for kind in ("ours", "exact"):
            leaves = [t.to(torch.float32 if kind == "ours" else torch.float64).requires_grad_() for t in inputs]
            out, _ = similarity_attend(*leaves, compute_dtype=dtype, impl="triton") if kind == "ours" else _eager(*leaves)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16() / 2**24
            grads.append(torch.autograd.grad(out, leaves, upstream.to(out.dtype)))
        for mine, want in zip(*grads, strict=True):
            assert error(mine, want)[0] < {torch.float16: 2**-10, torch.bfloat16: 2**-6}[dtype]


def blocks_of_a_larger_matrix() -> None:
    """Gradients of blocks from merged results add up to those of the whole, also of the row bias, whose sums are then partial."""
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        x, y, v = (t.detach() for t in _problem(60, 90, 24, 40, dtype))
        row_bias = torch.randn(60, generator=torch.Generator().manual_seed(5))
        options, needs = {"scale": 9.0, "row_bias": row_bias}, Needs(row_bias=True)
        blocks = [slice(0, 35), slice(35, 90)]
        parts = [attend_forward(x, y[j], v[j], impl="triton", **options) for j in blocks]
        lse = merge(parts[0].lse, parts[1].lse)
        merged = Results(sum(part.out * lse.probability(part.lse.value())[:, None].float() for part in parts), lse)
        shapes = merged.out.shape, lse.log.shape
        upstream = ResultGrads(*(torch.randn(shape, generator=torch.Generator().manual_seed(6)).bfloat16().float() for shape in shapes))
        found = [attend_backward(upstream, merged, needs, x, y[j], v[j], impl="triton", **options) for j in blocks]
        mine = [found[0].x.float() + found[1].x.float(), *(torch.cat(pair) for pair in zip(*(part[1:3] for part in found), strict=True))]
        mine += [found[0].scale + found[1].scale, found[0].row_bias + found[1].row_bias]
        leaves = [t.double().requires_grad_() for t in (x, y, v, torch.tensor(9.0), row_bias)]
        results = similarity_attend(*leaves[:4], row_bias=leaves[4], impl="reference")
        for ours, want in zip(mine, torch.autograd.grad(results, leaves, [g.double() for g in upstream]), strict=True):
            assert error(ours, want)[0] < tol


def empty_rows_and_no_large_tensors() -> None:
    x, y, v = _problem(1152, 640, 16, 16, torch.bfloat16)
    row_bias = torch.zeros(1152).index_fill_(0, torch.arange(0, 1152, 7), -torch.inf)
    with forbid_large_tensors(1152 * 640 // 8):
        out, lse = similarity_attend(x, y, v, 10.0, row_bias=row_bias, impl="triton")
        torch.autograd.backward([out, lse], [torch.ones_like(out), torch.full_like(lse, torch.nan).masked_fill(lse.isfinite(), 1.0)])
    assert out[::7].abs().max() == 0 and (lse[::7] == -torch.inf).all() and x.grad[::7].abs().max() == 0
    assert x.grad.isfinite().all() and y.grad.isfinite().all() and v.grad.isfinite().all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_interpreted(dtype):
    interpreted(kernels_against_float64, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_on_the_device(dtype):
    """In a process of its own, because it turns determinism on, for which cuBLAS needs a setting from the start."""
    in_a_process(kernels_against_float64, dtype, "cuda", CUBLAS_WORKSPACE_CONFIG=":4096:8")


def extremes() -> None:
    extreme_logits()
    small_gradients_and_confident_rows()
    blocks_of_a_larger_matrix()
    empty_rows_and_no_large_tensors()


def test_interpreted_extremes():
    interpreted(extremes)


def _launches(monkeypatch: pytest.MonkeyPatch, arch: int, dtype: torch.dtype, everything: bool) -> dict[str, Recorder]:
    """The launches of a forward and a backward at M = 4096, N = 2048, not run."""
    module, product = import_module("fastvlp_kernels.similarity_attend.triton"), import_module("fastvlp_kernels._product")
    names = dict.fromkeys(("_forward_kernel", "_merge_kernel", "_align_kernel", "_backward_kernel"), module) | {"_product_kernel": product}
    recorders = {name: Recorder(getattr(where, name)) for name, where in names.items()}
    for name, where in names.items():
        monkeypatch.setattr(where, name, recorders[name])
    monkeypatch.setattr(module, "architecture", lambda device: arch // 10)
    M, N = 4096, 2048
    x, y, v = (torch.zeros(size, dtype=dtype) for size in ((M, 640), (N, 640), (N, 1152)))
    biases = [torch.zeros(n) if everything else None for n in (M, N)]
    ids = [torch.zeros(n, dtype=torch.int64) if everything else None for n in (M, N)]
    inputs = Inputs(x, y, v, torch.ones(()), *biases, *ids, "exclude", dtype)
    results = module.forward(inputs)
    module.backward(ResultGrads(torch.ones(M, 1152), torch.ones(M)), inputs, results, Needs(*[True] * 4, everything, everything), True)
    return recorders


@pytest.mark.parametrize(
    ("arch", "dtype", "everything"), [*((arch, "bfloat16", True) for arch in SHARED_LIMIT), (90, "bfloat16", False), (90, "float32", False)]
)
def test_compiled_ahead_of_time(arch, dtype, everything, monkeypatch):
    recorders = _launches(monkeypatch, arch, DTYPES[dtype], everything)
    for name in ("_forward_kernel", "_backward_kernel"):
        recorders[name].compile(arch).assert_fits(product=dtype != "float32")
    for name in ("_merge_kernel", "_align_kernel") if dtype == "float32" else ():
        recorders[name].compile(arch).assert_fits()
