"""How well a system predicts captions."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastvlp.data.shards import Shards
from fastvlp.evaluate.reading import How, judged
from fastvlp.systems.system import System


def caption_nll(system: System, shards: Shards, how: How | int = 256) -> dict[str, float]:
    """Bits per token of each sample's first caption given its picture: the sum of -log2 p over all tokens but the first of each caption,
    divided by their number. So perplexity is 2 to that power.

    Args:
        system: one with ``caption_nll``, in evaluation mode. how: see ``fastvlp.evaluate.features``.

    Returns:
        bits_per_token; accuracy: the share of tokens that are the likeliest one, of a system with ``caption_hits``; tokens; n: samples;
        skipped: samples that could not be used.

    Raises:
        FileNotFoundError: the shard list matches nothing. ValueError: no usable sample, or captions of one token at most.
    """
    counts_hits = type(system).caption_hits is not System.caption_hits

    def judge(images: Any, captions: list[str], others: list[str]) -> list[Tensor]:
        texts = system.prepared("text", captions)
        # Sums in float64: a large set has millions of tokens.
        found = [system.caption_nll(images, texts).double(), (texts.lengths - 1).clamp_min(0)]
        return [*found, system.caption_hits(images, texts)] if counts_hits else found

    (nll, tokens, *hits), skipped = judged(system, shards, how if isinstance(how, How) else How(how), judge)
    total = int(tokens.sum())
    if not total:
        raise ValueError(f"the captions of {shards!r} have one token at most, so that there is none to predict")
    accuracy = {"accuracy": int(hits[0].sum()) / total} if hits else {}
    return {"bits_per_token": (nll.sum() / math.log(2) / total).item(), **accuracy, "tokens": total, "n": len(nll),
            "skipped": sum(skipped.values())}
