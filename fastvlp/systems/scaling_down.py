"""Scaling (down) CLIP (Li et al. 2024, arXiv:2404.08197): CLIP, SLIP, FLIP and CLIP with augmentation, on all of the data or half of it."""

from __future__ import annotations

from dataclasses import replace

from fastvlp.data.batch import Stage
from fastvlp.data.shards import MINI
from fastvlp.recipe import Recipe
from fastvlp.systems import clip, slip

HALF = tuple(str(MINI / f"train-{kind}-0000.tar") for kind in ("emoji", "openclipart"))  # one of two shards of each kind


def recipe() -> Recipe:
    """CLIP on all of the data: whole pictures, as they are."""
    return _with(clip.recipe(), Stage(keep=1.0, augment=0.0))


def half() -> Recipe:
    """CLIP on half of the data."""
    return _halved(recipe())


def augmented() -> Recipe:
    """CLIP on half of the data with strong augmentation, which the paper finds as good as ``recipe``."""
    return _halved(_with(clip.recipe(), Stage(keep=1.0, augment=1.0)))


def flip() -> Recipe:
    """FLIP: half of the patches, all of them in the last fifth."""
    return _with(clip.recipe(), Stage(0.8, keep=0.5, augment=0.0), Stage(keep=1.0, augment=0.0))


def with_views() -> Recipe:
    """SLIP: CLIP and SimCLR of two augmented views."""
    return _with(slip.recipe(), Stage(keep=1.0, augment=0.0))


def paper() -> Recipe:
    """ViT-B/32 on 3.4 billion English pairs of WebLI, each once; batch and optimizer are CLIP's. No code of the authors is public."""
    made = clip.paper()
    return replace(made, schedule=replace(made.schedule, samples=3_400_000_000))


def _with(made: Recipe, *stages: Stage) -> Recipe:
    return replace(made, schedule=replace(made.schedule, stages=stages))


def _halved(made: Recipe) -> Recipe:
    return replace(made, data=replace(made.data, train=HALF))
