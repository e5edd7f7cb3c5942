"""Image-text retrieval."""

from __future__ import annotations

from fastvlp.data.shards import Shards
from fastvlp.evaluate.features import Encoder, features, ranks

RECALLS = (1, 5, 10)


def retrieval(model: Encoder, shards: Shards, batch_size: int = 256) -> dict[str, float]:
    """Recall at 1, 5 and 10, both ways, among all samples of the shards.

    Each picture is paired with its first caption. Recall at k: the share of queries whose own partner is among the k most similar; of
    equally similar ones the first listed counts as nearer. Samples of equal captions are not merged: only one's own partner is a hit.

    Args:
        model: see ``fastvlp.evaluate.features``.
        batch_size: samples encoded, and queries ranked, at a time.

    Returns:
        i2t_r1, i2t_r5, i2t_r10 (image to text), t2i_r1, t2i_r5, t2i_r10 (text to image), in 0..1; n: samples; skipped: samples that could
        not be used.

    Raises:
        FileNotFoundError: the shard list matches nothing. ValueError: no usable sample.
    """
    found = features(model, shards, batch_size)
    scores: dict[str, float] = {}
    for way, queries, keys in (("i2t", found.images, found.texts), ("t2i", found.texts, found.images)):
        rank = ranks(queries, keys, found.owner, batch_size)
        scores |= {f"{way}_r{k}": (rank < k).double().mean().item() for k in RECALLS}
    return {**scores, "n": len(found.keys), "skipped": sum(found.skipped.values())}
