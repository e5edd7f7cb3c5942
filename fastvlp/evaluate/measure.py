"""The scores that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastvlp.evaluate.classes import load_classes
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.evaluate.zero_shot import zero_shot
from fastvlp.recipe import Eval
from fastvlp.systems.system import System

Scores = dict[str, dict[str, float]]


def embeds_both(system: System) -> bool:
    """Whether a system gives features of pictures and of captions."""
    return all(getattr(type(system), name) is not getattr(System, name) for name in ("embed_image", "embed_text"))


def measure(system: System, config: Eval, world: Any = None, beat: Callable[[], object] = lambda: None) -> Scores:
    """The scores by measure: "zero_shot" (top1, top5, n), "retrieval" (i2t_r1 ... t2i_r10, n)."""
    scores: Scores = {}
    if config.zero_shot and embeds_both(system):
        scores["zero_shot"] = zero_shot(system, config.zero_shot, load_classes(config.classes or ""), config.templates, config.batch_size)
    if config.retrieval and embeds_both(system):
        scores["retrieval"] = retrieval(system, config.retrieval, config.batch_size)
    return scores


def table(scores: dict[str, Any]) -> list[str]:
    """Scores as a few lines of text."""
    lines = []
    if "zero_shot" in scores:
        s = scores["zero_shot"]
        lines.append(f"zero-shot ({s['n']} pictures)        top-1 {s['top1']:6.2%}   top-5 {s['top5']:6.2%}")
    if "retrieval" in scores:
        s = scores["retrieval"]
        for way, title in (("i2t", "image to text"), ("t2i", "text to image")):
            lines.append(f"{title} ({s['n']} pairs)     " + "   ".join(f"R@{k} {s[f'{way}_r{k}']:6.2%}" for k in (1, 5, 10)))
    return lines
