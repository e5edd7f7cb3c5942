"""The dual encoder: raw or packed pictures and captions to features of one space, and its files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.models.config import ImageConfig, ModelConfig, TextConfig
from fastvlp.models.towers import ImageTower, TextTower
from fastvlp_kernels.packed import Packed

if TYPE_CHECKING:
    from fastvlp.data import Tokenizer

WEIGHTS, DESCRIPTION, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"


class TwoTower(nn.Module):
    """An image tower and a text tower (CLIP, Radford et al. 2021) over packed tokens.

    Attributes:
        logit_scale: parameter, 0-d: the logarithm of the similarities' scale. logit_bias: parameter, 0-d, or None.
        tokenizer: what ``encode_text`` uses for strings; None until one is set (``fastvlp.load`` sets it).
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.image = ImageTower(config.image, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        self.logit_bias = None if config.init_bias is None else nn.Parameter(torch.tensor(config.init_bias))
        self.tokenizer: Tokenizer | None = None

    def encode_image(self, images: Packed | Sequence[Any], normalize: bool = True) -> Tensor:
        """Features [S, embed_dim] of packed patches, or of a list of pictures.

        A picture is a PIL image, a uint8 tensor [h, w, 3], or a floating-point tensor [3, h, w] with values in 0..1.
        """
        if not isinstance(images, Packed):
            from fastvlp.data.images import as_pixels
            from fastvlp.data.patches import pack_images

            image = self.config.image
            images = pack_images([as_pixels(i, image.image_size, image.patch_size) for i in images], image.patch_size)
        features = self.image(images.to(self.logit_scale.device))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, texts: Packed | Sequence[str], normalize: bool = True) -> Tensor:
        """Features [S, embed_dim] of packed token ids, or of a list of strings (the model's ``tokenizer`` makes their tokens)."""
        if not isinstance(texts, Packed):
            from fastvlp.data.patches import pack_texts

            if self.tokenizer is None:
                raise ValueError("encode_text: the model has no tokenizer for strings; set model.tokenizer = load_tokenizer(...)")
            if isinstance(texts, str):
                raise TypeError("encode_text: got one string; pass a list of strings")
            length = self.config.text.context_length
            texts = pack_texts([torch.tensor(self.tokenizer.encode(text, length)) for text in texts])
        features = self.text(texts.to(self.logit_scale.device))
        return F.normalize(features, dim=-1) if normalize else features

    def scale(self) -> Tensor:
        """exp(logit_scale), what the losses take."""
        return self.logit_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Bring the scale back into [1, max_scale]; call it after each step of the optimizer."""
        self.logit_scale.clamp_(0, math.log(self.config.max_scale))

    def forward(self, images: Packed, texts: Packed) -> dict[str, Tensor]:
        """The arguments of a loss by name: unit features, ``logit_scale`` (exponentiated) and, where there is one, ``logit_bias``."""
        out = {"image_features": self.encode_image(images), "text_features": self.encode_text(texts), "logit_scale": self.scale()}
        return out if self.logit_bias is None else {**out, "logit_bias": self.logit_bias}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors, model.json and, if there is a tokenizer, tokenizer.json into ``folder``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, str(folder / WEIGHTS))
        (folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(self.config), indent=1) + "\n", encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TwoTower:
    """A model that ``TwoTower.save`` or a training run wrote, in evaluation mode.

    Args:
        path: a folder with model.safetensors and model.json: a run (its ``model`` folder is taken) or the folder itself.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the weights do not belong to the description.
    """
    folder = Path(path)
    if (folder / "model" / DESCRIPTION).is_file():
        folder = folder / "model"
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; pass the folder of a finished run, or one that model.save(...) wrote")
    from safetensors.torch import load_file

    values = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    image, text = ImageConfig(**values.pop("image")), TextConfig(**values.pop("text"))
    model = TwoTower(ModelConfig(image=image, text=text, **values))
    try:
        model.load_state_dict(load_file(str(folder / WEIGHTS)))
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {folder / DESCRIPTION}: {error}") from error
    if (folder / TOKENIZER).is_file():
        from fastvlp.data import load_tokenizer

        model.tokenizer = load_tokenizer(folder / TOKENIZER, model.config.text.context_length)
    return model.to(device).eval()
