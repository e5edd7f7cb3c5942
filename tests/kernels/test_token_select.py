"""token_select against a loop over single tokens, as an operator, and its Triton kernels interpreted and compiled."""

import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels import Packed, token_select
from fastvlp_kernels._backend import why_not
from fastvlp_kernels.token_select import cuda
from tests.kernels.aot import Recorder
from tests.kernels.interpreter import interpreted

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
IMPLS = ["cpu", "reference"]
CU = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
LENGTHS = CU.diff().long()


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def levels(tokens, seed=0, dtype=torch.float32):
    """Scores of few values, so that there are many ties."""
    return torch.randint(-2, 3, (tokens,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def brute(scores, lengths, keep, protected=0):
    """Take the best token that is left until there are enough."""
    kept, start = [], 0
    for s, n in enumerate(lengths):
        wanted = keep[s] if isinstance(keep, list) else keep
        wanted = math.floor(wanted * n) if isinstance(wanted, float) else wanted
        left, stays = list(range(min(protected, n), n)), list(range(min(protected, n)))
        while left and len(stays) < wanted:
            best = left[0]
            for i in left[1:]:
                if scores[start + i] > scores[start + best]:
                    best = i
            left.remove(best)
            stays.append(best)
        kept.append([start + i for i in sorted(stays)])
        start += n
    return kept


def check(selection, kept):
    assert selection.index.tolist() == sum(kept, []) and selection.index.dtype == torch.int64
    assert selection.lengths.tolist() == [len(part) for part in kept] == selection.cu_seqlens.diff().tolist()
    assert selection.cu_seqlens.dtype == torch.int32 and selection.lengths.device.type == "cpu"


some_lengths = st.lists(st.integers(0, 40), max_size=8)


@given(some_lengths, st.one_of(st.integers(0, 9), st.floats(0, 1)), st.integers(0, 3), st.sampled_from(IMPLS), st.booleans(),
       st.integers(0, 99))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_segments_equal_the_loop(lengths, keep, protected, impl, ties, seed):
    total = sum(lengths)
    scores = levels(total, seed) if ties else torch.randn(total, generator=torch.Generator().manual_seed(seed))
    check(token_select(scores, cu(lengths), keep, protected=protected, impl=impl), brute(scores.tolist(), lengths, keep, protected))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_segment_shorter_than_the_protected_prefix_stays_whole(impl):
    """Beside a longer one whose scores are higher, so that padding would outrank its tokens."""
    lengths, scores = [1, 2, 6], torch.tensor([0.0, 1.0, 2.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    check(token_select(scores, cu(lengths), 4, protected=3, impl=impl), brute(scores.tolist(), lengths, 4, 3))
    check(token_select(-scores, cu(lengths), 4, protected=3, impl=impl), brute((-scores).tolist(), lengths, 4, 3))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_number_for_each_segment_and_every_dtype(impl, dtype):
    lengths = [7, 0, 20, 5]
    scores = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for keep in ([3, 2, 40, 0], [0.5, 0.1, 0.29, 1.0]):
        check(token_select(scores, cu(lengths), torch.tensor(keep, dtype=torch.float64 if keep[0] < 1 else None), impl=impl),
              brute(scores.tolist(), lengths, keep))  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_scores_and_nan(impl):
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([nan, -inf, 1, inf, inf, -inf, nan, -inf, -inf])
    assert token_select(scores, cu([6, 3]), 4, impl=impl).index.tolist() == [0, 2, 3, 4, 6, 7, 8]
    assert token_select(scores, cu([6, 3]), 2, impl=impl, protected=1).index.tolist() == [0, 3, 6, 7]


def test_apply_carries_everything_and_gradients_go_to_what_stays():
    pos = torch.arange(36, dtype=torch.int32).view(12, 3)
    packed = Packed.of(torch.randn(12, 4, requires_grad=True), [5, 0, 7], size=torch.rand(12), pos=pos)
    selection = token_select(torch.rand(12), packed.cu_seqlens, 3, lengths=packed.lengths)
    kept = selection.apply(packed)
    assert (kept.total, kept.max_seqlen, kept.lengths.tolist()) == (6, 3, [3, 0, 3])
    for mine, theirs in ((kept.x, packed.x), (kept.size, packed.size), (kept.pos, pos)):
        assert torch.equal(mine, theirs[selection.index])
    weight = torch.randn(6, 4)
    (gradient,) = torch.autograd.grad((kept.x * weight).sum(), packed.x)
    assert torch.equal(gradient[selection.index], weight) and gradient.count_nonzero() == 24
    x = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(selection.take, x) and torch.autograd.gradgradcheck(selection.take, x)
    empty = token_select(torch.zeros(0), cu([]), 3).apply(Packed.of(torch.zeros(0, 2), []))
    assert (empty.total, empty.max_seqlen) == (0, 0)


@pytest.mark.parametrize("each", [None, torch.tensor([3, 1, 2]), torch.tensor([0.6, 0.5, 0.3])])
def test_opcheck(each):
    total = 6 if each is None else 5
    torch.library.opcheck(torch.ops.fastvlp.token_select.default, (torch.rand(12), CU, LENGTHS, 3.0, False, each, 0, total, "cpu"))
    torch.library.opcheck(torch.ops.fastvlp.token_take.default, (torch.rand(12, 3, requires_grad=True), torch.tensor([0, 4, 7])))


def test_compiled_once_for_all_totals():
    def step(x, scores, cu, lengths, total):
        selection = token_select(scores, cu, 3, lengths=lengths, total=total)
        return selection.apply(Packed(x, cu, lengths, x.shape[0], 9)).x.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 4], [9, 8], [3, 6]):
            x, scores = torch.randn(sum(lengths), 2, requires_grad=True), torch.rand(sum(lengths))
            arguments = (x, scores, cu(lengths), torch.tensor(lengths), 6)
            ours, eager = (torch.autograd.grad(f(*arguments), x)[0] for f in (compiled, step))
            torch.testing.assert_close(ours, eager)


def test_meta_tensors_know_their_shapes():
    selection = token_select(torch.empty(12, device="meta"), CU.to("meta"), 0.5, lengths=LENGTHS)
    assert selection.index.shape == (5,) and selection.take(torch.empty(12, 3, device="meta")).shape == (5, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": torch.zeros(12, 2)}, ValueError, r"scores are torch.float32 \(12, 2\); they must be \[tokens\]"),
        ({"scores": torch.zeros(12, dtype=torch.int64)}, ValueError, "scores are torch.int64"),
        ({"keep": -2}, ValueError, "keep is -2; it must be a count"),
        ({"keep": 1.5}, ValueError, "keep is 1.5"),
        ({"keep": "all"}, TypeError, "keep is str"),
        ({"keep": torch.tensor([1, -1, 2])}, ValueError, r"keep is \[1, -1, 2\]; it must hold counts of 0 or more"),
        ({"keep": torch.tensor([0.5, 2.0, 0.5])}, ValueError, r"or shares \(floats, 0 to 1\)"),
        ({"keep": torch.ones(2)}, ValueError, r"keep has shape \(2,\)"),
        ({"total": 5}, ValueError, "total is 5; 6 tokens are kept"),
        ({"protected": -1}, ValueError, "protected is -1"),
        ({"protected": 0.5}, ValueError, "protected is 0.5; it must be an int"),
        ({"lengths": torch.tensor([5, 1, 6])}, ValueError, "are not those of cu_seqlens"),
        ({"cu_seqlens": CU - 1}, ValueError, "it must start at 0"),
        ({"cu_seqlens": CU[:3]}, ValueError, "the segments hold 5 tokens, but there are 12 rows"),
        ({"impl": "sort"}, ValueError, "impl='sort' is unknown; allowed: triton, cpu, cuda, reference"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run here: (CuPy is not installed: pip|it needs a CUDA device)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        token_select(**{"scores": torch.zeros(12), "cu_seqlens": CU, "keep": 3} | changes)
    with pytest.raises(ValueError, match=r"the selection is of 12 rows"):
        token_select(torch.zeros(12), CU, 3).take(torch.zeros(11))
    with pytest.raises(ValueError, match=r"made for segments of \[5, 0, 7\] tokens, but these have \[7, 5\]"):
        token_select(torch.zeros(12), CU, 3).apply(Packed.of(torch.zeros(12), [7, 5]))


def compare(lengths, device="cpu", dtype=torch.float32, impl="triton"):
    for keep, protected in ((4, 0), (0.29, 0), (5, 2), (1, 3), (torch.arange(len(lengths)), 1), (torch.rand(len(lengths)), 0)):
        for scores in (levels(sum(lengths)), torch.randn(sum(lengths))):
            scores = scores.to(dtype)
            scores[::7], scores[1::9] = torch.nan, torch.inf
            mine = token_select(scores.to(device), cu(lengths).to(device), keep, protected=protected, impl=impl)
            true = token_select(scores, cu(lengths), keep, protected=protected, impl="reference")
            for field in ("index", "cu_seqlens", "lengths"):
                assert torch.equal(getattr(mine, field).cpu(), getattr(true, field)), (field, keep, protected)


def interpreted_cases() -> None:
    """Small tiles; runs in a process where Triton interprets."""
    from fastvlp_kernels import _ragged_triton
    from fastvlp_kernels.token_select import triton

    triton.config = lambda: {"BLOCK": 8, "BLOCK_K": 4}
    _ragged_triton.BLOCK_S = 4
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    compare([11, 0, 1, 25, 3, 8])
    compare([11, 17], dtype=torch.bfloat16)
    compare([])
    compare([0, 0])
    with pytest.raises(RuntimeError, match="not in float64; use impl='cpu'"):
        token_select(torch.zeros(2, dtype=torch.float64), cu([2]), 1, impl="triton")


@needs_triton
def test_interpreted():
    interpreted(interpreted_cases, timeout=900)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile(arch, monkeypatch):
    from fastvlp_kernels.token_select import triton

    recorders = [Recorder(getattr(triton, name)) for name in ("_stay_kernel", "_index_kernel")]
    monkeypatch.setattr(triton, "_stay_kernel", recorders[0])
    monkeypatch.setattr(triton, "_index_kernel", recorders[1])
    monkeypatch.setattr(triton._ragged_triton, "counts", lambda *args: torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr(triton._ragged_triton, "starts", lambda *args: torch.zeros(3, dtype=torch.int32))
    triton.select(torch.zeros(400, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32), 200, 0.5, True, None, 1, 200)
    for recorder in recorders:
        recorder.compile(arch).assert_fits()


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=needs_triton), "cuda"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_the_device(impl):
    if impl == "cuda" and (reason := why_not("cuda", torch.device("cuda")) or cuda.why_not()):
        pytest.skip(reason)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare([197, 0, 1, 50, 700, 64], "cuda", dtype, impl)
    compare([40_000, 3], "cuda", impl=impl)
    compare([], "cuda", impl=impl)
    scores, starts, lengths = torch.rand(400, device="cuda"), cu([200, 200]).cuda(), torch.tensor([200, 200])
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_select(scores, starts, 0.5, lengths=lengths, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which records what runs on the current stream
        selection = token_select(scores, starts, 0.5, lengths=lengths, impl=impl)
    scores.copy_(-scores)
    graph.replay()
    assert torch.equal(selection.index, token_select(scores, starts, 0.5, lengths=lengths, impl="cpu").index)
