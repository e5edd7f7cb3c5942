"""merge_plan and merging against loops over single tokens in float64, written here from ToMe's description."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp_kernels import Packed, merge_plan
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors
from fastvlp_kernels.token_merge import cpu

IMPLS = ["cpu", "reference"]


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def signs(tokens, seed=0):
    """Vectors of +-1 and width 4: their cosines are multiples of 1/2 and exact, so that there are many ties."""
    return torch.randint(0, 2, (tokens, 4), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def brute(metric, lengths, r=None, threshold=None, protected=0, keep_order=True):
    """The groups of tokens that become the rows of each segment, the token that stays first in its group."""
    segments, start = [], 0
    for s, n in enumerate(lengths):
        vectors = [metric[start + i].double() for i in range(n)]

        def cosine(i, j, vectors=vectors):
            return float(vectors[i] @ vectors[j] / (vectors[i].norm() * vectors[j].norm()))

        a, b = ([i for i in range(odd, n, 2) if i >= protected] for odd in (0, 1))
        match, similarity = {}, {}
        for i in a if b else []:
            match[i], similarity[i] = b[0], cosine(i, b[0])
            for j in b[1:]:
                if cosine(i, j) > similarity[i]:
                    match[i], similarity[i] = j, cosine(i, j)
        ranking = sorted(match, key=lambda i: -similarity[i])  # Python's sort is stable
        if threshold is None:
            wanted = r[s] if isinstance(r, list) else r
            away = ranking[: math.floor(wanted * n) if isinstance(wanted, float) else wanted]
        else:
            away = [i for i in a if i in match and similarity[i] >= threshold]
        stay = [i for i in range(n) if i not in away]
        if not keep_order:
            even = [i for i in stay if i % 2 == 0]
            stay = (even if protected or not b else sorted(even, key=ranking.index)) + [i for i in stay if i % 2]
        segments.append([[start + i] + [start + k for k in sorted(away) if match[k] == i] for i in stay])
        start += n
    return segments


def exact(groups, x, size, mode):
    """Rows and their sizes from lists of tokens, in exact order; differentiable."""
    sizes = x.new_ones(len(x)) if size is None else size
    rows, totals = [x[:0]], [sizes[:0]]
    for group in groups:
        members, weight = x[group], sizes[group]
        if mode == "mean":
            row = members[0] if len(group) == 1 else (weight[:, None] * members).sum(0) / weight.sum()
        else:
            row = members.sum(0) if mode == "sum" else members.max(0).values
        rows.append(row[None])
        totals.append(weight.sum()[None])
    return torch.cat(rows), torch.cat(totals)


def assert_plan(plan, segments, total):
    """Every field of the plan says the same as the groups; rows beyond them hold nothing."""
    groups = [group for segment in segments for group in segment]
    order, starts = plan.order.tolist(), plan.starts.tolist()
    assert [order[a:b] for a, b in zip(starts, starts[1:], strict=False)] == groups + [[]] * (total - len(groups))
    source = {token: row for row, group in enumerate(groups) for token in group}
    assert plan.source.tolist() == [source[token] for token in range(len(source))]
    assert plan.total == total and plan.cu_seqlens.dtype == torch.int32
    if plan.lengths is not None:
        assert plan.lengths.device.type == "cpu" and plan.lengths.tolist() == plan.cu_seqlens.diff().tolist()


OPTIONS = {
    "count": {"r": 3}, "share": {"r": 0.3}, "nothing": {}, "all": {"r": 100}, "class token": {"r": 2, "protected": 1},
    "distilled": {"r": 4, "protected": 2}, "ToMe's order": {"r": 3, "keep_order": False},
    "ToMe's order, class token": {"r": 3, "keep_order": False, "protected": 1}, "threshold": {"threshold": 0.5},
    "threshold in ToMe's order": {"threshold": -0.5, "keep_order": False}, "half": {"r": 0.5, "protected": 3},
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lengths", [[7], [6, 6, 6], [5, 0, 1, 2, 9, 3, 16, 4], [], [0, 0], [1], [2]], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_matching_equals_the_loop(lengths, option, impl, ties):
    metric = signs(sum(lengths)) if ties else randn(sum(lengths), 5, dtype=torch.float32)
    segments = brute(metric, lengths, **{"r": 0} | OPTIONS[option])
    plan = merge_plan(metric, cu(lengths), **OPTIONS[option], impl=impl)
    ghost = "threshold" in OPTIONS[option]
    assert_plan(plan, segments, sum(lengths) if ghost else sum(map(len, segments)))
    assert plan.lengths.tolist()[: len(lengths)] == list(map(len, segments))
    assert len(plan.lengths) == len(lengths) + ghost


some_lengths = st.lists(st.integers(0, 12), max_size=8)


@given(some_lengths, st.sampled_from(sorted(OPTIONS)), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_any_segments_merge_as_in_the_loop(lengths, option, ties, tiny_cache, seed):
    metric = signs(sum(lengths), seed) if ties else randn(sum(lengths), 3, dtype=torch.float32, seed=seed)
    groups = sum(brute(metric, lengths, **{"r": 0} | OPTIONS[option]), [])
    x, size = randn(sum(lengths), 3, seed=1).requires_grad_(), (randn(sum(lengths), seed=2).abs() + 0.1).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if tiny_cache:
            patch.setattr(cpu, "SIMILARITIES", 8)
        plan = merge_plan(metric, cu(lengths), **OPTIONS[option], lengths=torch.tensor(lengths, dtype=torch.int64))
    assert_plan(plan, [groups], plan.total)
    for mode in ("mean", "sum", "amax"):
        ours, theirs = plan.merge(x, size, mode), exact(groups, x, size, mode)
        weights = [randn(*t.shape, seed=k) for k, t in enumerate(theirs, start=3)]
        for mine, true in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[: len(groups)], true, rtol=1e-12, atol=1e-12)
            assert not mine[len(groups) :].any()
        sums = [sum((t[: len(groups)] * w).sum() for t, w in zip(pair, weights, strict=True)) for pair in (ours, theirs)]
        for mine, true in zip(*(torch.autograd.grad(total, (x, size)) for total in sums), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["mean", "sum", "amax"])
def test_without_sizes_every_token_counts_one(mode, impl):
    lengths = [9, 4]
    metric, x = randn(13, 4, dtype=torch.float32), randn(13, 2, 3, seed=1).requires_grad_()
    plan = merge_plan(metric, cu(lengths), 3, impl=impl)
    out, size = plan.merge(x, mode=mode)
    groups = sum(brute(metric, lengths, 3), [])
    expected, counts = exact(groups, x.flatten(1), None, mode)
    torch.testing.assert_close(out, expected.view(-1, 2, 3))
    assert size.tolist() == counts.tolist() and size.dtype == torch.float32 and not size.requires_grad
    weight = randn(*out.shape, seed=2)
    gradients = [torch.autograd.grad((y.reshape(out.shape) * weight).sum(), x)[0] for y in (out, expected)]
    torch.testing.assert_close(*gradients)
    ones, _ = plan.merge(torch.ones(13), mode="sum")
    assert torch.equal(ones, size)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_r_for_each_segment(impl):
    lengths = [8, 5, 0, 12]
    metric = randn(25, 3, dtype=torch.float32)
    counts, shares = [4, 0, 3, 2], [0.25, 0.5, 0.9, 0.1]
    for r in (counts, shares):
        segments = brute(metric, lengths, r)
        assert_plan(merge_plan(metric, cu(lengths), torch.tensor(r, dtype=torch.float64 if r is shares else None), impl=impl), segments,
                    sum(map(len, segments)))  # fmt: skip


def test_shares_are_rounded_down_exactly():
    for share in (0.1, 0.29, 0.3, 0.7, 1 / 3):
        lengths = list(range(0, 120, 7))
        kept = merge_plan(randn(sum(lengths), 2), cu(lengths), share).lengths
        wanted = [min(math.floor(Fraction(share) * n + Fraction(1, 10**13)), (n + 1) // 2 if n > 1 else 0) for n in lengths]
        assert kept.tolist() == [n - w for n, w in zip(lengths, wanted, strict=True)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"r": 3}, {"r": 0.4, "protected": 1}])
def test_a_ghost_stays_last_and_takes_what_becomes_free(options, impl):
    lengths = [6, 9, 5]
    metric, x = randn(20, 3, dtype=torch.float32), randn(20, 2).requires_grad_()
    real = brute(metric[:15], lengths[:2], **options)
    plan = merge_plan(metric, cu(lengths), **options, ghost=True, impl=impl)
    assert_plan(plan, [*real, [[15 + i] for i in range(5)]], 20)
    assert plan.lengths.tolist() == [len(real[0]), len(real[1]), 20 - len(real[0]) - len(real[1])]
    again = merge_plan(metric, plan.cu_seqlens, **options, ghost=True, impl=impl)
    assert len(again.lengths) == 3 and again.total == 20
    out, size = plan.merge(x)
    free = plan.starts.diff() == 0
    assert free.sum() == 20 - plan.source.unique().numel() > 0
    assert not out[free].any() and not size[free].any()
    (gradient,) = torch.autograd.grad(out[free].sum() + 0 * out.sum(), x)
    assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_unmerge_gives_each_token_its_row_and_collects_gradients(impl):
    plan = merge_plan(randn(14, 3), cu([9, 5]), 4, impl=impl)
    rows = randn(plan.total, 2, 2).requires_grad_()
    tokens = plan.unmerge(rows)
    assert torch.equal(tokens, rows[plan.source])
    weight = randn(14, 2, 2, seed=1)
    expected = torch.zeros(plan.total, 2, 2, dtype=torch.float64).index_add_(0, plan.source, weight)
    torch.testing.assert_close(torch.autograd.grad((tokens * weight).sum(), rows)[0], expected)
    merged, _ = plan.merge(tokens)
    torch.testing.assert_close(merged, rows)


def test_apply_carries_sizes_and_positions():
    lengths = [6, 4, 5]
    pos = torch.arange(45, dtype=torch.int32).view(15, 3)
    packed = Packed.of(randn(15, 4, dtype=torch.float32), lengths, pos=pos)
    groups = brute(packed.x, lengths, 2)
    merged = merge_plan(packed.x, packed.cu_seqlens, 2, lengths=packed.lengths).apply(packed)
    flat = sum(groups, [])
    assert merged.lengths.tolist() == [4, 2, 3] == merged.cu_seqlens.diff().tolist()
    assert (merged.total, merged.max_seqlen) == (9, 4)
    assert merged.size.tolist() == [len(g) for g in flat]
    assert torch.equal(merged.pos, pos[[g[0] for g in flat]])
    torch.testing.assert_close(merged.x, exact(flat, packed.x, None, "mean")[0])
    plan = merge_plan(merged.x, merged.cu_seqlens, 1, lengths=merged.lengths)
    twice = plan.apply(merged)
    assert twice.size.sum() == 15
    torch.testing.assert_close((twice.size[:, None] * twice.x).sum(0), packed.x.sum(0))
    by_threshold = merge_plan(packed.x, packed.cu_seqlens, threshold=0.0).apply(packed)
    free = by_threshold.size == 0
    assert by_threshold.total == 15 and len(by_threshold) == 4 and free.any() and (by_threshold.pos[free] == -1).all()
    assert by_threshold.max_seqlen == max(by_threshold.lengths.tolist())
    nothing = merge_plan(torch.zeros(0, 3), cu([]), 2).apply(Packed.of(torch.zeros(0, 3), [], pos=torch.zeros(0, 3, dtype=torch.int32)))
    assert (nothing.total, nothing.max_seqlen) == (0, 0)


def test_the_trace_of_two_mergings():
    packed = Packed.of(randn(20, 4), [20])
    first = merge_plan(packed.x, packed.cu_seqlens, 5)
    merged = first.apply(packed)
    second = merge_plan(merged.x, merged.cu_seqlens, 5, lengths=merged.lengths)
    last = second.apply(merged)
    trace = second.source[first.source]
    means = torch.stack([packed.x[trace == row].mean(0) for row in range(last.total)])
    torch.testing.assert_close(last.x, means)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_token_without_a_direction_is_similar_to_nothing(value, impl):
    metric = signs(8)
    metric[2] = value
    plan = merge_plan(metric, cu([8]), threshold=1e-3, impl=impl)
    assert (plan.source == plan.source[2]).sum() == 1
    plan = merge_plan(torch.full((7, 3), value), cu([7]), 2, impl=impl)  # all equal: the first merge into the first
    assert plan.source.tolist() == [0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_metric_is_compared_in_float32(dtype):
    """Norms beyond float16's range, and similarities that bfloat16 would round to one value."""
    angles = (0.02 + 0.002 * torch.arange(40, dtype=torch.float64)).cumsum(0)
    metric = (300 * torch.stack((angles.cos(), angles.sin()), 1)).to(dtype)
    plan = merge_plan(metric, cu([40]), 7)
    assert_plan(plan, brute(metric, [40], 7), 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["mean", "sum", "amax"])
def test_errors_are_no_larger_than_eager_pytorch(dtype, mode):
    lengths = [40, 33]
    metric = randn(73, 2, dtype=torch.float32)
    plan = merge_plan(metric, cu(lengths), 0.45)
    groups = sum(brute(metric, lengths, 0.45), [])
    assert max(map(len, groups)) > 3
    x, size = randn(73, 6, seed=1).to(dtype), torch.randint(1, 9, (73,), generator=torch.Generator().manual_seed(2)).float()
    weight, size_weight = randn(plan.total, 6, seed=3).to(dtype), randn(plan.total, seed=4).float()

    def run(function, precise=False):
        leaves = [(t.double() if precise else t).clone().requires_grad_() for t in (x, size)]
        results = function(*leaves)
        return *results, *torch.autograd.grad(results, leaves, [w.to(t.dtype) for w, t in zip((weight, size_weight), results, strict=True)])

    def eager(x, size):
        """Sums with scatter_add and scatter_reduce in the dtype of x."""
        index, rows = plan.source[:, None].expand_as(x), plan.total
        sizes = torch.zeros(rows, dtype=size.dtype).scatter_add(0, plan.source, size)
        if mode == "amax":
            return torch.full((rows, x.shape[1]), -torch.inf, dtype=x.dtype).scatter_reduce(0, index, x, "amax"), sizes
        values = x * size.to(x.dtype)[:, None] if mode == "mean" else x
        out = torch.zeros(rows, x.shape[1], dtype=x.dtype).scatter_add(0, index, values)
        return (out / sizes.to(x.dtype)[:, None] if mode == "mean" else out), sizes

    ours, theirs = run(lambda x, size: plan.merge(x, size, mode)), run(eager)
    true = run(lambda x, size: exact(groups, x, size, mode), precise=True)
    for name, mine, other, right in zip(("out", "size", "dx", "dsize"), ours, theirs, true, strict=True):
        assert mine.dtype == (dtype if name in ("out", "dx") else torch.float32)
        assert_no_worse_than(mine, other, right, tol=1e-6 if dtype == torch.float32 else 1e-4, name=name)


def test_tokens_that_stay_alone_stay_as_they_are():
    x = randn(50, 3, dtype=torch.bfloat16)
    size = torch.full((50,), 3.0)
    plan = merge_plan(randn(50, 3), cu([50]), 10)
    out, _ = plan.merge(x, size)
    alone = plan.starts.diff() == 1
    assert torch.equal(out[alone], x[plan.order[plan.starts[:-1]]][alone])
    weight = torch.rand_like(out)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(plan.merge(leaf, size)[0], leaf, weight)
    assert torch.equal(gradient[alone[plan.source]], weight[plan.source][alone[plan.source]])


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_of_size_zero(impl):
    plan = merge_plan(torch.ones(4, 2), cu([4]), 2, impl=impl)  # all go to the first odd one
    x, size = randn(4, 2).requires_grad_(), torch.tensor([0.0, 0, 0, 5])
    out, sizes = plan.merge(x, size)
    assert sizes.tolist() == [0, 5] and torch.equal(out, torch.stack((torch.zeros(2, dtype=torch.float64), x[3])))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize("mode", ["mean", "sum", "amax"])
def test_gradcheck(mode):
    plan = merge_plan(randn(9, 3), cu([6, 3]), 2)
    x, size = randn(9, 2, seed=1).requires_grad_(), (randn(9, seed=2).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, size: plan.merge(x, size, mode), (x, size))
    assert torch.autograd.gradcheck(plan.unmerge, randn(plan.total, 2).requires_grad_())


def test_every_element_is_written(monkeypatch):
    def poisoned(make):
        def poison(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -(2**40)) if made.dtype != torch.bool else made.fill_(True)

        return poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    test_any_segments_merge_as_in_the_loop.hypothesis.inner_test([5, 0, 1, 9], "count", False, True, 0)
    test_any_segments_merge_as_in_the_loop.hypothesis.inner_test([5, 0, 1, 9], "threshold in ToMe's order", True, True, 0)


def test_the_similarities_of_a_long_segment_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(cpu, "SIMILARITIES", 1 << 14)
    n = 1024
    metric, x = randn(n, 4, dtype=torch.float32), randn(n, 4, dtype=torch.float32, seed=1).requires_grad_()
    with forbid_large_tensors(n * n // 32):
        plan = merge_plan(metric, cu([n]), 300)
        torch.autograd.grad(plan.merge(x)[0].sum(), x)
    monkeypatch.undo()
    assert torch.equal(plan.source, merge_plan(metric, cu([n]), 300).source)
