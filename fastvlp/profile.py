"""``fastvlp profile``: how many tokens a recipe's data has, and what every layer computes for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.config import Config, StageConfig
from fastvlp.layers.token_merger import mergeable
from fastvlp.models import TowerConfig


@dataclass(frozen=True)
class Layer:
    """One layer of a tower for one stage, per pair.

    Attributes:
        tokens: that it sees. padded: what they would be with square pictures and captions of the context length, nothing dropped.
        flops: forward, a multiply-add being 2.
    """

    stage: int
    tower: str
    name: str
    tokens: float
    padded: float
    flops: float


def block_flops(lengths: Tensor, config: TowerConfig, left: Tensor | None = None) -> float:
    """Operations of one transformer block over segments of these lengths: 8 C C n and 4 C n n of attention, and 4 C H m of the MLP.

    m: the lengths ``left`` after merging (None: nothing merges). Matching, n n / 2 products of one head's width, is not counted.
    """
    n, m = lengths.double(), (lengths if left is None else left).double()
    return float((8 * config.width**2 * n + 4 * config.width * config.hidden * m + 4 * config.width * n**2).sum())


def profile(config: Config) -> list[Layer]:
    """Every layer of both towers, for the first batch of the recipe's data prepared as in each of its stages.

    Raises:
        FileNotFoundError: no shards. ValueError: the tokenizer cannot be loaded.
    """
    return [layer for number, stage in enumerate(config.schedule.stages) for layer in _stage(config, number, stage)]


def _stage(config: Config, number: int, stage: StageConfig) -> Iterator[Layer]:
    from fastvlp.data import Stage, Stream, load_tokenizer
    from fastvlp.train.batches import split

    image, text = config.model.image, config.model.text
    prepared = Stage(stage.image_size, stage.keep, stage.augment)
    stream = Stream(config.data.train, load_tokenizer(config.data.tokenizer, text.context_length), config.data.batch_size, image.patch_size,
                    text.context_length, config.run.seed, prepared, max_captions=config.data.max_captions)
    batch = next(iter(stream))
    micro = split(batch, prepared, image.patch_size, None, None, torch.device("cpu"))
    square = (stage.image_size // image.patch_size) ** 2
    towers: tuple[tuple[str, Tensor, TowerConfig, int], ...] = (
        ("image", micro.images[0].lengths, image, square), ("text", micro.texts[0].lengths, text, text.context_length))
    for tower, lengths, own, most in towers:
        pairs, tokens = len(batch), float(lengths.sum())
        if tower == "image":
            yield Layer(number, tower, "patches", tokens / pairs, most, 2 * 3 * image.patch_size**2 * own.width * tokens / pairs)
        for block, share in enumerate(own.merged):
            left = torch.tensor([n - mergeable(n, share) for n in lengths.tolist()])
            yield Layer(number, tower, f"block {block + 1}", float(lengths.sum()) / pairs, most, block_flops(lengths, own, left) / pairs)
            lengths = left
        yield Layer(number, tower, "projection", 1, 1, 2.0 * own.width * config.model.embed_dim)


def table(layers: list[Layer], config: Config) -> str:
    """The layers as text, with the sum of each stage."""
    lines = [f"{'stage':<6}{'tower':<7}{'layer':<12}{'tokens':>8}{'padded':>8}{'MFLOP':>10}{'share':>8}"]
    for number, stage in enumerate(config.schedule.stages):
        some = [layer for layer in layers if layer.stage == number]
        whole = sum(layer.flops for layer in some)
        lines += [f"{number:<6}{layer.tower:<7}{layer.name:<12}{layer.tokens:>8.1f}{layer.padded:>8.0f}{layer.flops / 1e6:>10.2f}"
                  f"{layer.flops / whole:>8.1%}" for layer in some]
        lines.append(f"stage {number}, up to {stage.until:.0%} of the steps: image_size {stage.image_size}, keep {stage.keep}: "
                     f"{whole / 1e6:.1f} MFLOP forward per pair, {3 * whole / 1e6:.1f} in training")
    return "\n".join(lines)
