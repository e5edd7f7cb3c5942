"""Image towers of timm."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.towers.pretrained.images import Numbers, PackedImages, PaddedImages, project
from fastvlp.towers.pretrained.segments import Segments, TimmAttention, segment_maximum
from fastvlp_kernels.packed import Packed


def timm_tower(name: str | nn.Module, pretrained: bool | str | os.PathLike[str] | None = None, image_size: int | None = None,
               mean: Numbers | None = None, std: Numbers | None = None, **options: Any) -> nn.Module:
    """An image model of timm as a tower: packed patches in, packed tokens out, before its pooling and head.

    VisionTransformers and NaFlexViTs with timm's plain blocks run packed; others that give feature maps (ConvNeXt, Swin, EVA) take padded
    pictures (see ``PaddedImages``).

    Args:
        name: of the architecture ("vit_base_patch16_224"), or a model that is made already.
        pretrained: True: timm's weights, downloaded or in the cache; a file; None: random.
        image_size: in pixels; None: the model's own, and for NaFlexViT, which takes any, 384.
        mean, std: of pixels; None: what the model was trained with. options: for ``timm.create_model``.
    """
    module: Any = name
    if isinstance(name, str):
        library = importlib.import_module("timm")
        naflex = name.startswith("naflex")
        size = {} if image_size is None or naflex else {"img_size": image_size}
        file = {} if pretrained in (None, True, False) else {"checkpoint_path": str(pretrained)}
        try:
            module = library.create_model(name, pretrained=pretrained is True, num_classes=0, **size, **file, **options)
        except TypeError as error:
            # Only a refusal of img_size means that the model takes any size; other errors are the caller's.
            if not size or "img_size" not in str(error):
                raise
            module = library.create_model(name, pretrained=pretrained is True, num_classes=0, **file, **options)  # it takes any size
    about = module.pretrained_cfg
    mean, std = about["mean"] if mean is None else mean, about["std"] if std is None else std
    vit, naflexvit = importlib.import_module("timm.models.vision_transformer"), importlib.import_module("timm.models.naflexvit")
    attention = importlib.import_module("timm.layers.attention").Attention
    # Exact classes: a subclass may attend or normalise in a way that packing would silently change.
    plain = all(type(block) is vit.Block and type(block.attn) is attention for block in getattr(module, "blocks", (module,)))
    if type(module) is naflexvit.NaFlexVit and plain and module.rope is None:
        return NaFlexVit(module, image_size or 384, mean, std)
    if type(module) is vit.VisionTransformer and plain and module.pos_embed is not None and not module.dynamic_img_size:
        return TimmVit(module, mean, std)
    known = getattr(getattr(module, "patch_embed", None), "img_size", None) or image_size or about["input_size"][1:]
    last = getattr(module, "output_fmt", "NCHW") == "NHWC"
    return PaddedImages(module, known if isinstance(known, int) else known[0], mean, std, "forward_features", last)


class TimmVit(PackedImages):
    """timm's ``VisionTransformer`` over packed patches."""

    def __init__(self, model: Any, mean: Numbers, std: Numbers) -> None:
        (patch, other), (height, width) = model.patch_embed.patch_size, model.patch_embed.img_size
        if patch != other or height != width:
            raise ValueError(f"timm_tower: patches of {patch} x {other} and pictures of {height} x {width}; square ones are supported")
        super().__init__(model, model.embed_dim, patch, height, mean, std)
        self.prepare()

    def prepare(self) -> None:
        """Leave out what comes after the tokens, and let blocks attend inside segments."""
        # Pooling and projection are the system's; what is left in place would train without ever being used.
        self.model.attn_pool, self.model.fc_norm, self.model.head = None, nn.Identity(), nn.Identity()
        for block in self.model.blocks:
            block.attn = TimmAttention(block.attn)

    def embed(self, images: Packed) -> Tensor:
        table = self.model.pos_embed[0]
        x = self.model.patch_embed.norm(project(self.model.patch_embed.proj, self.pixels(images)))
        return x + self.at(images, table if self.model.no_embed_class else table[self.model.num_prefix_tokens :])

    def prefix(self) -> Tensor:
        parts = [part[0] for part in (self.model.cls_token, self.model.reg_token) if part is not None]
        # The empty rows are for a model that has neither.
        tokens = torch.cat([*parts, self.model.pos_embed.new_zeros(0, self.width)])
        return tokens if self.model.no_embed_class else tokens + self.model.pos_embed[0, : len(tokens)]

    def before(self, x: Tensor) -> Tensor:
        return self.model.norm_pre(self.model.pos_drop(x))

    def blocks(self, x: Tensor, segments: Segments) -> Tensor:
        for block in self.model.blocks:
            x = block(x, attn_mask=segments)
        return x

    def after(self, x: Tensor) -> Tensor:
        return self.model.norm(x)


class NaFlexVit(TimmVit):
    """timm's ``NaFlexVit``: positions are resized to each picture's rows and columns, which its embedding, that runs padded, asks the
    device for. Of dropped patches at the lower and right edge nobody knows, so that a picture ends where its last kept ones do.
    """

    fixed = False

    def __init__(self, model: Any, image_size: int, mean: Numbers, std: Numbers) -> None:
        patch = model.embeds.patch_size
        PackedImages.__init__(self, model, model.embed_dim, patch if isinstance(patch, int) else patch[0], image_size, mean, std)
        self.prepare()

    def forward(self, images: Packed) -> Packed:
        """As ``PackedImages.forward``."""
        pixels, n = self.pixels(images), self.model.num_prefix_tokens
        assert images.pos is not None
        if not images.total:
            return images.replace(x=pixels.new_zeros(0, self.width))
        sizes = segment_maximum(images.pos[:, 1:].long() + 1, images)
        counts = images.lengths.to(pixels.device, non_blocking=True)
        owner = torch.arange(len(images), device=pixels.device).repeat_interleave(counts, output_size=images.total)
        # Its embedding resizes positions picture by picture, over padded pictures; only that part runs padded, the blocks do not.
        longest = int(sizes.prod(1).max())
        row, column = images.pos[:, 1].long(), images.pos[:, 2].long()
        place = owner * longest + row * sizes[owner, 1] + column
        full = pixels.new_zeros(len(images) * longest, pixels.shape[1]).index_copy(0, place, pixels).unflatten(0, (len(images), longest))
        index = torch.arange(longest, device=pixels.device).expand(len(images), -1)
        # A picture without patches has width 0.
        wide = sizes[:, 1:].clamp_min(1)
        valid = index < sizes.prod(1, keepdim=True)
        coordinates = torch.stack((index // wide, index % wide), -1) * valid[..., None]
        x, _ = self.model.embeds(full, patch_coord=coordinates, patch_valid=valid)
        patches = images.replace(x=x[:, n:].flatten(0, 1).index_select(0, place), size=None)
        return self.run(patches, x[:, :n])

    def before(self, x: Tensor) -> Tensor:
        return self.model.norm_pre(x)


timm_tower.makes_module = True  # type: ignore[attr-defined]  # a recipe may name it (fastvlp.config.spec)
