"""similarity_topk: against loops, brute force in float64, ties, and the rules of an operator."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvlp_kernels._testing import forbid_large_tensors
from fastvlp_kernels.similarity_topk import similarity_topk

cpu = import_module("fastvlp_kernels.similarity_topk.cpu")


def whole(M: int, N: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Small whole numbers: products are exact in every dtype, and many are equal."""
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-2, 3, (n, D), generator=random).to(dtype) for n in (M, N))


def loops(x: Tensor, y: Tensor, k: int, row_ids=None, col_ids=None, offset=None) -> tuple[list[list[float]], list[list[int]]]:
    """One pair after the other, sorted by (-value, column)."""
    values, indices = [], []
    for i in range(len(x)):
        pairs = []
        for j in range(len(y)):
            if row_ids is not None and int(row_ids[i]) == int(col_ids[j]) >= 0 or (offset is not None and j == i + offset):
                continue
            pairs.append((-sum(float(a) * float(b) for a, b in zip(x[i], y[j], strict=True)), j))
        best = (sorted(pairs) + [(float("inf"), -1)] * k)[:k]
        values.append([-value for value, _ in best])
        indices.append([j for _, j in best])
    return values, indices


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"offset": 1}, {"offset": -2, "ids": True}, {"ids": True}], ids=str)
def test_by_loops(impl, k, options, monkeypatch):
    monkeypatch.setattr(cpu, "COLS", 3)
    monkeypatch.setattr(cpu, "TILE", 6)
    x, y = whole(5, 7, 2)
    options = dict(options)
    ids = {"row_ids": torch.tensor([0, -1, 2, 1, 0]), "col_ids": torch.tensor([1, -1, 2, 0, 0, 1, 3])} if options.pop("ids", False) else {}
    found = similarity_topk(x, y, k, **options, **ids, columns=True, impl=impl)
    back = {"offset": -options["offset"]} if options else {}
    swapped = {"row_ids": ids["col_ids"], "col_ids": ids["row_ids"]} if ids else {}
    want = (*loops(x, y, k, **options, **ids), *loops(y, x, k, **back, **swapped))
    assert [part.tolist() for part in found] == list(want)
    assert [part.dtype for part in found] == [torch.float32, torch.int64] * 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    M=st.integers(0, 40),
    N=st.sampled_from([0, 1, 2, 33, 200, 777]),
    D=st.sampled_from([1, 2, 7, 33]),
    k=st.sampled_from([1, 2, 10, 64, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    offset=st.one_of(st.none(), st.integers(-50, 50)),
    ids=st.booleans(),
    cols=st.sampled_from([7, 100, 2**14]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
)
def test_equal_to_the_reference_with_ties(M, N, D, k, dtype, offset, ids, cols, layout):
    x, y = whole(M, N, D, seed=M * 61 + N, dtype=dtype)
    if layout == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    elif layout == "every second":
        x, y = (torch.stack([t, t], 1).flatten(0, 1)[::2] for t in (x, y))
    options = {"offset": offset}
    if ids:
        options |= {"row_ids": torch.arange(M) % 5 - 1, "col_ids": torch.arange(N) % 7 - 1}
    usual, cpu.COLS = cpu.COLS, cols
    try:
        found = similarity_topk(x, y, k, **options, columns=True)
    finally:
        cpu.COLS = usual
    for ours, exact in zip(found, similarity_topk(x.double(), y.double(), k, **options, columns=True, impl="reference"), strict=True):
        assert torch.equal(ours, exact.to(ours.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_brute_force_in_float64(dtype, k):
    """Values are those of the pairs that are named, no pair is named twice, and none that is left out is larger by more than rounding."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 48, generator=random).to(dtype) for n in (70, 5000))
    S = x.double() @ y.double().T
    S.diagonal(3).fill_(-torch.inf)
    values, indices = similarity_topk(x, y, k, offset=3)
    rounding = 1e-6 * float(S[S.isfinite()].abs().max())
    torch.testing.assert_close(values.double(), S.gather(1, indices), rtol=0, atol=rounding)
    assert (values.diff(dim=1) <= 0).all() and all(len(set(row)) == k for row in indices.tolist())
    left_out = S.scatter(1, indices, -torch.inf).amax(1)
    assert (left_out <= values[:, -1].double() + rounding).all()


def test_equal_rows_come_by_their_number():
    """A set with every vector eight times over: the copies, lowest index first, and never the row itself."""
    x = torch.eye(40).repeat(8, 1)
    values, indices = similarity_topk(x, x, 7, offset=0)
    assert (values == 1).all()
    assert all(row == [j for j in range(i % 40, 320, 40) if j != i] for i, row in enumerate(indices.tolist()))


def test_no_matrix_of_similarities():
    x, y = torch.randn(1500, 8), torch.randn(40_000, 8)
    with forbid_large_tensors(1500 * 40_000 // 8) as mode:
        similarity_topk(x, y, 5, row_ids=torch.arange(1500), col_ids=torch.arange(40_000), columns=True)
    assert mode.largest > 0


def test_results_that_start_as_nan_are_all_written():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        for part in similarity_topk(*whole(30, 3, 4), 5, columns=True):
            assert not part.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_opcheck(impl):
    x, y = whole(9, 7, 5)
    ids = torch.arange(9) % 3, torch.arange(7) % 4
    torch.library.opcheck(torch.ops.fastvlp.similarity_topk.default, (x, y, 3, *ids, 1, torch.float32, impl))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(x, y):
        return similarity_topk(x, y, 4, offset=0, columns=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for M in (9, 12):
        x, y = whole(M, 20, 5)
        assert all(torch.equal(ours, want) for ours, want in zip(compiled(x, y), f(x, y), strict=True))


def test_autocast_and_no_gradient():
    x, y = torch.randn(9, 16, requires_grad=True), torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = similarity_topk(x, y, 2)
    assert values.dtype == torch.float32 and not values.requires_grad
    assert torch.equal(values, similarity_topk(x.bfloat16(), y.bfloat16(), 2)[0])
    assert torch.equal(values, similarity_topk(x, y, 2, compute_dtype=torch.bfloat16)[0])
    assert not torch.equal(values, similarity_topk(x, y, 2)[0])


def test_meta():
    values, indices = similarity_topk(torch.empty(9, 5, device="meta"), torch.empty(7, 5, device="meta"), 3, impl="cpu")
    assert values.shape == indices.shape == (9, 3) and (values.dtype, indices.dtype) == (torch.float32, torch.int64)


def test_dtensor_is_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    x, y = whole(4, 4, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(y, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match="y is a DTensor"):
            similarity_topk(x, sharded, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"y": torch.randn(7, 6)}, ValueError, "x has width 5 and y has width 6"),
        ({"x": torch.ones(9, 5, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"y": torch.randn(7, 5, device="meta")}, ValueError, "x is on cpu but y is on meta"),
        ({"k": 0}, ValueError, "k=0; it must be a whole number, at least 1"),
        ({"k": 2.0}, ValueError, "k=2.0; it must be a whole number"),
        ({"row_ids": torch.arange(9)}, ValueError, "only row_ids is given"),
        ({"row_ids": torch.ones(9), "col_ids": torch.ones(7)}, TypeError, "row_ids is torch.float32; it must be an integer"),
        ({"row_ids": torch.arange(8), "col_ids": torch.arange(7)}, ValueError, r"row_ids has shape \(8,\); it must have shape \(9,\)"),
        ({"offset": 1.0}, TypeError, "offset is float; it must be an integer, or None"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype=torch.int8"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_wrong_input_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        similarity_topk(**{"x": torch.randn(9, 5), "y": torch.randn(7, 5), "k": 3} | change)
