"""The forward of an accelerated block and of its attention, for every library's way of writing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

from torch import Tensor

from fastvlp.layers.patch_dropout import patch_dropout
from fastvlp.layers.transformer import bare
from fastvlp_kernels import packed_attention, residual_norm

from . import exported
from .instances import OPTIONS
from .tokens import Tokens, enter, leave, merge

# Layer norms that have statistics in float32 and give what F.layer_norm does, in the dtype of the tokens.
NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm", "open_clip.transformer.LayerNorm",
         "open_clip.transformer.LayerNormFp32")  # fmt: skip
KNOWN = ("is_causal", "output_attentions", "output_hidden_states")


class Call:
    """One call of an accelerated attention: its tokens, and afterwards its keys averaged over the heads, [T, d]."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.metric: Tensor | None = None


@dataclass(frozen=True)
class Family:
    """How a library writes its blocks.

    Attributes:
        attend, mlp: what the halves add to x: (block, x, attend, tokens) -> attention of x, and (block, normed, tokens) -> MLP of the
            normalised x. norm: the block's attribute that normalises it.
        mask: the place of the attention mask among the arguments after x, and its name. read: (mask, (B, N)) -> what it says.
        open: whether blocks take any keywords and hand them on. attention: the block's attribute.
        qkv: (attention, x [..., C]) -> q, k, v [..., H, d]. project: (attention, out [..., H * d], x) -> [..., C].
        pair: whether the attention returns (out, weights). dropout: of the attention's weights. scale: of its scores.
    """

    attend: Callable[..., Tensor]
    norm: str
    mlp: Callable[..., Tensor]
    mask: tuple[int, str]
    read: Callable[[Any, tuple[int, int]], tuple[Tensor | None, Tensor | None]]
    open: bool
    attention: str
    qkv: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    project: Callable[[Any, Tensor, Tensor], Tensor]
    pair: bool
    dropout: Callable[[Any], float]
    scale: Callable[[Any], float | None]


@dataclass(frozen=True)
class Step:
    """What one block was asked to do.

    Attributes:
        merge: how many tokens it merges (a count or a share). merging: whether any block does. last: it is the last one.
        drop: the share of the patches that it loses in training. thinned: its tower hides them by the mask instead.
        packed: attend by packed_attention. pack: leave padding out. protected: how many leading tokens never merge.
    """

    family: Family
    merge: int | float
    merging: bool
    drop: float
    thinned: bool
    packed: bool
    pack: bool
    protected: int
    last: bool


def block_forward(cls: Any) -> Callable[..., Any]:
    """The forward of a block whose tokens may be packed, merged and dropped."""
    original = cls.forward

    @wraps(original)
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        step: Step | None = getattr(self, OPTIONS, None)
        if step is None:
            return original(self, x, *args, **kwargs)
        carried = isinstance(x, Tokens)
        if not carried:
            if isinstance(x, tuple):
                raise ValueError(
                    "fastvlp.accelerate: merged or packed tokens came as a plain tuple, as from checkpointing with use_reentrant=True, "
                    "which would lose their gradients; pass use_reentrant=False"
                )
            place, name = step.family.mask
            mask = kwargs.get(name, args[place] if len(args) > place else None)
            if step.drop and self.training:
                x = _dropped(self, x, mask, step, kwargs)
            # Without a mask nothing is padded, and packing would only cost.
            packs = mask is not None and (step.pack or (step.thinned and self.training))
            # Who reads an exported model has none of our operators, and packing changes no number.
            if not step.merging and (exported.exporting() or not (step.packed or packs)):
                return original(self, x, *args, **kwargs)
            _refuse(self, step, args, kwargs)
            if mask is not None and exported.exporting():
                exported.unpadded(mask)
                mask = None
            real, bias = (None, None) if mask is None else step.family.read(mask, (x.shape[0], x.shape[1]))
            if bias is not None and step.merging:
                raise ValueError(
                    "fastvlp.accelerate: the attention mask adds to the scores of keys, which merge= cannot do for merged tokens; leave "
                    "merge out"
                )
            x = enter(x, real, bias)
            carried = step.merging or mask is not None
        # The attention module is called as always, with one more argument: hooks and wrappers around it (LoRA, FSDP) keep working.
        call = Call(x)

        def attend(y: Tensor) -> Tensor:
            out = getattr(self, step.family.attention)(y, call)
            return out[0] if step.family.pair else out

        branch, norm = step.family.attend(self, x.x, attend, x), getattr(self, step.family.norm)
        if step.merge or exported.exporting() or not _plain_norm(norm):
            x = x._replace(x=x.x + branch)
            if step.merge:
                x = merge(x, cast(Tensor, call.metric), step.merge, step.protected)
            normed = norm(x.x)
        else:
            normed, total = residual_norm(x.x, branch, norm.weight, norm.bias, eps=norm.eps)
            x = x._replace(x=total)
        x = x._replace(x=x.x + step.family.mlp(self, normed, x))
        return x if carried and not step.last else leave(x)

    return forward


def _plain_norm(norm: Any) -> bool:
    """Whether ``residual_norm`` computes what calling this norm does, which nothing watches."""
    name = f"{type(norm).__module__}.{type(norm).__qualname__}"
    return name in NORMS and bare(norm, type(norm)) and norm.weight is not None and len(norm.normalized_shape) == 1


def _dropped(block: Any, x: Tensor, mask: Any, step: Step, kwargs: dict[str, Any]) -> Tensor:
    if mask is not None:
        raise ValueError("fastvlp.accelerate: drop= takes batches without padding here, but this one came with an attention mask")
    if _wanted(block, step, "output_hidden_states", kwargs):
        raise ValueError(
            "fastvlp.accelerate: output_hidden_states=True asks for all patches, of which drop= loses some in training; call eval() or "
            "fastvlp.restore(model)"
        )
    return patch_dropout(x, step.drop, step.protected, ordered=True)[0]


def _refuse(block: Any, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what merged and packed tokens cannot give."""
    if kwargs.get("is_causal"):
        raise ValueError("fastvlp.accelerate: this block was called with is_causal=True; merged and packed tokens see each other")
    if _wanted(block, step, "output_attentions", kwargs):
        raise ValueError(
            "fastvlp.accelerate: output_attentions=True asks for weights that packed_attention never has; call fastvlp.restore(model)"
        )
    place, name = step.family.mask
    others = [f"argument {i + 2}" for i, given in enumerate(args) if i != place and given is not None]
    if not step.family.open:
        others += [key for key, given in kwargs.items() if key != name and key not in KNOWN and given is not None]
    if others:
        raise ValueError(f"fastvlp.accelerate: this {type(block).__name__} was called with {', '.join(others)}, which is not supported")


def _wanted(block: Any, step: Step, flag: str, kwargs: dict[str, Any]) -> bool:
    config = getattr(getattr(block, step.family.attention), "config", None)
    return bool(kwargs.get(flag, getattr(config, flag, False)))


def attention_forward(cls: Any) -> Callable[..., Any]:
    """The forward of an attention that, called by an accelerated block, computes by ``packed_attention``."""
    original = cls.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or not isinstance(args[1], Call):
            return original(self, *args, **kwargs)
        x, call = args
        family: Family = getattr(self, OPTIONS).family
        tokens, scale, dropout = call.tokens, family.scale(self), family.dropout(self) if self.training else 0.0
        q, k, v = family.qkv(self, x)
        if tokens.lengths is None and (dropout or exported.exporting()):
            out = exported.attend(q, k, v, tokens.size, tokens.bias, scale, dropout)
        else:
            starts, lengths = tokens.segments()
            size = None if tokens.size is None else tokens.size.float()
            flat_q, flat_k, flat_v = (part.flatten(0, -3) for part in (q, k, v))
            out = cast(Tensor, packed_attention(
                flat_q, flat_k, flat_v, starts, key_size=size, key_bias=tokens.bias, scale=scale, lengths=lengths, dropout_p=dropout
            ))  # fmt: skip
        # Matching (ToMe) compares keys; the mean over heads is the authors'.
        call.metric = k.detach().mean(-2).flatten(0, -2)
        out = family.project(self, out.reshape(*x.shape[:-1], v.shape[-2] * v.shape[-1]), x)
        return (out, None) if family.pair else out

    return forward


def thinned_forward(cls: Any) -> Callable[..., Any]:
    """The forward of a padded tower that in training drops patches by hiding them in ``pixel_attention_mask``, from blocks and pooling."""
    original = cls.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        drop = getattr(self, OPTIONS, 0.0)
        if drop and self.training:
            if len(args) > 1:
                args = (args[0], thin(args[1], drop), *args[2:])
            else:
                kwargs["pixel_attention_mask"] = thin(kwargs.get("pixel_attention_mask"), drop)
        return original(self, *args, **kwargs)

    return forward


def thin(mask: Any, drop: float) -> Tensor:
    """``mask`` [B, N] (not 0: a real patch) with max(1, int(n (1 - drop))) random ones left of the n real patches of each image."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(f"fastvlp.accelerate: drop= needs pixel_attention_mask [B, N], which says the patches; got {type(mask).__name__}")
    real = mask != 0
    kept = (real.sum(1).double() * (1 - drop)).long().clamp_min(1)
    draws = real.new_zeros(mask.shape).float().uniform_().masked_fill(~real, -1)
    # argsort twice gives each patch its rank; padding, drawn below all others, has the last ranks.
    ranks = draws.argsort(1, descending=True).argsort(1)
    return mask * (real & (ranks < kept[:, None])).to(mask.dtype)
