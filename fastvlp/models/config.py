"""What a two-tower model is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TowerConfig:
    """A transformer: ``depth`` blocks of ``width`` channels and ``heads`` heads; feed-forward layers are ``mlp_ratio`` times as wide.

    ``merge``: the share of each segment's tokens that merge away in each block (ToMe), in training and after it: one number per block, or
    one for all; empty: none. A share is rounded down, and at most half can merge in one block.
    """

    width: int = 192
    depth: int = 6
    heads: int = 3
    mlp_ratio: float = 4.0
    activation: Literal["relu2", "gelu"] = "relu2"
    merge: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.mlp_ratio <= 0:
            raise ValueError(f"width {self.width}, depth {self.depth}, heads {self.heads}, mlp_ratio {self.mlp_ratio}: all are positive")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width} and heads is {self.heads}; the width must be a multiple of the heads")
        object.__setattr__(self, "merge", tuple(self.merge))  # JSON gives a list
        if len(self.merge) not in (0, 1, self.depth) or not all(0 <= share <= 0.5 for share in self.merge):
            raise ValueError(f"merge is {list(self.merge)}; shares from 0 to 0.5 are needed, one for each of the {self.depth} blocks or "
                             "one for all")

    @property
    def merged(self) -> tuple[float, ...]:
        """The share of tokens that merge away in each of the ``depth`` blocks."""
        return self.merge if len(self.merge) == self.depth else (self.merge or (0.0,)) * self.depth

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class ImageConfig(TowerConfig):
    """The image tower: patches of ``patch_size`` pixels, at most ``grid`` of them in a row or column.

    Pixels become (x / 255 - mean) / std. ``image_size``: the longest side, in pixels, of pictures that ``encode_image`` scales itself.
    """

    image_size: int = 64
    patch_size: int = 16
    grid: int = 32
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1 or self.grid < 1 or self.std <= 0:
            raise ValueError(f"patch_size {self.patch_size}, grid {self.grid} and std {self.std} must be positive")
        if not 1 <= self.image_size <= self.grid * self.patch_size:
            raise ValueError(f"image_size is {self.image_size}; with patches of {self.patch_size} and a grid of {self.grid} "
                             f"it lies between 1 and {self.grid * self.patch_size}")


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower. ``pool``: which token stands for the caption, the mean of all or the last (the usual choice when ``causal``)."""

    depth: int = 4
    vocab_size: int = 4096
    context_length: int = 24
    causal: bool = False
    pool: Literal["mean", "last"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 1 or self.context_length < 3:
            raise ValueError(f"vocab_size is {self.vocab_size} and context_length is {self.context_length}; "
                             "a context holds at least a start, an end and one token")
        if any(self.merged) and (self.causal or self.pool == "last"):
            raise ValueError(f"merge is {list(self.merge)} with causal {self.causal} and pool {self.pool}; merging moves tokens and "
                             "needs causal: false and pool: mean")


@dataclass(frozen=True)
class ModelConfig:
    """Two towers that project to ``embed_dim`` features, and the learnable scale (and, for sigmoid losses, bias) of their similarities.

    Attributes:
        init_scale: initial exp(logit_scale). max_scale: it never exceeds this.
        init_bias: initial logit_bias; None: the model has none.
    """

    embed_dim: int = 256
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    init_scale: float = 1 / 0.07
    max_scale: float = 100.0
    init_bias: float | None = None

    def __post_init__(self) -> None:
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim is {self.embed_dim}; it must be positive")
        if not 0 < self.init_scale <= self.max_scale:
            raise ValueError(f"init_scale is {self.init_scale} and max_scale is {self.max_scale}; 0 < init_scale <= max_scale is needed")
