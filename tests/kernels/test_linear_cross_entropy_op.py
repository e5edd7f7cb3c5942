"""linear_cross_entropy as an operator of PyTorch: gradients only where needed, compile, autocast, meta, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp_kernels.linear_cross_entropy import linear_cross_entropy

T, D, V = 9, 5, 7


def leaves(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    found = [torch.randn(size, generator=random).to(dtype).requires_grad_() for size in ((T, D), (V, D), (V,))]
    return found, torch.randint(0, V, (T,), generator=random)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [None, torch.tensor([6, 0, 1, 2, 3, 4, 5])])
def test_opcheck(reduction, classes):
    (x, weight, bias), targets = leaves()
    args = (x, weight, bias, targets, classes, -100, 0.1, 0.01, reduction, torch.float32, [True] * 3, "cpu")
    torch.library.opcheck(torch.ops.fastvlp.linear_cross_entropy.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(dynamic, reduction):
    def f(x, weight, bias, targets):
        return linear_cross_entropy(x * 2, weight, targets, bias, reduction=reduction, label_smoothing=0.1).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    given, targets = leaves()
    for rows in (T, T - 2):
        part = [given[0].detach()[:rows].requires_grad_(), *given[1:]]
        want = torch.autograd.grad(f(*part, targets[:rows]), part)
        for ours, exact in zip(torch.autograd.grad(compiled(*part, targets[:rows]), part), want, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-7)


class Products(TorchDispatchMode):
    """Shapes of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastvlp":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_needed(reduction):
    (x, weight, bias), targets = leaves()

    def products(*given) -> list[tuple[int, ...]]:
        with Products() as seen:
            loss = linear_cross_entropy(given[0], given[1], targets, given[2], reduction=reduction).sum()
            if loss.requires_grad:
                loss.backward()
        return seen.shapes[1:] if reduction == "none" and loss.requires_grad else seen.shapes  # without the first of two sweeps

    logits, dx, dweight = (T, V), (T, D), (V, D)
    with torch.no_grad():
        assert products(x, weight, bias) == [logits]
    assert products(x.detach(), weight.detach(), bias.detach()) == [logits]
    assert products(x, weight.detach(), None) == [logits, dx]
    assert products(x.detach(), weight, bias.detach()) == [logits, dweight]
    assert products(x.detach(), weight.detach(), bias) == [logits]
    assert products(x, weight, bias) == [logits, dx, dweight]


def test_upstream_gradients_and_repeated_backward():
    given, targets = leaves(torch.float64)
    want = torch.autograd.grad(F.cross_entropy(F.linear(*given), targets), given)
    loss = linear_cross_entropy(*given[:2], targets, given[2])
    for upstream in (1.0, 3.0, 1.0):
        for ours, exact in zip(torch.autograd.grad(loss * upstream, given, retain_graph=True), want, strict=True):
            torch.testing.assert_close(ours, exact * upstream, rtol=1e-12, atol=1e-14)
    for _ in range(2):
        loss.backward(retain_graph=True)
    for leaf, exact in zip(given, want, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * exact, rtol=1e-12, atol=1e-14)


def test_autocast():
    """Master weights in float32 and features in bfloat16, as autocast leaves them: gradients come back in each one's dtype."""
    (x, weight, bias), targets = leaves()
    features = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(features, weight, targets, bias)
    assert loss.dtype == torch.float32
    named = linear_cross_entropy(x, weight, targets, bias, compute_dtype=torch.bfloat16)
    assert loss.item() == named.item() != linear_cross_entropy(x, weight, targets, bias).item()
    grads = torch.autograd.grad(loss, [features, weight, bias])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    given, targets = leaves()
    x, weight, bias = (t.detach().to("meta").requires_grad_() for t in given)
    linear_cross_entropy(x, weight, targets.to("meta"), bias, impl="cpu").backward()
    assert x.grad.shape == x.shape and bias.grad.device.type == "meta"
    with FakeTensorMode():
        x = torch.randn(T, D, requires_grad=True)
        loss = linear_cross_entropy(x, torch.randn(V, D), torch.zeros(T, dtype=torch.int64), reduction="none")
        (loss * torch.rand(T)).sum().backward()
        assert loss.shape == (T,) and x.grad.shape == x.shape


def test_second_and_forward_mode_derivatives_are_refused():
    (x, weight, bias), targets = leaves()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, weight, targets, bias, reduction=reduction).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_cross_entropy: second derivatives are not available; use impl='reference'"):
            first.sum().backward()
    (first,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, bias, impl="reference"), x, create_graph=True)
    first.sum().backward()

    def f(impl):
        return torch.func.jvp(lambda x: linear_cross_entropy(x, weight.detach(), targets, impl=impl), (x.detach(),), (x.detach(),))

    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: forward-mode derivatives .*are not available; use impl='reference'"):
        f("cpu")
    assert f("reference")[1].isfinite()


def test_dtensor_is_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    (x, weight, _), targets = leaves()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match="weight is a DTensor"):
            linear_cross_entropy(x, sharded, targets)
    finally:
        dist.destroy_process_group()


X, W, Y = torch.randn(T, D), torch.randn(V, D), torch.zeros(T, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weight": torch.randn(V, 6)}, ValueError, "x has width 5 and weight has width 6"),
        ({"weight": W.bfloat16()}, TypeError, "x is torch.float32 and weight is torch.bfloat16; cast one of them, or name compute_dtype"),
        ({"x": X[0]}, ValueError, r"x is torch.float32 \(5,\); it must be \[tokens, width\]"),
        ({"weight": W.long()}, ValueError, r"weight is torch.int64 \(7, 5\); it must be \[classes, width\], floating point"),
        ({"weight": torch.empty(0, D)}, ValueError, "at least one class and width 1 are needed"),
        ({"targets": Y[:-1]}, ValueError, r"targets are torch.int64 \(8,\); they must be int64 \(9,\)"),
        ({"targets": Y.int()}, ValueError, "targets are torch.int32"),
        ({"targets": Y + 7}, ValueError, "a target is 7; allowed: 0 to 6, and ignore_index, -100"),
        ({"targets": Y - 1, "ignore_index": 0}, ValueError, "a target is -1; allowed: 0 to 6, and ignore_index, 0"),
        ({"targets": Y.to("meta")}, ValueError, "x is on cpu but targets is on meta"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias has shape \(6,\); it must have shape \(7,\)"),
        ({"classes": torch.tensor([0, 7])}, ValueError, "classes go from 0 to 7; allowed: 0 to 6"),
        ({"classes": torch.tensor([1, 2])}, ValueError, "target 0 is not among classes; add the batch's own targets to them"),
        ({"classes": torch.tensor([0.5])}, ValueError, "classes are torch.float32"),
        ({"classes": torch.empty(0, dtype=torch.int64)}, ValueError, "with at least one id"),
        ({"reduction": "max"}, ValueError, "reduction='max' is unknown; allowed: 'mean', 'sum', 'none'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5; it must be from 0 to 1"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype=torch.int8"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_input_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**{"x": X, "weight": W, "targets": Y} | change)


def test_implementation_by_environment(monkeypatch):
    (x, weight, _), targets = leaves()
    monkeypatch.setenv("FASTVLP_IMPL", "reference")
    assert "fastvlp" not in type(linear_cross_entropy(x, weight, targets).grad_fn).__name__
