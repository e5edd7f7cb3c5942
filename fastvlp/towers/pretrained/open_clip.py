"""Image and text towers of open_clip 3.3."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from fastvlp.towers import inputs
from fastvlp.towers.pretrained import timm, transformers
from fastvlp.towers.pretrained.images import Numbers, PackedImages, PaddedImages, project
from fastvlp.towers.pretrained.segments import OpenClipAttention, Segments
from fastvlp_kernels.packed import Packed

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OPENAI_DATASET_MEAN and _STD


def open_clip_tower(name: str | nn.Module, side: str = "image", pretrained: str | None = None, image_size: int | None = None) -> nn.Module:
    """One side of an open_clip model as a tower: packed tokens in, packed tokens out, before its pooling and projection.

    ViTs and text transformers run packed; a model of timm or transformers inside is what ``timm_tower`` or ``transformers_tower`` make of
    it; ResNets take padded pictures (see ``PaddedImages``).

    Args:
        name: of the architecture ("ViT-B-32"), with "hf-hub:" or "local-dir:" where open_clip takes that, or a model that is made already.
        side: "image" or "text". pretrained: a tag of open_clip, whose weights are downloaded or in the cache, or a file; None: random.
        image_size: in pixels; None: the model's own.

    Raises:
        ValueError: the side is unknown, or is of a kind that has no packed tokens.
    """
    if side not in ("image", "text"):
        raise ValueError(f"open_clip_tower: side is {side!r}; allowed: image and text")
    model: Any = name
    if isinstance(name, str):
        factory = importlib.import_module("open_clip")
        model = factory.create_model(name, pretrained=pretrained, force_image_size=image_size)
    if side == "text":
        text = model.text if hasattr(model, "text") else model
        if hasattr(text, "config"):
            return transformers.transformers_tower(text.transformer)
        return OpenClipText(text)
    visual = getattr(model, "visual", model)
    about = getattr(visual, "preprocess_cfg", None) or {}
    mean, std = about.get("mean", MEAN), about.get("std", STD)
    if hasattr(visual, "trunk"):
        return timm.timm_tower(visual.trunk, mean=mean, std=std)
    if hasattr(visual, "transformer"):
        return OpenClipVit(visual, mean, std)
    visual.attnpool = nn.Identity()  # what is left gives a feature map
    return PaddedImages(visual, _side(visual.image_size), mean, std)


def _side(size: int | tuple[int, int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"open_clip_tower: the model takes pictures of {height} x {width}; square ones are supported")
    return height


def _pack_blocks(blocks: Any) -> None:
    for block in blocks:
        attention = block.attn
        if getattr(attention, "logit_scale", None) is not None:
            raise ValueError("open_clip_tower: its attention is a scaled cosine, which packed attention is not; choose another model")
        block.attn = OpenClipAttention(attention)


def _through(blocks: Any, x: Tensor, segments: Segments) -> Tensor:
    for block in blocks:
        x = block(x, attn_mask=segments)
    return x


class OpenClipVit(PackedImages):
    """open_clip's ``VisionTransformer`` over packed patches, without pooling and projection."""

    def __init__(self, visual: Any, mean: Numbers, std: Numbers) -> None:
        super().__init__(visual, visual.conv1.out_channels, _side(visual.patch_size), _side(visual.image_size), mean, std)
        if visual.attn_pool is not None:
            visual.ln_post = nn.Identity()  # it normalises what the attention pool gives
        visual.proj = visual.attn_pool = visual.attn_pool_contrastive = None
        _pack_blocks(visual.transformer.resblocks)

    def embed(self, images: Packed) -> Tensor:
        return project(self.model.conv1, self.pixels(images)) + self.at(images, self.model.positional_embedding[1:])

    def prefix(self) -> Tensor:
        return (self.model.class_embedding + self.model.positional_embedding[0])[None]

    def before(self, x: Tensor) -> Tensor:
        return self.model.ln_pre(x)

    def blocks(self, x: Tensor, segments: Segments) -> Tensor:
        return _through(self.model.transformer.resblocks, x, segments)

    def after(self, x: Tensor) -> Tensor:
        return self.model.ln_post(x)


class OpenClipText(nn.Module):
    """open_clip's text transformer over packed captions, which need no padding: a causal one sees none, and others are not shown any.

    Attributes:
        width: C. vocab_size, context_length: ids and places go up to there. causal: whether a token sees only those before it.
    """

    def __init__(self, text: Any) -> None:
        super().__init__()
        if getattr(text, "cls_emb", None) is not None:
            raise ValueError("open_clip_tower: this text tower (CoCa's) has a class token behind its padding, which packed captions do not "
                             "have; choose a model whose text config has no embed_cls")
        self.tokens, self.places = text.token_embedding, text.positional_embedding
        self.blocks, self.norm_out = text.transformer.resblocks, text.ln_final
        self.vocab_size, self.width = self.tokens.weight.shape
        self.context_length, self.causal = len(self.places), text.attn_mask is not None
        _pack_blocks(self.blocks)

    def embed(self, texts: Packed) -> Packed:
        """Packed token ids [T] with ``pos`` -> the tokens before the first block, [T, C]."""
        place = inputs.places("open_clip_tower", texts, self.vocab_size, self.context_length)
        return texts.replace(x=self.tokens(texts.x) + self.places[place])

    def forward(self, texts: Packed) -> Packed:
        """Packed token ids [T] with ``pos`` -> tokens [T, C] after the last norm."""
        tokens = self.embed(texts)
        if not tokens.total:
            return tokens
        x = _through(self.blocks, tokens.x[None], Segments.of(tokens, self.causal))
        return tokens.replace(x=self.norm_out(x[0]))


open_clip_tower.makes_module = True  # type: ignore[attr-defined]  # a recipe may name it (fastvlp.config.spec)
