"""The scores that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastvlp.data.shards import Shards
from fastvlp.evaluate.caption_nll import caption_nll
from fastvlp.evaluate.classes import load_classes
from fastvlp.evaluate.features import Features, features
from fastvlp.evaluate.knn import vote
from fastvlp.evaluate.pair_scores import pair_scores
from fastvlp.evaluate.probe import read_off
from fastvlp.evaluate.reading import Alone, How, Ranks
from fastvlp.evaluate.retrieval import found_among
from fastvlp.evaluate.zero_shot import check, named
from fastvlp.recipe import Eval
from fastvlp.systems.system import System

Scores = dict[str, dict[str, Any]]
NEEDS = {"zero_shot": ("embed_image", "embed_text"), "retrieval": ("embed_image", "embed_text"), "captions": ("caption_nll",),
         "pairs": ("score",), "knn": ("embed_image",), "probe": ("embed_image",)}


def can(system: System, *names: str) -> bool:
    """Whether a system has these of the methods that evaluation asks for."""
    return all(getattr(type(system), name) is not getattr(System, name) for name in names)


def embeds_both(system: System) -> bool:
    """Whether a system gives features of pictures and of captions."""
    return can(system, "embed_image", "embed_text")


def measure(system: System, config: Eval, world: Ranks | None = None, beat: Callable[[], object] = lambda: None,
            timeout: float = 0) -> Scores:
    """The scores by measure (the keys of ``NEEDS``), of all processes together; each set of shards is encoded once.

    A measure of what the system cannot do is {"left_out": why}.

    Args:
        system: in evaluation mode. world: the processes, which all call this. beat: called at every batch.
        timeout: seconds to wait for a worker, 0 for ever.

    Raises:
        FileNotFoundError, ValueError: as the measures do. RuntimeError: a worker died, or did not answer within ``timeout``.
    """
    how = How(config.batch_size, world or Alone(), config.workers, beat, timeout)
    held: dict[tuple[Any, ...], Features] = {}

    def encoded(shards: Shards) -> Features:
        # Several measures may name the same shards, and encoding takes nearly all of the time.
        key = tuple(shards)  # type: ignore[arg-type]
        if key not in held:
            held[key] = features(system, shards, how, texts=embeds_both(system) and key == config.retrieval)
        return held[key]

    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "zero_shot": lambda: _zero_shot(system, config, encoded(config.zero_shot), how),
        "retrieval": lambda: found_among(system, encoded(config.retrieval), how.batch_size),
        "captions": lambda: caption_nll(system, config.captions, how),
        "pairs": lambda: pair_scores(system, config.pairs, how),
        "knn": lambda: vote(encoded(config.knn), encoded(config.probe_train), how.batch_size),
        "probe": lambda: read_off(encoded(config.probe), encoded(config.probe_train)),
    }
    scores: Scores = {}
    for name, act in measures.items():
        if getattr(config, name):
            lacking = [need for need in NEEDS[name] if not can(system, need)]
            # fully_shard renames the class.
            kind = type(system).__name__.removeprefix("FSDP")
            scores[name] = {"left_out": f"{kind} has no {' and no '.join(lacking)}"} if lacking else act()
    return scores


def _zero_shot(system: System, config: Eval, found: Features, how: How) -> dict[str, float]:
    classes = load_classes(config.classes or "")
    check(classes, config.templates)
    return named(system, found, classes, config.templates, how)


def table(scores: dict[str, Any]) -> list[str]:
    """Scores as a few lines of text."""
    lines = [f"{name}: left out, {scores[name]['left_out']}" for name in NEEDS if "left_out" in scores.get(name, ())]
    found = {name: scores[name] for name in NEEDS if name in scores and "left_out" not in scores[name]}
    for name, title in (("zero_shot", "zero-shot"), ("knn", "nearest neighbours"), ("probe", "linear probe")):
        if s := found.get(name):
            mrr = f"   MRR {s['mrr']:.3f}" if "mrr" in s else ""
            lines.append(f"{title} ({s['n']} pictures)        top-1 {s['top1']:6.2%}   top-5 {s['top5']:6.2%}{mrr}")
    if s := found.get("retrieval"):
        for way, title in (("i2t", "image to text"), ("t2i", "text to image")):
            recalls = "   ".join(f"R@{k} {s[f'{way}_r{k}']:6.2%}" for k in (1, 5, 10))
            lines.append(f"{title} ({s['n']} pairs)     {recalls}   MRR {s[f'{way}_mrr']:.3f}")
        if "loss" in s:
            lines.append(f"contrastive loss ({s['n']} pairs)     {s['loss']:.3f}")
    if s := found.get("captions"):
        accuracy = f"   next token right {s['accuracy']:6.2%}" if "accuracy" in s else ""
        lines.append(f"captions ({s['n']} of {s['tokens']} tokens)     {s['bits_per_token']:.3f} bits per token{accuracy}")
    if s := found.get("pairs"):
        lines.append(f"own caption against another's ({s['n']} pairs)     {s['accuracy']:6.2%}")
    return lines
