"""Learning rate and stages as pure functions of the step number."""

from __future__ import annotations

import math

from fastvlp.data.batch import Stage
from fastvlp.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step, before the factors of parameter groups; ``fastvlp.recipe.Schedule`` says the shapes."""
    schedule, total = recipe.schedule, recipe.steps
    if step < schedule.warmup:
        return recipe.optim.lr * (step + 1) / schedule.warmup
    begin = _begins(recipe, step)
    rise = min(1.0, (step - begin + 1) / schedule.rewarm) if begin and schedule.rewarm else 1.0
    # A run that is all warm-up has no steps to divide by.
    progress = min(1.0, (step - schedule.warmup) / max(1, total - schedule.warmup))
    if schedule.shape == "cosine":
        level = _cosine(progress, schedule.final_lr)
    else:
        level = 1.0 if schedule.shape == "wsd" else _cosine(min(1.0, progress / 0.25), schedule.constant_lr)
        left = (total - step) / max(1, round(schedule.cooldown * total))
        if left < 1:
            level = schedule.final_lr + (level - schedule.final_lr) * left
    return recipe.optim.lr * level * rise


def _cosine(progress: float, end: float) -> float:
    """From 1 to ``end`` over half a period."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def _begins(recipe: Recipe, step: int) -> int:
    """The first step of the stage that ``step`` belongs to."""
    return max((round(stage.until * recipe.steps) for stage in recipe.schedule.stages if round(stage.until * recipe.steps) <= step),
               default=0)


def stage_at(recipe: Recipe, step: int) -> Stage:
    """The stage that step number ``step`` (from 0) belongs to."""
    stages = recipe.schedule.stages
    return next((stage for stage in stages if step < round(stage.until * recipe.steps)), stages[-1])
