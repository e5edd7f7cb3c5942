"""Whether a system knows which caption belongs to a picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvlp.data.shards import Shards
from fastvlp.evaluate.reading import How, judged
from fastvlp.systems.system import System


def pair_scores(system: System, shards: Shards, how: How | int = 256) -> dict[str, float]:
    """Matching accuracy: how often a picture's first caption scores higher than that of another sample.

    The other is the next sample in the order of the files that has another class (another first caption, where it has no class). Equal
    scores count a half, so that a system that sees nothing has 50 %; one that is no number counts against the system.

    Args:
        system: one with ``score``, in evaluation mode. how: see ``fastvlp.evaluate.features``.

    Returns:
        accuracy in 0..1; margin: the mean of own minus other score; n: samples; skipped: samples that could not be used.

    Raises:
        FileNotFoundError: the shard list matches nothing. ValueError: no usable sample.
    """
    def judge(images: Any, captions: list[str], others: list[str]) -> list[Tensor]:
        return [system.score(images, system.prepared("text", texts)).double() for texts in (captions, others)]

    (own, other), skipped = judged(system, shards, how if isinstance(how, How) else How(how), judge, others=True)
    # A tie is half right: a system that gives all pairs one score is at chance.
    right = (own > other).double() + (own == other).double() / 2
    return {"accuracy": right.mean().item(), "margin": (own - other).mean().item(), "n": len(own), "skipped": sum(skipped.values())}
