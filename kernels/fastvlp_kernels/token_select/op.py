"""``token_select``: keep the tokens of highest score of each segment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp_kernels import _check, _op
from fastvlp_kernels._ragged import check_protected, check_segments, counted, host_lengths, number_of_tokens
from fastvlp_kernels.packed import Packed, check_segments_of

from . import cpu, reference

NAME = "token_select"
IMPLEMENTATIONS = ("triton", "cpu", "cuda", "reference")  # "cuda" after one that always runs, so by name only: no GPU has timed it yet


@_op.custom_op(NAME)
def _select(
    scores: Tensor, cu_seqlens: Tensor, lengths: Tensor | None, keep: float, share: bool, each: Tensor | None, protected: int, total: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    lengths = host_lengths(NAME, cu_seqlens, lengths, scores.shape[0])
    counts = _counts(lengths, keep, share, each, protected)
    if total != int(counts.sum()):
        raise ValueError(f"token_select: total is {total}; {int(counts.sum())} tokens are kept, pass that or leave total out")
    if impl in ("triton", "cuda"):
        longest = int(lengths.max()) if len(lengths) else 0
        return _op.module(__package__, impl).select(scores, cu_seqlens, longest, keep, share, each, protected, total)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(scores.device, torch.int32)
    if impl == "reference":
        return reference.select(scores, lengths.tolist(), counts.tolist(), protected), starts
    return cpu.select(scores, lengths, counts, protected, total), starts


@_select.register_fake
def _(scores, cu_seqlens, lengths, keep, share, each, protected, total, impl):
    return scores.new_empty(total, dtype=torch.int64), scores.new_empty(cu_seqlens.shape[0], dtype=torch.int32)


def _counts(lengths: Tensor, keep: float, share: bool, each: Tensor | None, protected: int) -> Tensor:
    return torch.minimum(counted(lengths, keep, share, each).clamp_min(protected), lengths)


@_op.custom_op("token_take")
def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


@_take.register_fake
def _(x, index):
    return x.new_empty(index.shape[0], *x.shape[1:])


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors  # no token twice: a copy, where index_select would add
    return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


_take.register_autograd(_backward, setup_context=_setup)


@dataclass(frozen=True)
class TokenSelection:
    """The tokens that :func:`token_select` keeps.

    Attributes:
        index: int64 [T'], ascending. cu_seqlens: int32 [S+1] on the device. lengths: int64 [S] on the CPU.
        tokens: T, how many there were. before: int64 [S] on the CPU, the lengths of the segments that they were chosen from.
    """

    index: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    tokens: int
    before: Tensor

    def take(self, x: Tensor) -> Tensor:
        """The kept rows of ``x`` [T, ...]: [T', ...], differentiable."""
        _check.plain_tensors("TokenSelection.take", index=self.index, x=x)
        if x.ndim == 0 or x.shape[0] != self.tokens:
            raise ValueError(f"TokenSelection.take: x has shape {tuple(x.shape)}; the selection is of {self.tokens} rows")
        # The custom operator has no forward-mode derivative; plain indexing has.
        if _op.has_tangent(x):
            return x.index_select(0, self.index)
        return torch.ops.fastvlp.token_take(x, self.index)

    def apply(self, packed: Packed) -> Packed:
        """The kept tokens of a packed batch, with their sizes and positions.

        Raises:
            ValueError, TypeError: its segments are not those of the scores.
        """
        check_segments_of("TokenSelection.apply", packed, self.before)
        size, pos = (None if t is None else self.take(t) for t in (packed.size, packed.pos))
        # A length read here would be baked into the graph; the longest of before bounds that of after.
        if torch.compiler.is_compiling():
            longest = packed.max_seqlen
        else:
            longest = int(self.lengths.max()) if len(self.lengths) else 0
        return dataclasses.replace(
            packed, x=self.take(packed.x), cu_seqlens=self.cu_seqlens, lengths=self.lengths, total=self.index.shape[0],
            max_seqlen=longest, size=size, pos=pos,
        )  # fmt: skip


@torch.no_grad()
def token_select(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep: int | float | Tensor,
    *,
    lengths: Tensor | None = None,
    total: int | None = None,
    protected: int = 0,
    impl: str | None = None,
) -> TokenSelection:
    """Keep the tokens of highest score in each segment (of equals the first), in their order. Random scores drop at random.

    Scores are compared in float32 (float64 for float64), have no gradient here, and NaN is the lowest.

    Args:
        scores: [T] floating point: attention a token receives (PyramidDrop, FastV), random numbers (FLIP, PatchDropout).
        cu_seqlens: int32 or int64 [S+1]: where each segment starts, then T.
        keep: how many tokens of each segment stay, protected ones among them: a count (int), or a share of its length, rounded down (float
            from 0 to 1); or a tensor [S] of counts (integers) or shares (floating point), on the CPU, else reading it costs a
            synchronisation. A shorter segment stays whole.
        lengths: integers [S] on the CPU, what cu_seqlens says (``Packed.lengths``). Without them the lengths are read from
            cu_seqlens, which on a CUDA device costs a synchronisation.
        total: how many tokens are kept in all, for torch.compile, which cannot read it from the lengths. None: counted.
        protected: the first tokens of each segment that stay whatever their scores (and however low ``keep`` is): 1 for a class token.
        impl: "triton", "cpu", "cuda" (through CuPy; one launch, linear in the length of a segment), "reference"; None takes the first
            that runs on the device.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; total is not what is kept.
        RuntimeError: ``impl`` cannot run here.
    """
    op = NAME
    cu_seqlens = check_segments(op, "scores", scores, cu_seqlens, lengths)
    number, share, each = number_of_tokens(op, "keep", keep, cu_seqlens.shape[0] - 1)
    if scores.ndim != 1 or scores.dtype not in _check.FLOATS:
        raise ValueError(f"{op}: scores are {scores.dtype} {tuple(scores.shape)}; they must be [tokens], floating point")
    check_protected(op, protected)
    # The number of tokens that stay is the shape of the result, so the host has to know it.
    each = None if each is None else each.cpu()
    chosen = _op.choose(op, impl, scores.device, IMPLEMENTATIONS, (scores.dtype,))
    host = (cu_seqlens.cpu().diff() if lengths is None else lengths).long()
    after = _counts(host, number, share, each, protected)
    total = int(after.sum()) if total is None else total
    index, starts = torch.ops.fastvlp.token_select(
        scores.detach(), cu_seqlens, host, number, share, each, protected, total, chosen
    )
    return TokenSelection(index, starts, after, scores.shape[0], host)
