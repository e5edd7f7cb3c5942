"""Image and text towers of transformers 5."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.towers import inputs
from fastvlp.towers.pretrained.images import Numbers, PackedImages, PaddedImages, project
from fastvlp.towers.pretrained.segments import TRANSFORMERS, Segments, attention_of_transformers, segment_maximum
from fastvlp_kernels.packed import Packed

PACKED = ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "ViTModel")
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = 0.5, 0.5


def transformers_tower(model: Any, side: str | None = None, packed: bool = True, mean: Numbers | None = None, std: Numbers | None = None,
                       **changes: Any) -> nn.Module:
    """A model of transformers as a tower: packed tokens in, packed tokens out, before its pooling and heads.

    Text models (CLIP's, SigLIP's, BERT and GPT in their kinds) and the image models of CLIP, SigLIP, SigLIP 2 and ViT run packed, other
    text models on padded ids, and other image models on padded pictures (see ``PaddedImages``). SigLIP's text models were trained with
    captions filled up to 64 tokens, all of which see one another: for their own features give them such captions.

    Args:
        model: a model, which becomes the tower's; a configuration, for random weights; or the name of a model in the hub's cache, or the
            folder of one, for its weights.
        side: "image" or "text", of a model that has both (CLIP). packed: False pads where packing would do, too.
        mean, std: of pixels; None: what CLIP, SigLIP and ViT were trained with, and else ImageNet's.
        changes: of the configuration, such as ``attention_probs_dropout_prob=0``: packed attention does not drop attention weights.

    Raises:
        ValueError: it has both sides and none is asked for, or not the one that is asked for.
    """
    library = importlib.import_module("transformers")
    if side not in (None, "image", "text"):
        raise ValueError(f"transformers_tower: side is {side!r}; allowed: image, text, and None for a model that has one")
    if isinstance(model, nn.Module):
        _change(model.config, changes)
    elif isinstance(model, (str, os.PathLike)):
        config = library.AutoConfig.from_pretrained(model)
        _change(_config_of(config, side), changes)
        # Without dtype, AutoModel would give the checkpoint's, float16 for many: training wants master weights.
        model = library.AutoModel.from_pretrained(model, config=config, dtype=torch.get_default_dtype())
    else:
        config = copy.deepcopy(_config_of(model, side))
        _change(config, changes)
        kind = getattr(library, type(config).__name__.removesuffix("Config") + "Model", None)  # AutoModel lacks SigLIP's text model
        model = library.AutoModel.from_config(config) if kind is None else kind(config)
    model = _model_of(model, side)
    image = hasattr(model.config, "num_channels")
    if side is not None and (side == "image") != image:
        raise ValueError(f"transformers_tower: {type(model).__name__} is {'an image' if image else 'a text'} model, and side is {side!r}")
    packs = type(model).__name__ in PACKED if image else "position_ids" in inspect.signature(model.forward).parameters
    if packed and packs and model._supports_attention_backend:
        # transformers' own switch: every model that supports it calls our function, whatever its blocks are named.
        library.AttentionInterface.register(TRANSFORMERS, attention_of_transformers)
        model.set_attn_implementation(TRANSFORMERS)
        text = ClipText if hasattr(model, "final_layer_norm") and hasattr(model, "encoder") else PackedText
        return _packed_images(model, mean, std) if image else text(model)
    if not image:
        return PaddedText(model)
    mean, std = IMAGENET[0] if mean is None else mean, IMAGENET[1] if std is None else std
    return PaddedImages(model, _side(getattr(model.config, "image_size", 224)), mean, std)


def _config_of(config: Any, side: str | None) -> Any:
    """Of a configuration of two sides, that of one."""
    name = {"image": "vision_config", "text": "text_config"}.get(side or "", "")
    return getattr(config, name, config)


def _model_of(model: Any, side: str | None) -> Any:
    """Of a model of two sides, one; of one that encodes and decodes, the encoder. Without what comes after the tokens."""
    sides = [part for part in ("vision_model", "text_model") if isinstance(getattr(model, part, None), nn.Module)]
    if len(sides) > 1:
        if side is None:
            raise ValueError(f"transformers_tower: {type(model).__name__} has an image and a text side; pass side='image' or side='text'")
        model = getattr(model, "vision_model" if side == "image" else "text_model")
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        # A pooler that is never called has parameters without gradient, which DDP waits for.
        model.pooler = None
    if isinstance(getattr(model, "head", None), nn.Module):
        model.head = nn.Identity()
    return model


def _change(config: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(f"transformers_tower: {type(config).__name__} has no {name!r}; see the documentation of transformers")
        setattr(config, name, value)


def _side(size: int | Sequence[int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"transformers_tower: the model takes {height} x {width} pixels; square pictures and patches are supported")
    return height


class PackedText(nn.Module):
    """A text model over packed captions, which need no padding.

    Attributes:
        width: C. vocab_size, context_length: ids and places go up to there.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config
        # RoBERTa and those after it count places from the padding's id on.
        tables = [part for part in model.modules() if hasattr(part, "create_position_ids_from_input_ids")]
        self.offset = tables[0].padding_idx + 1 if tables else 0
        self.width, self.vocab_size = config.hidden_size, config.vocab_size
        self.context_length = config.max_position_embeddings - self.offset
        self.options = {"use_cache": False} if hasattr(config, "use_cache") else {}

    def forward(self, texts: Packed) -> Packed:
        """Packed token ids [T] with ``pos`` -> the model's last hidden states, [T, C]."""
        place = inputs.places(type(self.model).__name__, texts, self.vocab_size, self.context_length)
        if not texts.total:
            return texts.replace(x=next(self.model.parameters()).new_zeros(0, self.width))
        return texts.replace(x=self.states(texts.x[None], place[None] + self.offset, Segments.of(texts))[0])

    def states(self, ids: Tensor, places: Tensor, segments: Segments) -> Tensor:
        """ids and places [1, T] -> [1, T, C]."""
        found = self.model(input_ids=ids, position_ids=places, fastvlp_segments=segments, **self.options)
        return found.last_hidden_state


class ClipText(PackedText):
    """CLIP's and SigLIP's text models, of which SigLIP's do not pass on what is none of their arguments."""

    def states(self, ids: Tensor, places: Tensor, segments: Segments) -> Tensor:
        """As ``PackedText.states``."""
        model = self.model
        causal = {"is_causal": True} if type(model).__name__ == "CLIPTextModel" else {}
        x = model.encoder(inputs_embeds=model.embeddings(input_ids=ids, position_ids=places), attention_mask=segments, **causal)
        return model.final_layer_norm(x.last_hidden_state)


class PaddedText(nn.Module):
    """A text model over padded captions, for attention that is not packed (T5's, with its biases).

    Attributes: as of ``PackedText``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, config = model, model.config
        self.width, self.vocab_size = config.hidden_size, config.vocab_size
        self.context_length = getattr(config, "max_position_embeddings", 512)
        self.padding = getattr(config, "pad_token_id", None) or 0

    def forward(self, texts: Packed) -> Packed:
        """Packed token ids [T] with ``pos`` -> the model's last hidden states, [T, C]."""
        inputs.places(type(self.model).__name__, texts, self.vocab_size, self.context_length)
        if not texts.total:
            return texts.replace(x=next(self.model.parameters()).new_zeros(0, self.width))
        # What stands at padding is masked, but looked up: its id has to be one.
        ids, mask = texts.to_padded(self.padding)
        found = self.model(input_ids=ids, attention_mask=mask.long())
        return texts.replace(x=Packed.from_padded(found.last_hidden_state, texts.lengths).x)


def _packed_images(model: Any, mean: Numbers | None, std: Numbers | None) -> nn.Module:
    kind = {"ViTModel": Vit, "Siglip2VisionModel": Siglip2Vit}.get(type(model).__name__, ClipVit)
    default = CLIP if type(model).__name__ == "CLIPVisionModel" else HALF
    config = model.config
    patch = _side(config.patch_size)
    size = patch * math.isqrt(config.num_patches) if kind is Siglip2Vit else _side(config.image_size)
    return kind(model, config.hidden_size, patch, size, default[0] if mean is None else mean, default[1] if std is None else std)


class ClipVit(PackedImages):
    """CLIP's and SigLIP's image model over packed patches. CLIP's last norm, which it has for the class token, is that of all."""

    def embed(self, images: Packed) -> Tensor:
        parts = self.model.embeddings
        return project(parts.patch_embedding, self.pixels(images)) + self.at(images, parts.position_embedding.weight[len(self.prefix()) :])

    def prefix(self) -> Tensor:
        parts = self.model.embeddings
        table = parts.position_embedding.weight
        return (parts.class_embedding + table[0])[None] if hasattr(parts, "class_embedding") else table[:0]

    def before(self, x: Tensor) -> Tensor:
        return self.model.pre_layrnorm(x) if hasattr(self.model, "pre_layrnorm") else x

    def blocks(self, x: Tensor, segments: Segments) -> Tensor:
        return self.model.encoder(inputs_embeds=x, attention_mask=segments).last_hidden_state

    def after(self, x: Tensor) -> Tensor:
        return self.model.post_layernorm(x)


class Siglip2Vit(ClipVit):
    """SigLIP 2's image model over packed patches: its table of places is resized to each picture's rows and columns.

    Of dropped patches at the lower and right edge nobody knows, so that a picture ends where its last kept ones do.
    """

    fixed = False

    def embed(self, images: Packed) -> Tensor:
        parts, pixels = self.model.embeddings, self.pixels(images)
        assert images.pos is not None
        place = images.pos[:, 1:].to(pixels.dtype)
        counts = images.lengths.to(place.device, non_blocking=True)
        sizes = segment_maximum(place + 1, images).repeat_interleave(counts, 0, output_size=images.total)
        # Bilinear with antialiasing: a triangle around each patch's centre, at least as wide as one cell of the table, [T, 2, G].
        cell = self.grid / sizes
        centre, cells = (place + 0.5) * cell - 0.5, torch.arange(self.grid, device=place.device, dtype=place.dtype)
        weights = (1 - (cells - centre[..., None]).abs() / cell.clamp_min(1)[..., None]).clamp_min(0)
        rows, columns = (weights / weights.sum(-1, keepdim=True)).unbind(1)
        return parts.patch_embedding(pixels) + (rows[:, :, None] * columns[:, None]).flatten(1) @ parts.position_embedding.weight


class Vit(PackedImages):
    """ViT's image model over packed patches."""

    def embed(self, images: Packed) -> Tensor:
        parts = self.model.embeddings
        return project(parts.patch_embeddings.projection, self.pixels(images)) + self.at(images, parts.position_embeddings[0, 1:])

    def prefix(self) -> Tensor:
        parts = self.model.embeddings
        return parts.cls_token[0] + parts.position_embeddings[0, :1]

    def before(self, x: Tensor) -> Tensor:
        return self.model.embeddings.dropout(x)

    def blocks(self, x: Tensor, segments: Segments) -> Tensor:
        for layer in self.model.layers:
            x = layer(x, segments)
        return x

    def after(self, x: Tensor) -> Tensor:
        return self.model.layernorm(x)


transformers_tower.makes_module = True  # type: ignore[attr-defined]  # a recipe may name it (fastvlp.config.spec)
