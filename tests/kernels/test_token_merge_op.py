"""merge_plan as an operator: registration, compilation, meta tensors, what it refuses."""

import dataclasses

import pytest
import torch

from fastvlp_kernels import Packed, merge_plan
from fastvlp_kernels.token_merge import op

CU = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
LENGTHS = CU.diff().long()


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("ghost", [0, 1, 2])
@pytest.mark.parametrize(("each", "rows"), [(None, 8), (torch.tensor([2, 0, 1]), 9), (torch.tensor([0.5, 0.1, 0.2]), 9)])
def test_opcheck_of_the_matching(each, rows, ghost):
    arguments = (randn(12, 3), CU, LENGTHS, 2.0, False, each, None, 0, True, ghost, 12 if ghost else rows, "cpu")
    torch.library.opcheck(torch.ops.fastvlp.token_match.default, arguments)


@pytest.mark.parametrize("mode", ["mean", "sum", "amax"])
@pytest.mark.parametrize("sized", [False, True])
def test_opcheck_of_the_merging(mode, sized):
    plan = merge_plan(randn(12, 3), CU, 2)
    x, size = randn(12, 4).requires_grad_(), (torch.rand(12) + 0.5).requires_grad_() if sized else None
    parts = (plan.source, plan.order, plan.starts)
    torch.library.opcheck(torch.ops.fastvlp.token_merge.default, (x, size, *parts, mode, "cpu"))
    torch.library.opcheck(torch.ops.fastvlp.token_unmerge.default, (randn(plan.total, 4).requires_grad_(), *parts, "cpu"))
    out, size_out = (t.detach() for t in plan.merge(x, size, mode))
    x, size = x.detach(), None if size is None else size.detach()
    for needs in ([True, sized], [True, False]):
        saved = (torch.randn_like(out), torch.randn_like(size_out), x, size, out, size_out, *parts, mode, needs, "cpu")
        torch.library.opcheck(torch.ops.fastvlp.token_merge_backward.default, saved)


@pytest.mark.parametrize(
    ("options", "total"),
    [({"r": 2, "protected": 1}, 8), ({"r": 0.2, "keep_order": False}, 10), ({"threshold": 0.3}, 12), ({"r": 3, "ghost": True}, 12)],
)
def test_compiled_in_one_graph(options, total):
    def step(metric, x, size, cu, lengths):
        plan = merge_plan(metric, cu, **options, lengths=lengths, total=total)
        rows, sizes = plan.merge(x * 2, size)
        return plan.unmerge(rows).square().sum() + (sizes * sizes).sum(), plan.cu_seqlens

    leaves = [randn(12, 4).requires_grad_(), (torch.rand(12) + 0.5).requires_grad_()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (ours, starts), (eager, expected) = (f(randn(12, 3), *leaves, CU, LENGTHS) for f in (compiled, step))
    assert torch.equal(starts, expected)
    for mine, theirs in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_packed_batches_compile_once_for_all_totals():
    def step(x, cu, lengths, longest, total):
        packed = Packed(x, cu, lengths, x.shape[0], longest)
        merged = merge_plan(x, cu, 2, lengths=lengths, total=total).apply(packed)
        return merged.x, merged.size, merged.lengths

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([7, 8], [5, 11], [9, 14]):
            packed = Packed.of(randn(sum(lengths), 3), lengths)
            arguments = (packed.x, packed.cu_seqlens, packed.lengths, packed.max_seqlen, sum(lengths) - 4)
            for mine, eager in zip(compiled(*arguments), step(*arguments), strict=True):
                torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("options", [{"r": 2}, {"threshold": 0.5}, {"r": torch.tensor([1, 0, 2])}])
def test_meta_tensors_know_their_shapes(options):
    real = merge_plan(randn(12, 3), CU, **options)
    x = torch.empty(12, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    plan = merge_plan(torch.empty(12, 3, device="meta"), CU.to("meta"), **options, lengths=LENGTHS)
    for field in dataclasses.fields(plan):
        mine, theirs = getattr(plan, field.name), getattr(real, field.name)
        if field.name == "lengths":
            assert mine is None if "threshold" in options else torch.equal(mine, theirs)
        elif field.name == "before":
            assert torch.equal(mine, theirs)
        elif isinstance(mine, torch.Tensor):
            assert (mine.shape, mine.dtype, mine.device.type) == (theirs.shape, theirs.dtype, "meta")
    out, size = plan.merge(x)
    assert out.shape == (plan.total, 4) and out.dtype == torch.bfloat16 and size.dtype == torch.float32
    assert torch.autograd.grad(plan.unmerge(out).sum(), x)[0].shape == x.shape


def test_only_needed_gradients_are_made(monkeypatch):
    seen = []
    real = op.cpu.merge_backward
    monkeypatch.setattr(op.cpu, "merge_backward", lambda *args: seen.append(list(args[-1])) or real(*args))
    plan = merge_plan(randn(12, 3).requires_grad_(), CU, 2)
    assert not plan.source.requires_grad
    x, size = randn(12, 2).requires_grad_(), torch.ones(12, requires_grad=True)
    plan.merge(x, size.detach())[0].sum().backward()
    plan.merge(x.detach(), size)[0].sum().backward()
    plan.merge(x.detach(), size)[1].sum().backward()
    assert seen == [[True, False], [False, True], [False, True]]
    out, sizes = plan.merge(x, size.detach())
    assert out.requires_grad and not sizes.requires_grad
    with torch.no_grad():
        assert not plan.merge(x, size)[0].requires_grad


def test_autocast_leaves_tokens_alone():
    x, metric = randn(12, 4), randn(12, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = merge_plan(metric, CU, 2)
        out, size = plan.merge(x)
    assert out.dtype == size.dtype == torch.float32
    assert torch.equal(plan.source, merge_plan(metric, CU, 2).source)


def test_views_and_expanded_gradients():
    wide = randn(12, 8)
    plan = merge_plan(wide[:, ::2], CU, 2)
    assert torch.equal(plan.source, merge_plan(wide[:, ::2].contiguous(), CU.long(), 2).source)
    x = randn(8, 12).t()
    torch.testing.assert_close(plan.merge(x)[0], plan.merge(x.contiguous())[0])
    leaf = wide.clone().requires_grad_()
    for mode in ("mean", "amax"):
        out, _ = plan.merge(leaf, mode=mode)
        expanded = torch.autograd.grad(out, leaf, torch.ones(()).expand(out.shape), retain_graph=True)
        torch.testing.assert_close(expanded, torch.autograd.grad(out, leaf, torch.ones(out.shape)))


def test_second_derivatives_are_refused_by_name():
    x = randn(12, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(merge_plan(x, CU, 2).merge(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="MergePlan.merge: second derivatives"):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(merge_plan(x, CU, 2, impl="reference").merge(x)[0].square().sum(), x, create_graph=True)
    gradient.sum().backward()


def plan_with(**changes):
    return merge_plan(**{"metric": randn(12, 3), "cu_seqlens": CU, "r": 2} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metric": randn(12)}, ValueError, r"metric is torch.float32 \(12,\); it must be \[tokens, width\]"),
        ({"metric": torch.ones(12, 3, dtype=torch.int32)}, ValueError, "metric is torch.int32"),
        ({"cu_seqlens": CU.float()}, ValueError, r"cu_seqlens is torch.float32 \(4,\); it must be int32"),
        ({"cu_seqlens": CU - 1}, ValueError, "cu_seqlens starts at -1; it must start at 0"),
        ({"cu_seqlens": torch.tensor([0, 7, 5, 12])}, ValueError, "negative length"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "the segments hold 5 tokens, but there are 12 rows"),
        ({"lengths": LENGTHS[:2]}, ValueError, r"lengths has shape \(2,\)"),
        ({"lengths": torch.tensor([5, 1, 6])}, ValueError, r"lengths \[5, 1, 6\] are not those of cu_seqlens, \[5, 0, 7\]"),
        ({"lengths": LENGTHS.to("meta")}, ValueError, "must be on the CPU"),
        ({"r": -1}, ValueError, "r is -1; it must be a count of 0 or more"),
        ({"r": 1.5}, ValueError, r"a share of the tokens \(a float, 0 to 1\)"),
        ({"r": float("nan")}, ValueError, "r is nan"),
        ({"r": True}, TypeError, "r is bool"),
        ({"r": torch.tensor([1, -1, 2])}, ValueError, r"r is \[1, -1, 2\]; it must hold counts of 0 or more"),
        ({"r": torch.ones(2)}, ValueError, r"r has shape \(2,\); it must have shape \(3,\)"),
        ({"threshold": 0.5}, ValueError, "got r and threshold; pass one of them"),
        ({"protected": -1}, ValueError, "protected is -1"),
        ({"protected": 0.5}, ValueError, "protected is 0.5; it must be an int"),
        ({"total": 9}, ValueError, "total is 9; the result has 8 rows"),
        ({"total": 9, "ghost": True}, ValueError, "as many rows as the metric, 12"),
        ({"metric": randn(0, 3), "cu_seqlens": CU[:1], "ghost": True}, ValueError, "there are no segments"),
        ({"metric": torch.empty(12, 3, device="meta")}, ValueError, "move them to one device"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' is unknown; allowed: triton, cpu, reference"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        plan_with(**changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda plan: plan.merge(randn(11, 2)), ValueError, r"merge: x has shape \(11, 2\); the plan is for 12 rows"),
        (lambda plan: plan.merge(torch.ones(12, dtype=torch.int64)), TypeError, "x is torch.int64; allowed: float32"),
        (lambda plan: plan.merge(randn(12), mode="prod"), ValueError, "mode='prod' is unknown; allowed: mean, sum, amax"),
        (lambda plan: plan.merge(randn(12), torch.ones(11)), ValueError, r"size has shape \(11,\); it must have shape \(12,\)"),
        (lambda plan: plan.merge(randn(12), torch.ones(12, device="meta")), ValueError, "move them to one device"),
        (lambda plan: plan.apply(Packed.of(randn(12, 2), [7, 5])), ValueError, r"for segments of \[5, 0, 7\] .* these have \[7, 5\]"),
        (lambda plan: plan_with(r=0, threshold=0.5).apply(Packed.of(randn(12), [7, 5])), ValueError, "made for segments of"),
        (lambda plan: plan.apply(randn(12, 2)), TypeError, "packed is Tensor; it must be Packed"),
        (lambda plan: plan.unmerge(randn(12, 2)), ValueError, "unmerge: x has shape .* the plan is for 8 rows"),
    ],
)
def test_what_the_plan_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(plan_with())
