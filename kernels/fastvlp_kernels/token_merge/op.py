"""``merge_plan``: bipartite soft matching of tokens inside each segment (ToMe), and the operators that merge by its plan."""

import torch
from torch import Tensor

from fastvlp_kernels import _check, _op
from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels._ragged import check_protected, check_segments, counted, host_lengths, number_of_tokens

from . import cpu, reference
from .plan import MergePlan

IMPLEMENTATIONS = ("triton", "cpu", "reference")
NO_GHOST, NEW_GHOST, OLD_GHOST = 0, 1, 2


@_op.custom_op("token_match")
def _match(
    metric: Tensor, cu_seqlens: Tensor, lengths: Tensor | None, r: float, share: bool, each: Tensor | None, threshold: float | None,
    protected: int, keep_order: bool, ghost: int, rows: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, device = metric.shape[0], metric.device
    lengths = host_lengths("merge_plan", cu_seqlens, lengths, tokens)
    # With a ghost the kernel counts on the device; without one the host must know the rows.
    if impl != "triton" or ghost == NO_GHOST:
        most = _most(lengths if each is None else lengths.to(each.device), r, share, each, threshold, protected, ghost)
        if ghost == NO_GHOST and rows != tokens - int(most.sum()):
            needed = tokens - int(most.sum())
            raise ValueError(f"merge_plan: total is {rows}; the result has {needed} rows, pass that or leave total out")
    if impl == "triton":
        longest = int(lengths.max()) if len(lengths) else 0
        match = _op.module(__package__, impl).match
        return match(metric, cu_seqlens, longest, r, share, each, threshold, protected, keep_order, ghost, rows)
    if impl == "reference":
        found = reference.match(metric, lengths.tolist(), most.tolist(), threshold, protected, keep_order, rows)
        source, order, starts, merged = (torch.tensor(part, dtype=torch.int64, device=device) for part in found)
        return source, order, starts, _starts(lengths.to(device) - merged, ghost, rows)
    row, gone, merged = cpu.match(metric, lengths, most.to(device), threshold, protected, keep_order)
    cu_new = _starts(lengths.to(device) - merged, ghost, rows)
    source = row + cu_new[: len(lengths)].long().repeat_interleave(lengths.to(device), output_size=tokens)
    return source, *cpu.listing(source, gone, rows), cu_new


@_match.register_fake
def _(metric, cu_seqlens, lengths, r, share, each, threshold, protected, keep_order, ghost, rows, impl):
    tokens, segments = metric.shape[0], cu_seqlens.shape[0] - 1
    source, order = (metric.new_empty(tokens, dtype=torch.int64) for _ in range(2))
    cu_new = metric.new_empty(segments + (2 if ghost == NEW_GHOST else 1), dtype=torch.int32)
    return source, order, metric.new_empty(rows + 1, dtype=torch.int64), cu_new


def _most(
    lengths: Tensor, r: float, share: bool, each: Tensor | None, threshold: float | None, protected: int, ghost: int
) -> Tensor:
    """How many tokens of each segment may be merged away: no more than wanted, and none where there is nothing to merge into."""
    candidates = ((lengths + 1) // 2 - (protected + 1) // 2).clamp_min(0)
    # No free token of odd place: there is nothing to merge into.
    candidates = torch.where(lengths // 2 > protected // 2, candidates, 0)
    if threshold is None:
        candidates = torch.minimum(candidates, counted(lengths, r, share, each)).clamp_min(0)
    if ghost == OLD_GHOST:
        candidates = torch.cat((candidates[:-1], candidates[-1:] * 0))
    return candidates


def _with_ghost(lengths: Tensor, ghost: int, rows: int) -> Tensor:
    """The lengths of the result: a ghost segment takes the rows that are left over."""
    if ghost == NO_GHOST:
        return lengths
    real = lengths[:-1] if ghost == OLD_GHOST else lengths
    return torch.cat((real, rows - real.sum(0, keepdim=True)))


def _starts(lengths: Tensor, ghost: int, rows: int) -> Tensor:
    lengths = _with_ghost(lengths, ghost, rows)
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()


@_op.custom_op("token_merge")
def _merge(
    x: Tensor, size: Tensor | None, source: Tensor, order: Tensor, starts: Tensor, mode: str, impl: str
) -> tuple[Tensor, Tensor]:
    return _op.module(__package__, impl).merge(x, size, order, starts, mode)


@_merge.register_fake
def _(x, size, source, order, starts, mode, impl):
    rows = starts.shape[0] - 1
    return x.new_empty(rows, x.shape[1]), x.new_empty(rows, dtype=torch.float32 if size is None else sum_dtype(size.dtype))


@_op.custom_op("token_merge_backward")
def _merge_backward(
    grad: Tensor, grad_size: Tensor, x: Tensor, size: Tensor | None, out: Tensor, size_out: Tensor, source: Tensor, order: Tensor,
    starts: Tensor, mode: str, needs: list[bool], impl: str,
) -> tuple[Tensor, Tensor]:
    return _op.module(__package__, impl).merge_backward(grad, grad_size, x, size, out, size_out, source, order, starts, mode, needs)


@_merge_backward.register_fake
def _(grad, grad_size, x, size, out, size_out, source, order, starts, mode, needs, impl):
    dsize = size_out if size is None else size
    return x.new_empty(x.shape if needs[0] else 0), dsize.new_empty(dsize.shape if needs[1] else 0)


def _setup(ctx, inputs, output) -> None:
    x, size, source, order, starts, ctx.mode, ctx.impl = inputs
    ctx.save_for_backward(x, size, *output, source, order, starts)
    if size is None or not size.requires_grad:
        # Sums of sizes that nobody trains are constants.
        ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, grad_size):
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    x, size, *saved = ctx.saved_tensors
    dx, dsize = torch.ops.fastvlp.token_merge_backward(grad, grad_size, x, size, *saved, ctx.mode, needs, ctx.impl)
    return dx if needs[0] else None, dsize if needs[1] else None, None, None, None, None, None


_op.differentiate("MergePlan.merge", _merge, _merge_backward, _setup, _backward)


@_op.custom_op("token_unmerge")
def _unmerge(x: Tensor, source: Tensor, order: Tensor, starts: Tensor, impl: str) -> Tensor:
    return x.index_select(0, source)


@_unmerge.register_fake
def _(x, source, order, starts, impl):
    return x.new_empty(source.shape[0], x.shape[1])


def _setup_unmerge(ctx, inputs, output) -> None:
    _, source, order, starts, ctx.impl = inputs
    ctx.save_for_backward(source, order, starts)


def _backward_unmerge(ctx, grad):
    # The transpose of giving every token its row: rows sum over their tokens, in fixed order.
    return torch.ops.fastvlp.token_merge(grad, None, *ctx.saved_tensors, "sum", ctx.impl)[0], None, None, None, None


_unmerge.register_autograd(_backward_unmerge, setup_context=_setup_unmerge)


@torch.no_grad()
def merge_plan(
    metric: Tensor,
    cu_seqlens: Tensor,
    r: int | float | Tensor = 0,
    *,
    lengths: Tensor | None = None,
    total: int | None = None,
    threshold: float | None = None,
    protected: int = 0,
    keep_order: bool = True,
    ghost: bool = False,
    impl: str | None = None,
) -> MergePlan:
    """Match similar tokens inside each segment, as ToMe does (https://arxiv.org/abs/2210.09461): a plan for merging them.

    Tokens of even place within their segment are matched to the most similar token of odd place (cosine, in float32; of equals the
    first), and the r most similar of them (of equals the first) merge into their match. Without gradient and deterministic. A token
    whose norm is 0 or not finite has similarity 0 to all.

    Args:
        metric: [T, d], what is compared: in ToMe the keys, averaged over the heads.
        cu_seqlens: int32 or int64 [S+1]: where each segment starts, then T.
        r: how many tokens each segment loses: a count (int), or a share of its length (float, 0 to 1), rounded down; or a tensor [S] of
            counts (integers) or shares (floating point). Never more than it has tokens of even place outside the protected prefix; none
            where no token of odd place lies outside.
        lengths: integers [S] on the CPU, what cu_seqlens says (``Packed.lengths``). Without them the lengths are read from
            cu_seqlens, which on a CUDA device costs a synchronisation.
        total: how many rows the result has, for torch.compile, which cannot read it from the lengths. None: counted.
        threshold: merge every token whose match has at least this similarity, instead of r of them.
        protected: the first tokens of each segment that neither merge away nor are merged into: 1 for a class token.
        keep_order: True: tokens that stay keep their order. False: ToMe's: the tokens of even place that stay, most similar first (or, with
            protected tokens, in their order), then those of odd place.
        ghost: the last segment is a ghost, as an earlier plan left it: nothing in it merges, and it takes the rows that become free.
        impl: "triton", "cpu", "reference"; None takes the first that runs on the device.

    Returns:
        A :class:`MergePlan`. Where the host cannot know the lengths of the result (by threshold, or by a tensor r on a CUDA device), or
        with ``ghost``, the result has T rows, and those that hold no token lie in a ghost segment at the end: there is one segment more
        than before unless ``ghost`` says that the last one is it.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; r and threshold at once; total is not what the result has.
        RuntimeError: ``impl`` cannot run here.
    """
    op = "merge_plan"
    cu_seqlens = check_segments(op, "metric", metric, cu_seqlens, lengths)
    segments = cu_seqlens.shape[0] - 1
    number, share, each = number_of_tokens(op, "r", r, segments)
    _check_options(op, metric, r, threshold, protected, ghost, segments)
    # A threshold merges as many as are similar, which only the device knows: the result keeps its capacity, with a ghost behind.
    known = threshold is None and (each is None or each.device.type == "cpu")
    kind = OLD_GHOST if ghost else NO_GHOST if known else NEW_GHOST
    chosen = _op.choose(op, impl, metric.device, IMPLEMENTATIONS, (metric.dtype,))
    after = before = None
    if lengths is None and (known or cu_seqlens.device.type == "cpu"):
        # The shape of the result depends on the lengths: without them on the host this is the one wait for the device.
        lengths = cu_seqlens.cpu().diff()
    if lengths is not None:
        before = lengths.long()
    if known and before is not None:
        most = _most(before, number, share, each, threshold, protected, kind)
        after = _with_ghost(before - most, kind, metric.shape[0])
    rows = metric.shape[0]
    if kind == NO_GHOST and after is not None:
        rows = int(after.sum()) if total is None else total
    elif total is not None and total != rows:
        raise ValueError(f"{op}: total is {total}; a result with a ghost segment has as many rows as the metric, {rows}")
    source, order, starts, cu_new = torch.ops.fastvlp.token_match(
        metric.detach(), cu_seqlens, lengths, number, share, each, threshold, protected, keep_order, kind, rows, chosen
    )
    if after is None and cu_new.device.type == "cpu":
        after = cu_new.diff().long()
    return MergePlan(source, order, starts, cu_new, after, rows, chosen, before)


def _check_options(
    op: str, metric: Tensor, r: int | float | Tensor, threshold: float | None, protected: int, ghost: bool, segments: int
) -> None:
    if metric.ndim != 2 or metric.dtype not in _check.FLOATS:
        allowed = "float32, bfloat16, float16 (or float64 on the CPU)"
        raise ValueError(f"{op}: metric is {metric.dtype} {tuple(metric.shape)}; it must be [tokens, width] in {allowed}")
    if threshold is not None and (isinstance(r, Tensor) or r != 0):
        raise ValueError(f"{op}: got r and threshold; pass one of them")
    check_protected(op, protected)
    if ghost and segments == 0:
        raise ValueError(f"{op}: ghost=True says that the last segment is a ghost, but there are no segments")
