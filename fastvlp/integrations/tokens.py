"""What flows between the blocks of an accelerated tower, and how it enters, merges and leaves."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvlp.layers.token_merger import even_segments, mergeable
from fastvlp_kernels import MergePlan, Packed, _backend, merge_plan
from fastvlp_kernels.token_merge.op import IMPLEMENTATIONS

from . import exported
from .tome import distillation_order

# forward_intermediates cuts, or normalises, what a block returns.
NO_TENSOR = (
    "fastvlp.accelerate: what flows between blocks that merge or pack is no tensor [B, N, C]; forward_intermediates and others that take "
    "it for one need fastvlp.restore(model) first"
)


class Tokens(NamedTuple):
    """The tokens of a batch between two blocks. It carries everything, so that recomputing a block (checkpointing) needs nothing else.

    ``tokens[0]``, what a hook takes for a block's hidden states, is [B, N, C] as if nothing were merged or packed.

    x: [B, N', C], or [T, C] end to end where the images have different numbers of tokens; then with ``starts`` int32 [B + 1] and
    ``lengths`` int64 [B] on the CPU. shape: (B, N) of what came in. size: int32 [T] once something merged (no integer is rounded where
    FSDP casts what flows to bfloat16). source: int64, the row that each token of the first block is now in. places: int64, where those
    tokens lay among the rows of ``shape``, if some of these were padding. bias: [T] or [heads, T], added to the scores of the keys.
    """

    x: Tensor
    shape: tuple[int, int]
    size: Tensor | None = None
    source: Tensor | None = None
    starts: Tensor | None = None
    lengths: Tensor | None = None
    places: Tensor | None = None
    bias: Tensor | None = None

    def __getitem__(self, key: Any) -> Any:
        # Libraries index a block's result with [0] for its tokens; a slice of it would be taken for a tensor.
        if isinstance(key, tuple):
            raise TypeError(NO_TENSOR)
        return leave(self) if key == 0 else tuple.__getitem__(self, key)

    @classmethod
    def __torch_function__(cls, *call: Any, **more: Any) -> Any:
        raise TypeError(NO_TENSOR)

    def segments(self) -> tuple[Tensor, Tensor]:
        """cu_seqlens on the device and lengths on the CPU."""
        if self.starts is None or self.lengths is None:
            return even_segments(self.x.shape[0], self.x.shape[1], self.x.device)
        return self.starts, self.lengths

    def per_image(self, module: nn.Module, x: Tensor) -> Tensor:
        """``module``, which scales whole images (stochastic depth), applied to ``x`` of the shape of the tokens."""
        if self.lengths is None:
            return cast(Tensor, module(x))
        # Stochastic depth draws once per image: it is applied to a 1 for each, and the result spread over the image's tokens.
        counts = self.lengths.to(x.device)
        return x * module(x.new_ones(len(counts), 1)).repeat_interleave(counts, 0, output_size=x.shape[0])


def enter(x: Tensor, real: Tensor | None, bias: Tensor | None) -> Tokens:
    """Tokens [B, N, C], of which those that are ``real`` [B, N] count, with what is added to their scores [B, 1 or heads, N]."""
    shape = (x.shape[0], x.shape[1])
    if bias is not None:
        bias = bias.transpose(0, 1).flatten(1)
        bias = bias[0] if bias.shape[0] == 1 else bias
    if real is None:
        return Tokens(x, shape, bias=bias)
    packed = Packed.from_padded(x, mask=real)
    places = real.flatten().nonzero().squeeze(1)
    bias = None if bias is None else bias[..., places]
    return Tokens(packed.x, shape, starts=packed.cu_seqlens, lengths=packed.lengths, places=places, bias=bias)


def merged_away(tokens: int, r: int | float, protected: int) -> int:
    """How many of an image's tokens one block merges for ``r``; never more than half of those that are not protected, as in ToMe."""
    return min(mergeable(tokens, r, protected), max(0, (tokens - protected) // 2))


def merge(tokens: Tokens, metric: Tensor, r: int | float, protected: int) -> Tokens:
    """Merge by ``metric`` [T, d] into ToMe's order of tokens, which says whom the next block can merge."""
    rows, count = tokens.x.shape[:2]
    even = tokens.lengths is None
    # Images of equal length lose equally many, and stay a dense batch.
    gone = merged_away(count, r, protected) if even else 0
    if r == 0 or (even and gone == 0):
        return tokens
    if even and exported.exporting():
        x, size, source = exported.merge(tokens.x, tokens.size, metric, gone, protected)
        return tokens._replace(x=x, size=size, source=source if tokens.source is None else source[tokens.source])
    starts, lengths = tokens.segments()
    left = rows * (count - gone) if even else None
    # With more than two protected tokens (registers) ToMe says nothing: they and all others stay in place.
    plan = merge_plan(
        metric, starts, gone if even else r, lengths=lengths, total=left, protected=protected, keep_order=protected > 2
    )
    weights = None if tokens.size is None else tokens.size.float()
    x, size = plan.merge(tokens.x.flatten(0, 1) if even else tokens.x, weights)
    source = plan.source
    assert plan.lengths is not None
    if protected == 2:
        order = distillation_order(plan.cu_seqlens, lengths, plan.lengths, plan.total)
        x, size = torch.ops.fastvlp.token_take(x, order), size[order]
        # The rows were moved, so that what points at them has to follow.
        source = torch.empty_like(order).scatter_(0, order, torch.arange(plan.total, device=order.device))[source]
    tokens = tokens._replace(size=size.int(), source=source if tokens.source is None else source[tokens.source])
    if even:
        return tokens._replace(x=x.unflatten(0, (rows, count - gone)))
    return tokens._replace(x=x, starts=plan.cu_seqlens, lengths=plan.lengths)


def leave(tokens: Tokens) -> Tensor:
    """[B, N, C] of the shape that came in: each token is the merged token that it went to; padding is 0."""
    x = tokens.x if tokens.lengths is not None else tokens.x.flatten(0, 1)
    if tokens.source is not None:
        x = x[tokens.source] if exported.exporting() else _unmerge(x, tokens.source)
    if tokens.places is not None:
        x = x.new_zeros(tokens.shape[0] * tokens.shape[1], x.shape[1]).index_copy(0, tokens.places, x)
    return x.unflatten(0, tokens.shape)


def _unmerge(x: Tensor, source: Tensor) -> Tensor:
    """Rows [T', C] of all mergings together -> [T, C]; a plan's own operator, whose backward is a sum in fixed order."""
    order = source.argsort(stable=True)
    starts = torch.searchsorted(source[order], torch.arange(x.shape[0] + 1, device=x.device))
    impl = _backend.choose("merge_plan", None, x.device, IMPLEMENTATIONS)
    return MergePlan(source, order, starts, starts[:1].int(), None, x.shape[0], impl).unmerge(x)
