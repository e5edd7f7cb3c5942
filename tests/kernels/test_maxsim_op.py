"""maxsim as an operator of PyTorch: gradients only where needed, compile, autocast, meta, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp_kernels.maxsim import cpu, maxsim

CU_X, CU_Y = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.tensor([0, 2, 7], dtype=torch.int32)


def features(dtype: torch.dtype = torch.float32, rows: tuple[int, int] = (9, 7), D: int = 5):
    random = torch.Generator().manual_seed(0)
    return tuple(F.normalize(torch.randn(size, D, generator=random), dim=1).to(dtype).requires_grad_() for size in rows)


def total(scores) -> torch.Tensor:
    return sum((k + 1) * score.square().sum() for k, score in enumerate(scores))


def products(function, monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the results of the matrix products that ``function`` runs."""
    shapes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                shapes.append(tuple(result.shape))
            return result

    def recorded(inner):
        def call(*args):
            with Recorder():
                return inner(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(cpu, name, recorded(getattr(cpu, name)))
        patch.setattr(cpu, "plan", lambda starts, size, columns, plan=cpu.plan: plan(starts, 512, columns))
        function()
    return shapes


@pytest.mark.parametrize(("to_y", "to_x"), [(True, True), (True, False)])
def test_opcheck(to_y, to_x):
    x, y = features()
    torch.library.opcheck(torch.ops.fastvlp.maxsim.default, (x, y, CU_X, CU_Y, 5, True, to_y, to_x, torch.float32, "cpu"))
    g = torch.randn(3, 2)
    for needs in ((True, True), (False, True)):
        args = (g if to_y else None, g if to_x else None, x.detach(), y.detach(), CU_X, CU_Y, None, False, torch.float32, *needs, "cpu")
        torch.library.opcheck(torch.ops.fastvlp.maxsim_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    def f(x, y, cu_x, cu_y):
        return total(maxsim(x * 1.5, cu_x, y, cu_y, max_seqlen_x=5))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, starts in (((9, 7), (CU_X, CU_Y)), ((11, 8), (torch.tensor([0, 1, 2, 6, 11]).int(), torch.tensor([0, 3, 5, 8]).int()))):
        leaves = features(rows=rows)
        want = torch.autograd.grad(f(*leaves, *starts), leaves)
        for mine, eager in zip(torch.autograd.grad(compiled(*leaves, *starts), leaves), want, strict=True):
            torch.testing.assert_close(mine, eager, rtol=0, atol=0)


def test_only_what_is_needed(monkeypatch):
    x, y = features()
    dx, dy, S = (9, 5), (7, 5), (9, 7)

    def run(x, y, **options):
        scores = maxsim(x, CU_X, y, CU_Y, **options)
        scores = scores if isinstance(scores, tuple) else (scores,)
        leaves = [t for t in (x, y) if t.requires_grad]
        if scores[0].requires_grad:
            torch.autograd.grad(total(scores), leaves)

    with torch.no_grad():
        assert products(lambda: run(x, y), monkeypatch) == [S]
    assert products(lambda: run(x.detach(), y.detach()), monkeypatch) == [S]
    assert products(lambda: run(x, y.detach()), monkeypatch) == [S, S, dx]
    assert products(lambda: run(x.detach(), y), monkeypatch) == [S, S, dy]
    assert products(lambda: run(x, y, directions="x_to_y"), monkeypatch) == [S, S, dx, dy]


def test_a_direction_without_gradient_is_left_out():
    x, y = features()
    row, col = maxsim(x, CU_X, y, CU_Y)
    alone = torch.autograd.grad(row.sum(), (x, y), retain_graph=True)
    with_zero = torch.autograd.grad(row.sum() + 0 * col.sum(), (x, y))
    torch.testing.assert_close(alone, with_zero)


def test_autocast_decides_the_dtype_of_products():
    x, y = features()
    with torch.autocast("cpu", torch.bfloat16):
        scores = maxsim(x, CU_X, y, CU_Y)
    rounded = maxsim(x.bfloat16(), CU_X, y.bfloat16(), CU_Y)
    named = maxsim(x, CU_X, y, CU_Y, compute_dtype=torch.bfloat16)
    exact = maxsim(x, CU_X, y, CU_Y)
    for k in range(2):
        assert scores[k].dtype == torch.float32
        assert torch.equal(scores[k], rounded[k]) and torch.equal(scores[k], named[k]) and not torch.equal(scores[k], exact[k])
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(total(scores), (x, y)))


@pytest.mark.parametrize("directions", ["both", "y_to_x"])
def test_meta_tensors_know_their_shapes(directions):
    x, y = (t.detach().to("meta").requires_grad_() for t in features(torch.bfloat16))
    scores = maxsim(x, CU_X.to("meta"), y, CU_Y.to("meta"), directions=directions)
    scores = scores if directions == "both" else (scores,)
    assert all(s.shape == (3, 2) and s.dtype == torch.float32 and s.device.type == "meta" for s in scores)
    total(scores).backward()
    assert x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16


def test_second_derivatives_are_refused_by_name():
    x, y = features()
    (first,) = torch.autograd.grad(total(maxsim(x, CU_X, y, CU_Y)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="maxsim: second derivatives are not available; use impl='reference'"):
        first.sum().backward()
    (first,) = torch.autograd.grad(total(maxsim(x, CU_X, y, CU_Y, impl="reference")), x, create_graph=True)
    first.sum().backward()


def test_dtensor_is_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    x, y = features()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = distribute_tensor(y.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match="maxsim: y is a DTensor"):
            maxsim(x, CU_X, whole, CU_Y)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"y": torch.randn(7, 6)}, ValueError, "x has width 5 and y has width 6"),
        ({"y": torch.randn(7, 5).bfloat16()}, TypeError, "x is torch.float32 and y is torch.bfloat16"),
        ({"x": torch.randn(3, 3, 5)}, ValueError, "must be a matrix"),
        ({"y": torch.randn(7, 5, device="meta")}, ValueError, "x is on cpu but y is on meta"),
        ({"cu_y": CU_Y.to("meta")}, ValueError, "x is on cpu but cu_y is on meta"),
        ({"cu_x": CU_X.double()}, ValueError, r"cu_x is torch.float64 \(4,\); it must be int32 \[S\+1\]"),
        ({"cu_x": CU_X[:0]}, ValueError, "cu_x is torch.int32"),
        ({"cu_y": CU_Y[None]}, ValueError, r"cu_y is torch.int32 \(1, 3\)"),
        ({"cu_x": CU_X + 1}, ValueError, "cu_x starts at 1; it must start at 0"),
        ({"cu_x": torch.tensor([0, 5, 4, 9]).int()}, ValueError, "cu_x decreases"),
        ({"cu_y": torch.tensor([0, 8]).int()}, ValueError, "cu_y ends at 8, but y has 7 rows"),
        ({"max_seqlen_x": 4}, ValueError, "max_seqlen_x=4, but there is a segment of 5; pass 5, or None"),
        ({"max_seqlen_x": -1}, ValueError, "max_seqlen_x=-1; it must be the length"),
        ({"reduce": "max"}, ValueError, "reduce='max' is unknown; allowed: 'mean', 'sum'"),
        ({"directions": "x"}, ValueError, "directions='x' is unknown; allowed: 'both', 'x_to_y', 'y_to_x'"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype=torch.int8"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_input_is_refused(change, kind, message):
    arguments = {"x": torch.randn(9, 5), "cu_x": CU_X, "y": torch.randn(7, 5), "cu_y": CU_Y} | change
    with pytest.raises(kind, match=message):
        maxsim(**arguments)
