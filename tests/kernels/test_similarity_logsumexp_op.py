"""similarity_logsumexp as a citizen of PyTorch: registration, compilation, autocast, meta tensors, refusals."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastvlp_kernels._testing import error
from fastvlp_kernels.similarity_logsumexp import similarity_logsumexp


def features(M: int = 9, N: int = 13, D: int = 6, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(F.normalize(torch.randn(size, D, generator=random), dim=1).to(dtype).requires_grad_() for size in (M, N))


def ids(M: int = 9, N: int = 13) -> dict[str, torch.Tensor]:
    return {"row_ids": torch.arange(M) % 4 - 1, "col_ids": torch.arange(N) % 5 - 1}


@pytest.mark.parametrize("mode,stash_bytes", [(None, 0), (None, 1 << 20), ("both", 0), ("sums", 0)])
def test_opcheck(mode, stash_bytes):
    x, y = features()
    scale = torch.tensor(7.0, requires_grad=True)
    vectors = [torch.randn(size, requires_grad=True) for size in (9, 13, 9, 13)]
    pairs = list(ids().values()) if mode else [None, None]
    inputs = (x, y, scale, *(vectors if mode else [None] * 4), *pairs, mode or "exclude", 2, torch.float32, "cpu")
    forward, backward = torch.ops.fastvlp.similarity_logsumexp, torch.ops.fastvlp.similarity_logsumexp_backward
    torch.library.opcheck(forward.default, (*inputs, stash_bytes))
    *results, stash = (r.detach() for r in forward(*inputs, stash_bytes))
    assert bool(stash.numel()) == bool(stash_bytes)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    grads = [torch.randn_like(r) if r.numel() else None for r in (*results[1:8:2], results[8])]
    needs = [True, True, True, *[mode is not None] * 4]
    torch.library.opcheck(backward.default, (grads, *plain, results, stash, needs))


@pytest.mark.parametrize(
    "options", [{"offset": 1}, {"ids": "both"}, {"ids": "sums"}, {"ids": "only", "offset": 0}, {"prefixes": (20, 32)}], ids=str
)
def test_a_stash_of_any_size_changes_no_bit(options):
    """No tile, some and all of them; twice from one graph."""
    x, y = features(700, 90, 32)
    scale, bias = torch.tensor(40.0, requires_grad=True), torch.randn(90, requires_grad=True)
    pairs = ids(700, 90) if "ids" in options else {}
    inputs = (x, y, scale, bias)
    found = []
    for stash_bytes in (0, 100_000, 1 << 30):
        results = similarity_logsumexp(x, y, scale, col_bias=bias, **pairs, **options, stash_bytes=stash_bytes)
        value = sum(torch.where(r.isfinite(), r, 0.0).square().sum() for r in results)
        found += [torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2)]
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_a_stash_keeps_within_its_bytes_and_is_not_made_where_nothing_needs_a_gradient():
    x, y = features(700, 90, 32)

    def kept(stash_bytes):
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            similarity_logsumexp(x, y, 3.0, stash_bytes=stash_bytes)
        return sum(saved.values())

    plain = kept(0)
    assert 0 < kept(100_000) - plain <= 100_000
    assert 4 * 700 * 90 <= kept(1 << 30) - plain <= 1.2 * 4 * 700 * 90
    with torch.no_grad():
        assert kept(1 << 30) == 0
    x, y = x.detach(), y.detach()
    assert kept(1 << 30) == 0


@pytest.mark.parametrize(
    "options", [{"offset": 1, "stash_bytes": 1 << 20}, {"ids": "both"}, {"ids": "sums", "prefixes": (2, 6)}], ids=str
)
def test_compiles_without_graph_breaks(options):
    torch._dynamo.reset()  # the cases share one function, whose recompilations are limited
    x, y = features()
    options = {**options, **(ids() if "ids" in options else {})}
    scale = torch.tensor([5.0], requires_grad=True)

    def loss(x, y, scale):
        return sum(torch.where(r.isfinite(), r, 0.0).square().sum() for r in similarity_logsumexp(x, y, scale, **options))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(x, y, scale), (x, y, scale))
    for mine, other in zip(torch.autograd.grad(compiled(x, y, scale), (x, y, scale)), want, strict=True):
        torch.testing.assert_close(mine, other)
    locked = torch.autograd.grad(compiled(x.detach(), y, scale), (y,))
    torch.testing.assert_close(locked[0], want[1])


def test_autocast_rounds_operands_only():
    """Products of bfloat16 operands; gradients of float32 features stay float32 and are not rounded on their way."""
    x, y = features(40, 50, 32)
    scale = torch.tensor(30.0, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        row, col = similarity_logsumexp(x, y, scale)
    assert row.dtype == col.dtype == torch.float32
    asked = similarity_logsumexp(x, y, scale, compute_dtype=torch.bfloat16)
    assert torch.equal(row, asked[0]) and torch.equal(col, asked[1])
    grads = torch.autograd.grad(row.sum() + col.sum(), (x, y, scale))
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(sum(r.sum() for r in similarity_logsumexp(x, y, scale)), (x, y, scale))
    assert all(torch.equal(one, other) for one, other in zip(grads, inside, strict=True))
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, y)]
    exact_scale = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    results = similarity_logsumexp(*rounded, exact_scale, impl="reference")
    exact = torch.autograd.grad(results[0].sum() + results[1].sum(), (*rounded, exact_scale))
    for mine, want in zip(grads, exact, strict=True):
        assert mine.dtype == torch.float32 and error(mine, want)[0] < 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity_logsumexp(x.double(), y.double())[0], similarity_logsumexp(x.double(), y.double(), impl="cpu")[0])


@pytest.mark.parametrize("mode", ["both", "sums"])
def test_meta_tensors(mode):
    x, y = (torch.empty(size, 8, device="meta", requires_grad=True) for size in (5, 7))
    pairs = {name: value.to("meta") for name, value in ids(5, 7).items()}
    results = similarity_logsumexp(x, y, 3.0, ids=mode, offset=0, **pairs)
    assert [tuple(r.shape) for r in results] == [(5,), (7,), (5,), (7,), (5,)]
    assert all(r.device.type == "meta" and r.dtype == torch.float32 for r in results)
    sum(r.sum() for r in results).backward()
    assert x.grad.shape == (5, 8) and y.grad.shape == (7, 8)


def test_second_derivatives_are_refused_by_name():
    x, y = features()
    row, _ = similarity_logsumexp(x, y, 3.0)
    (grad,) = torch.autograd.grad(row.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="similarity_logsumexp: second derivatives"):
        grad.sum().backward()
    row, _ = similarity_logsumexp(x, y, 3.0, impl="reference")
    (grad,) = torch.autograd.grad(row.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert y.grad.isfinite().all()


def test_dtensors_are_refused_by_name(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    x, y = features()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        distributed = DTensor.from_local(x.detach(), mesh, [Replicate()])
        scale = DTensor.from_local(torch.tensor(1.0), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"x is a DTensor.*x\.to_local\(\)"):
            similarity_logsumexp(distributed, y)
        with pytest.raises(TypeError, match=r"scale is a DTensor.*scale\.to_local\(\)"):
            similarity_logsumexp(x, y, scale)
    finally:
        dist.destroy_process_group()


X, Y = torch.ones(3, 4), torch.ones(5, 4)
REFUSED = [
    ((X, torch.ones(5, 6)), {}, ValueError, "x has width 4 and y has width 6"),
    ((X.long(), Y), {}, TypeError, "x is torch.int64; features must be floating point"),
    ((X, Y.bfloat16()), {}, TypeError, "x is torch.float32 and y is torch.bfloat16; cast one"),
    ((X[0], Y), {}, ValueError, r"x has shape \(4,\); it must be a matrix"),
    ((X, Y.to("meta")), {}, ValueError, "x is on cpu but y is on meta"),
    ((X[:0], Y), {}, ValueError, "x has 0 rows and y has 5; each must have at least 1"),
    ((X[:, :0], Y[:, :0]), {}, ValueError, "width 0"),
    ((X, Y, torch.ones(2)), {}, ValueError, r"scale has shape \(2,\)"),
    ((X, Y, "1"), {}, TypeError, "scale is str; it must be a number"),
    ((X, Y, torch.tensor(1)), {}, TypeError, "scale is a torch.int64 tensor"),
    ((X, Y), {"row_bias": torch.ones(5)}, ValueError, r"row_bias has shape \(5,\); it must have shape \(3,\)"),
    ((X, Y), {"col_scale": torch.ones(5).long()}, TypeError, "col_scale is torch.int64; it must be a floating-point"),
    ((X, Y), {"row_ids": torch.arange(3)}, ValueError, "col_ids is missing"),
    ((X, Y), {"row_ids": torch.ones(3), "col_ids": torch.ones(5)}, TypeError, "row_ids is torch.float32; it must be an integer"),
    ((X, Y), {"ids": "both"}, ValueError, "ids='both' needs row_ids and col_ids"),
    ((X, Y), {"ids": "sums"}, ValueError, "ids='sums' needs row_ids and col_ids"),
    ((X, Y), {"ids": "some"}, ValueError, "ids='some' is unknown; allowed: exclude, only, both, sums"),
    ((X, Y), {"offset": 1.5}, TypeError, "offset is float; it must be an int or None"),
    ((X, Y), {"prefixes": (2, 3)}, ValueError, r"prefixes=\[2, 3\]; they must increase strictly .* 4"),
    ((X, Y), {"prefixes": (2, 4), "row_scale": torch.ones(3)}, ValueError, r"with 2 prefixes it must have shape \(2, 3\)"),
    ((X, Y), {"compute_dtype": torch.int8}, TypeError, "compute_dtype=torch.int8; allowed"),
    ((X, Y), {"stash_bytes": -1}, ValueError, "stash_bytes=-1; it must be 0"),
    ((X, Y), {"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "kind", "message"), REFUSED, ids=[case[3][:30] for case in REFUSED])
def test_wrong_input_is_refused(args, options, kind, message):
    with pytest.raises(kind, match=message):
        similarity_logsumexp(*args, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run where there is a CUDA device")
def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: Triton "):
        similarity_logsumexp(X, Y, impl="triton")
    monkeypatch.setenv("FASTVLP_IMPL", "reference")
    assert torch.equal(similarity_logsumexp(X, Y)[0], similarity_logsumexp(X, Y, impl="reference")[0])
    monkeypatch.setenv("FASTVLP_IMPL", "fast")
    with pytest.raises(ValueError, match="FASTVLP_IMPL='fast' is unknown"):
        similarity_logsumexp(X, Y)
