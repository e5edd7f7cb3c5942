"""pairwise_sigmoid as an operator of PyTorch: gradients only where needed, compile, autocast, meta, refusals."""

import pytest
import torch
import torch.nn.functional as F

from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid, sigmoid_forward

NAMES = ("row_bias", "col_bias", "row_weight", "col_weight")


def features(M: int = 9, N: int = 7, D: int = 5, dtype: torch.dtype = torch.float32):
    random = torch.Generator().manual_seed(0)
    return tuple(F.normalize(torch.randn(size, D, generator=random), dim=1).to(dtype).requires_grad_() for size in (M, N))


def recorded(function) -> list[tuple[int, ...]]:
    """Shapes of the results of the matrix products that ``function`` runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                shapes.append(tuple(result.shape))
            return result

    from fastvlp_kernels.pairwise_sigmoid import cpu

    inner = cpu.forward

    def forward(*args):
        with Recorder():
            return inner(*args)

    cpu.forward = forward
    try:
        function()
    finally:
        cpu.forward = inner
    return shapes


@pytest.mark.parametrize("vectors", [False, True])
def test_opcheck(vectors):
    x, y = features()
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (3.0, -1.0))
    extra = [torch.randn(n, requires_grad=True) for n in (9, 7, 9, 7)] if vectors else [None] * 4
    ids = [torch.arange(9) % 3, torch.arange(7) % 4] if vectors else [None] * 2
    needs = [True] * 4 + [vectors] * 4
    args = (x, y, scale, bias, *extra, *ids, False, 1, torch.float32, 0.25, needs, "cpu")
    torch.library.opcheck(torch.ops.fastvlp.pairwise_sigmoid.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(x, y, scale, bias):
        return pairwise_sigmoid(x, y, scale.exp(), bias, offset=1, factor=1 / x.shape[0])

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for M in (9, 12):
        leaves = [*features(M), torch.tensor([1.0], requires_grad=True), torch.tensor(-1.0, requires_grad=True)]
        want = torch.autograd.grad(f(*leaves), leaves)
        for ours, exact in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=0)


def test_only_what_is_needed():
    x, y = features()
    product, dx, dy = (9, 7), (9, 5), (7, 5)
    scale = torch.tensor(3.0, requires_grad=True)
    with torch.no_grad():
        assert recorded(lambda: pairwise_sigmoid(x, y, scale)) == [product]
    assert recorded(lambda: pairwise_sigmoid(x.detach(), y.detach(), 3.0)) == [product]
    assert recorded(lambda: pairwise_sigmoid(x, y.detach(), scale)) == [product, dx]
    assert recorded(lambda: pairwise_sigmoid(x.detach(), y, scale)) == [product, dy]
    assert recorded(lambda: pairwise_sigmoid(x.detach(), y.detach(), 3.0, scale)) == [product]
    assert recorded(lambda: pairwise_sigmoid(x, y, scale, scale)) == [product, dx, dy]


@pytest.mark.parametrize("which", range(8))
def test_one_gradient_alone(which):
    """Each gradient by itself is the one that comes with the others."""
    x, y = (t.detach() for t in features())
    leaves = [x, y, torch.tensor(3.0), torch.tensor(-1.0), *(torch.rand(n) for n in (9, 7, 9, 7))]
    vectors = dict(zip(NAMES, leaves[4:], strict=True))
    whole = sigmoid_forward(*leaves[:4], **vectors, needs=[True] * 8)
    alone = sigmoid_forward(*leaves[:4], **vectors, needs=[i == which for i in range(8)])
    torch.testing.assert_close(alone[1 + which], whole[1 + which])
    assert all(part.numel() == 0 for i, part in enumerate(alone[1:]) if i != which)
    leaves[which].requires_grad_()
    loss = pairwise_sigmoid(*leaves[:4], **vectors)
    assert torch.equal(torch.autograd.grad(loss, leaves[which])[0], alone[1 + which])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalars_get_gradients_in_their_own_shape(shape, dtype):
    x, y = features()
    scale, bias = (torch.full(shape, value, dtype=dtype, requires_grad=True) for value in (3.0, -1.0))
    pairwise_sigmoid(x, y, scale, bias).backward()
    numbers = pairwise_sigmoid(x, y, 3.0, -1.0)
    unit = sigmoid_forward(x.detach(), y.detach(), 3.0, -1.0, needs=[True] * 4)
    assert torch.equal(unit.loss, numbers.detach())
    for leaf, want in ((scale, unit.scale), (bias, unit.bias)):
        assert leaf.grad.shape == shape and leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.reshape(()), want.to(dtype))


def test_upstream_gradient_and_grad_scaler():
    x, y = features(dtype=torch.float16)
    loss = pairwise_sigmoid(x, y, 10.0) / 9
    unscaled = torch.autograd.grad(loss, (x, y), retain_graph=True)
    scaled = torch.autograd.grad(loss * 65536 / 1024, (x, y), retain_graph=True)
    again = torch.autograd.grad(loss, (x, y))
    for a, b, c in zip(unscaled, scaled, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(b.float() / 64, a.float(), rtol=2**-10, atol=2**-20)


def test_factor():
    """As if the sum were multiplied afterwards, whatever the upstream gradient; what a backward returned stays what it was."""
    leaves = [*features(dtype=torch.float64), *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))]
    plain, inside = pairwise_sigmoid(*leaves) / 9, pairwise_sigmoid(*leaves, factor=1 / 9)
    torch.testing.assert_close(inside, plain, rtol=1e-15, atol=0)
    want = torch.autograd.grad(plain, leaves)
    for upstream in (1.0, 3.0, 1.0):
        found = torch.autograd.grad(inside * upstream, leaves, retain_graph=True)
        for ours, exact in zip(found, want, strict=True):
            torch.testing.assert_close(ours, exact * upstream, rtol=1e-14, atol=1e-16)
    for _ in range(2):
        inside.backward(retain_graph=True)
    for leaf, exact in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * exact, rtol=1e-14, atol=1e-16)


def test_autocast():
    x, y = features()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pairwise_sigmoid(x, y, 10.0)
    assert loss.dtype == torch.float32
    by_hand = pairwise_sigmoid(x.bfloat16(), y.bfloat16(), 10.0)
    named = pairwise_sigmoid(x, y, 10.0, compute_dtype=torch.bfloat16)
    assert loss.item() == by_hand.item() == named.item() != pairwise_sigmoid(x, y, 10.0).item()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.dtype == torch.float32


def test_meta():
    x, y = (t.detach().to("meta").requires_grad_() for t in features())
    loss = pairwise_sigmoid(x, y, 10.0, impl="cpu")
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert x.grad.shape == x.shape and x.grad.device.type == "meta"


def test_no_bool_of_a_tensor_reaches_the_public_function():
    """Scale, bias and upstream gradient stay tensors: fake ones, which have no value, pass through forward and backward."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, y = torch.randn(9, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
        scale = torch.rand((), requires_grad=True)
        (pairwise_sigmoid(x, y, scale, torch.rand(1)) * torch.rand(())).backward()
        assert x.grad.shape == (9, 5) and scale.grad.shape == ()


@pytest.mark.parametrize("leaf", ["x", "scale"])
def test_second_derivatives_are_refused(leaf):
    x, y = features()
    scale = torch.tensor(3.0, requires_grad=True)
    wanted = {"x": x, "scale": scale}[leaf]
    (first,) = torch.autograd.grad(pairwise_sigmoid(x, y, scale), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="pairwise_sigmoid: second derivatives are not available; use impl='reference'"):
        first.sum().backward()
    (first,) = torch.autograd.grad(pairwise_sigmoid(x, y, scale, impl="reference"), wanted, create_graph=True)
    first.sum().backward()


def test_dtensor_is_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    x, y = features()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(x.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match="x is a DTensor"):
            pairwise_sigmoid(sharded, y)
        with pytest.raises(TypeError, match="row_weight is a DTensor"):
            pairwise_sigmoid(x, y, row_weight=sharded[:, 0])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"y": torch.randn(7, 6)}, ValueError, "x has width 5 and y has width 6"),
        ({"y": torch.randn(7, 5).bfloat16()}, TypeError, "x is torch.float32 and y is torch.bfloat16"),
        ({"x": torch.ones(9, 5, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"x": torch.randn(9, 5, 1)}, ValueError, "must be a matrix"),
        ({"x": torch.empty(9, 0), "y": torch.empty(7, 0)}, ValueError, "width 0"),
        ({"y": torch.randn(7, 5, device="meta")}, ValueError, "x is on cpu but y is on meta"),
        ({"scale": torch.ones(2)}, ValueError, "scale has shape"),
        ({"scale": "10"}, TypeError, "scale is str"),
        ({"bias": torch.ones((), dtype=torch.int64)}, TypeError, "bias is a torch.int64 tensor"),
        ({"row_weight": torch.ones(7)}, ValueError, r"row_weight has shape \(7,\); it must have shape \(9,\)"),
        ({"col_bias": torch.ones(7, device="meta")}, ValueError, "col_bias is on meta"),
        ({"row_ids": torch.ones(9), "col_ids": torch.ones(7)}, TypeError, "row_ids is torch.float32; it must be an integer"),
        ({"row_ids": torch.arange(9)}, ValueError, "only row_ids is given"),
        ({"ids": "both"}, ValueError, "ids='both' is unknown; allowed: 'positive', 'exclude'"),
        ({"offset": 1.0}, TypeError, "offset is float"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype=torch.int8"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_input_is_refused(change, kind, message):
    arguments = {"x": torch.randn(9, 5), "y": torch.randn(7, 5)} | change
    with pytest.raises(kind, match=message):
        pairwise_sigmoid(**arguments)


def test_implementation_by_environment(monkeypatch):
    x, y = features()
    monkeypatch.setenv("FASTVLP_IMPL", "reference")
    assert "fastvlp" not in type(pairwise_sigmoid(x, y).grad_fn).__name__
    monkeypatch.setenv("FASTVLP_IMPL", "fast")
    with pytest.raises(ValueError, match="FASTVLP_IMPL='fast' is unknown; allowed: triton, cpu, reference"):
        pairwise_sigmoid(x, y)
