"""What flows between the blocks of an accelerated tower, and how it enters, merges, attends and leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvlp.layers.patch_dropout import patch_dropout
from fastvlp.layers.token_merger import even_segments, mergeable
from fastvlp_kernels import MergePlan, Packed, _backend, merge_plan, packed_attention
from fastvlp_kernels.token_merge.op import IMPLEMENTATIONS

from .instances import OPTIONS

# forward_intermediates cuts, or normalises, what a block returns.
NO_TENSOR = (
    "fastvlp.accelerate: what flows between blocks that merge or pack is no tensor [B, N, C]; forward_intermediates and others that take "
    "it for one need report.restore() first"
)


class Tokens(NamedTuple):
    """The tokens of a batch between two blocks. It carries everything, so that recomputing a block (checkpointing) needs nothing else.

    x: [B, N, C], or [T, C] end to end where the images have different numbers of tokens; then with ``starts`` int32 [B + 1] and ``lengths``
    int64 [B] on the CPU. size: float32 [T] once something merged. source: int64, the row that each token of the first block is now in.
    places: int64, where those tokens lay among the rows of ``shape`` = (B, N), if some of these were padding.
    """

    x: Tensor
    size: Tensor | None
    source: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    places: Tensor | None
    shape: tuple[int, int]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            raise TypeError(NO_TENSOR)
        return tuple.__getitem__(self, key)

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
        counts = self.lengths.to(x.device)
        return x * module(x.new_ones(len(counts), 1)).repeat_interleave(counts, 0, output_size=x.shape[0])


class Call:
    """One call of an accelerated attention: its tokens, and afterwards its keys averaged over the heads, [T, d]."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.metric: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """How a library writes its blocks.

    halves: (block, x, attend, tokens) -> x + attention, and (block, x, tokens) -> x + MLP. mask: the place of the attention mask among the
    arguments after x, and its name. attention: the block's attribute. qkv: (attention, x [..., C]) -> q, k, v [..., H, d].
    project: (attention, out [..., H * d], x) -> [..., C]. pair: whether the attention returns (out, weights). dropout: of its weights.
    """

    attend: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    mask: tuple[int, str]
    attention: str
    qkv: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    project: Callable[[Any, Tensor, Tensor], Tensor]
    pair: bool
    dropout: Callable[[Any], float]


@dataclass(frozen=True)
class Step:
    """What one block was asked to do: merge r tokens (a count or a share), drop a share of the patches, attend and keep tokens packed."""

    family: Family
    merge: int | float
    drop: float
    packed: bool
    pack: bool
    merging: bool
    protected: int
    last: bool


def block_forward(cls: Any) -> Callable[..., Any]:
    """The forward of a block whose tokens may be packed, merged and dropped."""
    original = cls.forward

    @wraps(original)
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        step: Step = getattr(self, OPTIONS)
        if not isinstance(x, Tokens):
            place, name = step.family.mask
            mask = kwargs.get(name, args[place] if len(args) > place else None)
            if step.drop and self.training:
                if mask is not None:
                    raise ValueError("fastvlp.accelerate: drop= takes batches without padding, but this one came with an attention mask")
                x = patch_dropout(x, step.drop, step.protected, ordered=True)[0]
            if not (step.merging or step.packed or (step.pack and mask is not None)):
                return original(self, x, *args, **kwargs)
            if kwargs.get("is_causal"):
                raise ValueError("fastvlp.accelerate: this block was called with is_causal=True; merged and packed tokens see each other")
            attention = getattr(self, step.family.attention)
            if kwargs.get("output_attentions", getattr(getattr(attention, "config", None), "output_attentions", False)):
                raise ValueError(
                    "fastvlp.accelerate: output_attentions=True asks for weights that packed_attention never has; call report.restore()"
                )
            x = _enter(x, mask)
        call = Call(x)

        def attend(y: Tensor) -> Tensor:
            out = getattr(self, step.family.attention)(y, call)
            return out[0] if step.family.pair else out

        x = _merge(x._replace(x=step.family.attend(self, x.x, attend, x)), call.metric, step)
        x = x._replace(x=step.family.mlp(self, x.x, x))
        return _leave(x) if step.last else x

    return forward


def attention_forward(cls: Any) -> Callable[..., Any]:
    """The forward of an attention that, called by an accelerated block, computes by ``packed_attention``."""
    original = cls.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or not isinstance(args[1], Call):
            return original(self, *args, **kwargs)
        x, call = args
        family = getattr(self, OPTIONS).family
        if self.training and family.dropout(self):
            raise ValueError(
                f"fastvlp.accelerate: this {cls.__name__} drops attention weights in training (p={family.dropout(self)}), which packed "
                "attention does not; set that dropout to 0 or call eval()"
            )
        q, k, v = (part.flatten(0, -3) for part in family.qkv(self, x))
        starts, lengths = call.tokens.segments()
        out = packed_attention(q, k, v, starts, key_size=call.tokens.size, lengths=lengths)
        call.metric = k.detach().mean(1)
        out = family.project(self, cast(Tensor, out).reshape(*x.shape[:-1], v.shape[1] * v.shape[2]), x)
        return (out, None) if family.pair else out

    return forward


def _enter(x: Tensor, mask: Tensor | None) -> Tokens:
    shape = (x.shape[0], x.shape[1])
    if mask is None:
        return Tokens(x, None, None, None, None, None, shape)
    real = _real(mask, shape)
    packed = Packed.from_padded(x, mask=real)
    places = real.flatten().nonzero().squeeze(1)
    return Tokens(packed.x, None, None, packed.cu_seqlens, packed.lengths, places, shape)


def _real(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """bool [B, N]: which tokens the attention mask (boolean, or added to the scores) leaves as keys."""
    batch, tokens = shape
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if allowed.ndim == 4 and allowed.shape[1] == 1 and allowed.shape[3] == tokens and allowed.shape[2] in (1, tokens):
        allowed = allowed[:, 0].expand(batch, -1, -1)
        real = allowed.any(1)
        if allowed.shape[1] == 1 or bool(((allowed == real[:, None]) | ~real[:, :, None]).all()):
            return real
    raise ValueError(
        f"fastvlp.accelerate: the attention mask {tuple(mask.shape)} hides more than padding; allowed are masks [B, 1, 1 or N, N] "
        "that hide the same tokens from all others (for other masks leave merge, pack and attention out)"
    )


def _merge(tokens: Tokens, metric: Tensor | None, step: Step) -> Tokens:
    assert metric is not None
    rows, count = tokens.shape
    total = None
    if tokens.lengths is None:
        rows, count = tokens.x.shape[:2]
        left = count - mergeable(count, step.merge, step.protected)
        total = rows * left
    if step.merge == 0 or total == rows * count:
        return tokens
    starts, lengths = tokens.segments()
    # ToMe's order leaves one protected token in front, but not several.
    plan = merge_plan(
        metric, starts, step.merge, lengths=lengths, total=total, protected=step.protected, keep_order=step.protected > 1
    )
    x, size = plan.merge(tokens.x if total is None else tokens.x.flatten(0, 1), tokens.size)
    source = plan.source if tokens.source is None else plan.source[tokens.source]
    if total is None:
        return tokens._replace(x=x, size=size, source=source, starts=plan.cu_seqlens, lengths=plan.lengths)
    return tokens._replace(x=x.unflatten(0, (rows, left)), size=size, source=source)


def _leave(tokens: Tokens) -> Tensor:
    """[B, N, C] of the shape that came in: each token is the merged token that it went to; padding is 0."""
    x = tokens.x if tokens.lengths is not None else tokens.x.flatten(0, 1)
    if tokens.source is not None:
        x = _unmerge(x, tokens.source)
    if tokens.places is not None:
        x = x.new_zeros(tokens.shape[0] * tokens.shape[1], x.shape[1]).index_copy(0, tokens.places, x)
    return x.unflatten(0, tokens.shape)


def _unmerge(x: Tensor, source: Tensor) -> Tensor:
    """Rows [T', C] of all mergings together -> [T, C]; a plan's own operator, whose backward is a sum in fixed order."""
    order = source.argsort(stable=True)
    starts = torch.searchsorted(source[order], torch.arange(x.shape[0] + 1, device=x.device))
    impl = _backend.choose("merge_plan", None, x.device, IMPLEMENTATIONS)
    return MergePlan(source, order, starts, starts[:1].int(), None, x.shape[0], impl).unmerge(x)
