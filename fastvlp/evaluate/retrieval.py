"""Image-text retrieval, and the contrastive loss of what was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastvlp.data.shards import Shards
from fastvlp.evaluate.features import Encoder, Features, features, ranks, reciprocal, shares
from fastvlp.systems.system import Scale

RECALLS = (1, 5, 10)


def retrieval(model: Encoder, shards: Shards, batch_size: int = 256) -> dict[str, float]:
    """Recall at 1, 5 and 10 and mean reciprocal rank, both ways, among all samples of the shards.

    As is usual for COCO and Flickr30k, a picture finds its text if any of its own captions is among the k most similar of all captions; a
    caption, each of them a query, finds its own picture. Of equally similar ones the first listed counts as nearer. Samples of equal
    captions are not merged: only one's own partner is a hit.

    Args:
        model: see ``fastvlp.evaluate.features``.
        batch_size: samples encoded, and queries ranked, at a time.

    Returns:
        i2t_r1, i2t_r5, i2t_r10, i2t_mrr (image to text), t2i_r1, t2i_r5, t2i_r10, t2i_mrr (text to image), in 0..1; loss, see
        ``contrastive_loss``, of a model with a ``Scale``; n: samples; captions; skipped: samples that could not be used.

    Raises:
        FileNotFoundError: the shard list matches nothing. ValueError: no usable sample.
    """
    return found_among(model, features(model, shards, batch_size), batch_size)


def found_among(model: Encoder, found: Features, batch_size: int) -> dict[str, float]:
    """``retrieval`` among features that there are already."""
    own = torch.arange(len(found.keys))
    scores: dict[str, float] = {}
    for way, queries, targets, keys, owner in (("i2t", found.images, own, found.texts, found.owner),
                                               ("t2i", found.texts, found.owner, found.images, own)):
        rank = ranks(queries, keys, targets, owner, batch_size)
        scores |= {**shares(rank, RECALLS, f"{way}_r"), f"{way}_mrr": reciprocal(rank)}
    scale = scale_of(model)
    if scale is not None:
        scores["loss"] = contrastive_loss(found.images, found.texts[found.first], scale, batch_size)
    return {**scores, "n": len(found.keys), "captions": len(found.captions), "skipped": sum(found.skipped.values())}


def contrastive_loss(images: Tensor, texts: Tensor, scale: float, batch_size: int) -> float:
    """The symmetric softmax loss of all pairs at once, in nats (Radford et al. 2021), whatever loss the model was trained with.

    images, texts: [n, D], row i of one belongs to row i of the other. It grows with log(n): compare it on one set alone.
    """
    of_images, of_texts, own = [], torch.full((len(texts),), -torch.inf, dtype=torch.float64), []
    for first in range(0, len(images), batch_size):
        logits = scale * (images[first:first + batch_size] @ texts.T).double()
        own.append(logits.diagonal(first))
        of_images.append(logits.logsumexp(1))
        # Columns are summed as the rows go by: nothing of n x n is held.
        of_texts = torch.logaddexp(of_texts, logits.logsumexp(0))
    return ((torch.cat(of_images) + of_texts) / 2 - torch.cat(own)).mean().item()


@torch.no_grad()
def scale_of(model: Encoder) -> float | None:
    """The scale of a system's similarities; None of one without (a collective call where parameters are sharded)."""
    module = getattr(model, "scale", None)
    if not isinstance(module, Scale):
        return None
    value = module.log_scale.exp()
    return float(value.full_tensor() if isinstance(value, DTensor) else value)
