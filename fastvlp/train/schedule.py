"""Learning rate and stages as pure functions of the step number."""

from __future__ import annotations

import math

from fastvlp.config import Config
from fastvlp.data import Stage


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up over ``schedule.warmup`` steps, then half a cosine down to ``final_lr`` times the peak at the last step."""
    peak, warmup, final = config.optim.lr, config.schedule.warmup, config.schedule.final_lr
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def stage_at(config: Config, step: int) -> Stage:
    """The stage that step number ``step`` (from 0) belongs to."""
    stages = config.schedule.stages
    stage = next((stage for stage in stages if step < round(stage.until * config.steps)), stages[-1])
    return Stage(image_size=stage.image_size, keep=stage.keep, augment=stage.augment)
