"""The image towers of timm, open_clip and transformers that ``fastvlp.accelerate`` knows, and how their blocks are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Family
from .masks import read_mask
from .tokens import Tokens

Attend = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tower:
    """An image tower.

    Attributes:
        blocks: by name. family: how they are written. prefix: leading tokens (class, registers). tokens: all of them, if it says.
        module: the tower itself. drops: the share of patches that it drops itself. padded: its pooling takes a mask of the tokens.
    """

    blocks: Sequence[tuple[str, nn.Module]]
    family: Family
    prefix: int
    tokens: int | None
    module: nn.Module
    drops: float = 0.0
    padded: bool = False


def _timm_attend(block: Any, x: Tensor, attend: Attend, tokens: Tokens) -> Tensor:
    return tokens.per_image(block.drop_path1, block.ls1(attend(block.norm1(x))))


def _timm_mlp(block: Any, normed: Tensor, tokens: Tokens) -> Tensor:
    return tokens.per_image(block.drop_path2, block.ls2(block.mlp(normed)))


def _timm_qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).unbind(-3)
    return attention.q_norm(q), attention.k_norm(k), v


def _timm_project(attention: Any, out: Tensor, x: Tensor) -> Tensor:
    out = attention.norm(out)
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    projected: Tensor = attention.proj_drop(attention.proj(out))
    return projected


def _open_clip_attend(block: Any, x: Tensor, attend: Attend, tokens: Tokens) -> Tensor:
    out = attend(block.ln_1(x))
    branch: Tensor = block.ls_1(block.ln_attn(out) if hasattr(block, "ln_attn") else out)
    return branch


def _open_clip_mlp(block: Any, normed: Tensor, tokens: Tokens) -> Tensor:
    branch: Tensor = block.ls_2(block.mlp(normed))
    return branch


def _open_clip_qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
    if isinstance(attention, nn.MultiheadAttention):
        return q, k, v
    return attention.ln_q(q), attention.ln_k(k), v


def _open_clip_project(attention: Any, out: Tensor, x: Tensor) -> Tensor:
    if not isinstance(attention, nn.MultiheadAttention):
        if attention.head_scale is not None:
            out = (out.unflatten(-1, (attention.num_heads, -1)) * attention.head_scale.squeeze(-1)).flatten(-2)
        out = attention.ln_inner(out)
    projected: Tensor = attention.out_proj(out)
    return projected if isinstance(attention, nn.MultiheadAttention) else attention.out_drop(projected)


def _clip_attend(block: Any, x: Tensor, attend: Attend, tokens: Tokens) -> Tensor:
    return attend(block.layer_norm1(x))


def _clip_mlp(block: Any, normed: Tensor, tokens: Tokens) -> Tensor:
    branch: Tensor = block.mlp(normed)
    return branch


def _vit_attend(block: Any, x: Tensor, attend: Attend, tokens: Tokens) -> Tensor:
    branch: Tensor = block.dropout(attend(block.layernorm_before(x)))
    return branch


def _vit_mlp(block: Any, normed: Tensor, tokens: Tokens) -> Tensor:
    branch: Tensor = block.dropout(block.mlp(normed))
    return branch


def _hugging_face_qkv(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (project(x).unflatten(-1, (-1, attention.head_dim)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    return q, k, v


def _hugging_face_project(attention: Any, out: Tensor, x: Tensor) -> Tensor:
    project = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    projected: Tensor = project(out)
    return projected


def _dropout(attention: Any) -> float:
    for name in ("attn_drop", "dropout", "attention_dropout"):
        if hasattr(attention, name):
            found = getattr(attention, name)
            return float(found.p if isinstance(found, nn.Dropout) else found)
    return 0.0


def _scale(attention: Any) -> float | None:
    for name in ("scaling", "scale"):
        if isinstance(found := getattr(attention, name, None), int | float):
            return float(found)
    return None


def _open_clip_mask(mask: Any, shape: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """open_clip's blocks read True as hidden, or as 1 to be added, and three dimensions as [B * heads, N, N]."""
    if isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.ndim == 3):
        raise ValueError(
            f"fastvlp.accelerate: the attention mask of this open_clip block is {mask.dtype} {tuple(mask.shape)}; packed attention takes "
            "floating-point masks [N, N] or [B, 1 or heads, 1 or N, N]"
        )
    return read_mask(mask, shape)


_READ = partial(read_mask, padding=True)
TIMM = Family(
    _timm_attend, "norm2", _timm_mlp, (0, "attn_mask"), read_mask, False, "attn", _timm_qkv, _timm_project, False, _dropout, _scale
)  # fmt: skip
OPEN_CLIP = Family(
    _open_clip_attend, "ln_2", _open_clip_mlp, (2, "attn_mask"), _open_clip_mask, False, "attn", _open_clip_qkv, _open_clip_project, True,
    _dropout, _scale,
)  # fmt: skip
OPEN_CLIP_4 = replace(OPEN_CLIP, pair=False)
OPEN_CLIP_CUSTOM = replace(OPEN_CLIP_4, mask=(0, "attn_mask"))
CLIP = Family(
    _clip_attend, "layer_norm2", _clip_mlp, (0, "attention_mask"), _READ, True, "self_attn", _hugging_face_qkv, _hugging_face_project,
    True, _dropout, _scale,
)  # fmt: skip
VIT = replace(CLIP, attend=_vit_attend, norm="layernorm_after", mlp=_vit_mlp, attention="attention")


def find(module: nn.Module) -> Tower | str | None:
    """The tower that a module is (not its children): a sentence where its blocks are of a kind we do not know, None where it is none."""
    # By names of modules, without importing libraries that the model does not come from.
    roots = {cls.__module__.split(".")[0] for cls in type(module).__mro__}
    finders = {"timm": _find_timm, "open_clip": _find_open_clip, "transformers": _find_hugging_face}
    for root, finder in finders.items():
        if root in roots and (found := finder(module)) is not None:
            return found
    return None


def _find_timm(module: Any) -> Tower | str | None:
    timm, attention = import_module("timm.models.vision_transformer"), import_module("timm.layers.attention").Attention
    flexible = isinstance(module, import_module("timm.models.naflexvit").NaFlexVit)
    if not flexible and not isinstance(module, timm.VisionTransformer):
        return None
    blocks = _named(module.blocks, "blocks")
    if why := _unknown(blocks, timm.Block, "attn", attention):
        return why
    # A flexible tower has as many tokens as its picture, so nothing can be promised of its costs.
    patches = None if flexible else module.patch_embed.num_patches
    drops = float(getattr(getattr(module, "patch_drop", None), "prob", 0.0))
    return Tower(blocks, TIMM, module.num_prefix_tokens, patches and patches + module.num_prefix_tokens, module, drops, padded=flexible)


def _find_open_clip(module: Any) -> Tower | str | None:
    transformer = import_module("open_clip.transformer")
    if not isinstance(module, transformer.VisionTransformer):
        return None
    blocks = _named(module.transformer.resblocks, "transformer.resblocks")
    first: Any = blocks[0][1]
    own, torchs = isinstance(first, transformer.CustomResidualAttentionBlock), isinstance(first.attn, nn.MultiheadAttention)
    block = transformer.CustomResidualAttentionBlock if own else transformer.ResidualAttentionBlock
    if why := _unknown(blocks, block, "attn", nn.MultiheadAttention if torchs else transformer.Attention):
        return why
    # Packed rows come first; a block that transposes would mix tokens of different images.
    if torchs and not first.attn.batch_first:
        return "its blocks take [N, B, C]; build the model with batch_first=True"
    if not torchs and first.attn.logit_scale is not None:
        return "its attention is a scaled cosine, which packed_attention does not compute"
    family = OPEN_CLIP if torchs else OPEN_CLIP_CUSTOM if own else OPEN_CLIP_4
    drops = float(getattr(getattr(module, "patch_dropout", None), "prob", 0.0))
    return Tower(blocks, family, 1, module.positional_embedding.shape[0], module, drops)


def _find_hugging_face(module: Any) -> Tower | str | None:
    name = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in HUGGING_FACE), None)
    if name is None:
        return None
    folder, block, attention, prefix = HUGGING_FACE[name]
    modeling = import_module(f"transformers.models.{folder}.modeling_{folder}")
    where = "layers" if name == "ViTModel" else "encoder.layers"
    family = VIT if name == "ViTModel" else CLIP
    blocks = _named(module.get_submodule(where), where)
    if why := _unknown(blocks, getattr(modeling, block), family.attention, getattr(modeling, attention)):
        return why
    config = module.config
    flexible = name == "Siglip2VisionModel"
    tokens = config.num_patches if flexible else prefix + prod(
        side // patch for side, patch in zip(_sides(config.image_size), _sides(config.patch_size), strict=True)
    )  # fmt: skip
    return Tower(blocks, family, prefix, tokens, module, padded=flexible)


def _sides(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


HUGGING_FACE = {
    "CLIPVisionModel": ("clip", "CLIPEncoderLayer", "CLIPAttention", 1),
    "SiglipVisionModel": ("siglip", "SiglipEncoderLayer", "SiglipAttention", 0),
    "Siglip2VisionModel": ("siglip2", "Siglip2EncoderLayer", "Siglip2Attention", 0),
    "ViTModel": ("vit", "ViTLayer", "ViTAttention", 1),
}


# How wrappers that keep a block's forward call it: FSDP1, torch.distributed's checkpoint_wrapper, torch.compile.
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def _named(blocks: Any, path: str) -> list[tuple[str, nn.Module]]:
    """The blocks by name, one that is met several times as often as it is, and inside what wraps them."""
    # From _modules, as named_children would leave out a block that is met a second time.
    return [_unwrapped(f"{path}.{name}", block) for name, block in blocks._modules.items()]


def _unwrapped(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    inside = next((name for name in WRAPPERS if name in module._modules), None)
    return (path, module) if inside is None else _unwrapped(f"{path}.{inside}", getattr(module, inside))


def _unknown(blocks: Sequence[tuple[str, nn.Module]], block: Any, attention: str, attention_class: Any) -> str:
    """Why these blocks are none of ours: their forward, or that of their attention, is another one."""
    for path, module in blocks:
        for part, expected in ((module, block), (getattr(module, attention, module), attention_class)):
            # By the function itself: a subclass with a forward of its own computes something else, whatever it is called.
            if not _same(type(part).forward, expected.forward):
                return f"{path} has a {type(part).__name__}; {expected.__name__} is supported"
    return ""


def _same(forward: Any, expected: Any) -> bool:
    """Whether it is that function, or transformers' own wrapper of it in a subclass that only adds a class on top, as FSDP2 does."""
    wrapper = getattr(forward, "__wrapped__", None) is expected and getattr(expected, "__wrapped__", None) is not None
    return forward is expected or (wrapper and forward.__code__ is expected.__code__)
