"""similarity_attend as a citizen of PyTorch: registration, compilation, autocast, meta tensors, refusals."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastvlp_kernels._testing import error
from fastvlp_kernels.similarity_attend import similarity_attend


def features(M: int = 9, N: int = 13, D: int = 6, E: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(size, D, generator=random), dim=1) for size in (M, N))
    return x.requires_grad_(), y.requires_grad_(), torch.randn(N, E, generator=random).requires_grad_()


def ids(M: int = 9, N: int = 13) -> dict[str, torch.Tensor]:
    return {"row_ids": torch.arange(M) % 4 - 1, "col_ids": torch.arange(N) % 5 - 1}


@pytest.mark.parametrize("mode", [None, "only"])
def test_opcheck(mode):
    x, y, v = features()
    scale = torch.tensor(7.0, requires_grad=True)
    biases = [torch.randn(size, requires_grad=True) for size in (9, 13)] if mode else [None, None]
    pairs = list(ids().values()) if mode else [None, None]
    inputs = (x, y, v, scale, *biases, *pairs, mode or "exclude", torch.float32, "cpu")
    forward, backward = torch.ops.fastvlp.similarity_attend, torch.ops.fastvlp.similarity_attend_backward
    torch.library.opcheck(forward.default, inputs)
    results = [r.detach() for r in forward(*inputs)]
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    needs = [True, True, True, True, mode is not None, mode is not None]
    for grads in ([torch.randn_like(r) for r in results[:2]], [None, torch.randn_like(results[1])]):
        torch.library.opcheck(backward.default, (grads, *plain, results, needs, grads[0] is not None))


@pytest.mark.parametrize("options", [{}, {"ids": "only"}], ids=str)
def test_compiles_without_graph_breaks(options):
    x, y, v = features()
    options = {**options, **(ids() if "ids" in options else {})}
    scale = torch.tensor([5.0], requires_grad=True)

    def loss(x, y, v, scale):
        out, lse = similarity_attend(x, y, v, scale, **options)
        return out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(x, y, v, scale), (x, y, v, scale))
    for mine, other in zip(torch.autograd.grad(compiled(x, y, v, scale), (x, y, v, scale)), want, strict=True):
        torch.testing.assert_close(mine, other)
    locked = torch.autograd.grad(compiled(x.detach(), y, v.detach(), scale), (y,))
    torch.testing.assert_close(locked[0], want[1])


def test_autocast_rounds_operands_only():
    """Products of bfloat16 operands; gradients of float32 features stay float32 and are not rounded on their way."""
    x, y, v = features(40, 50, 32, 24)
    scale = torch.tensor(30.0, requires_grad=True)
    leaves = (x, y, v, scale)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = similarity_attend(*leaves)
        inside = torch.autograd.grad(sum(r.square().sum() for r in similarity_attend(*leaves)), leaves)
    assert out.dtype == lse.dtype == torch.float32
    asked = similarity_attend(*leaves, compute_dtype=torch.bfloat16)
    assert torch.equal(out, asked[0]) and torch.equal(lse, asked[1])
    grads = torch.autograd.grad(out.square().sum() + lse.square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(grads, inside, strict=True))
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, y, v)] + [scale.detach().double().requires_grad_()]
    results = similarity_attend(*rounded, impl="reference")
    exact = torch.autograd.grad(sum(r.square().sum() for r in results), rounded)
    for mine, want in zip(grads, exact, strict=True):
        assert mine.dtype == torch.float32 and error(mine, want)[0] < 2e-6
    doubles = [t.double() for t in (x, y, v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity_attend(*doubles)[0], similarity_attend(*doubles, impl="cpu")[0])


def test_meta_tensors():
    x, y, v = (torch.empty(size, device="meta", requires_grad=True) for size in ((5, 8), (7, 8), (7, 3)))
    out, lse = similarity_attend(x, y, v, 3.0, ids="only", **{name: value.to("meta") for name, value in ids(5, 7).items()})
    assert out.shape == (5, 3) and lse.shape == (5,)
    assert out.device.type == lse.device.type == "meta" and out.dtype == lse.dtype == torch.float32
    (out.sum() + lse.sum()).backward()
    assert x.grad.shape == (5, 8) and y.grad.shape == (7, 8) and v.grad.shape == (7, 3)


def test_undefined_gradients_count_as_zero():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    leaves = features()
    out, lse = similarity_attend(*leaves, 3.0)
    alone = torch.autograd.grad(lse.sum(), leaves, retain_graph=True)
    assert alone[2].abs().max() == 0
    stopped = torch.autograd.grad(Stop.apply(out).sum() + lse.sum(), leaves, retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(stopped, alone, strict=True))
    nothing = torch.autograd.grad(Stop.apply(out).sum() + Stop.apply(lse).sum(), leaves, allow_unused=True)
    assert all(grad is None or grad.abs().max() == 0 for grad in nothing)
    x, y, v = leaves
    lse = similarity_attend(x.detach(), y.detach(), v, 3.0)[1]
    assert torch.autograd.grad(lse.sum(), v, allow_unused=True) == (None,)


def test_second_derivatives_are_refused_by_name():
    x, y, v = features()
    out, _ = similarity_attend(x, y, v, 3.0)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="similarity_attend: second derivatives"):
        grad.sum().backward()
    out, lse = similarity_attend(x, y, v, 3.0, impl="reference")
    (grad,) = torch.autograd.grad(out.square().sum() + lse.sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert y.grad.isfinite().all() and v.grad.abs().max() > 0


def test_dtensors_are_refused_by_name(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    x, y, v = (t.detach() for t in features())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("x", "v"):
            given = {"x": x, "y": y, "v": v}
            given[name] = DTensor.from_local(given[name], mesh, [Replicate()])
            with pytest.raises(TypeError, match=rf"{name} is a DTensor.*{name}\.to_local\(\)"):
                similarity_attend(**given)
    finally:
        dist.destroy_process_group()


X, Y, V = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5, 2)
REFUSED = [
    ((X, torch.ones(5, 6), V), {}, ValueError, "x has width 4 and y has width 6"),
    ((X.long(), Y, V), {}, TypeError, "x is torch.int64; features must be floating point"),
    ((X, Y, V.bfloat16()), {}, TypeError, "v is torch.bfloat16 and x is torch.float32; cast one"),
    ((X, Y, V[:4]), {}, ValueError, r"v has shape \(4, 2\); it must be \[5, width\]"),
    ((X, Y, V[:, 0]), {}, ValueError, r"v has shape \(5,\); it must be \[5, width\]"),
    ((X, Y, V[:, :0]), {}, ValueError, r"v has shape \(5, 0\)"),
    ((X, Y, V.to("meta")), {}, ValueError, "x is on cpu but v is on meta"),
    ((X[:0], Y, V), {}, ValueError, "x has 0 rows and y has 5; each must have at least 1"),
    ((X, Y, V, torch.ones(2)), {}, ValueError, r"scale has shape \(2,\)"),
    ((X, Y, V), {"row_bias": torch.ones(5)}, ValueError, r"row_bias has shape \(5,\); it must have shape \(3,\)"),
    ((X, Y, V), {"row_ids": torch.arange(3)}, ValueError, "col_ids is missing"),
    ((X, Y, V), {"row_ids": torch.ones(3), "col_ids": torch.ones(5)}, TypeError, "row_ids is torch.float32; it must be an integer"),
    ((X, Y, V), {"ids": "only"}, ValueError, "ids='only' needs row_ids and col_ids"),
    ((X, Y, V), {"ids": "both"}, ValueError, "ids='both' is unknown; allowed: exclude, only"),
    ((X, Y, V), {"compute_dtype": torch.int8}, TypeError, "compute_dtype=torch.int8; allowed"),
    ((X, Y, V), {"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "kind", "message"), REFUSED, ids=[case[3][:30] for case in REFUSED])
def test_wrong_input_is_refused(args, options, kind, message):
    with pytest.raises(kind, match=message):
        similarity_attend(*args, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run where there is a CUDA device")
def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: Triton "):
        similarity_attend(X, Y, V, impl="triton")
    monkeypatch.setenv("FASTVLP_IMPL", "reference")
    assert torch.equal(similarity_attend(X, Y, V)[0], similarity_attend(X, Y, V, impl="reference")[0])
