"""The softmax objectives written out over whole matrices, and cases of ``contrastive_loss`` to compare with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp.losses import NegativeQueue

PAIRS, IMAGES, TEXTS, WIDTH = 29, 23, 31, 40
DIFFERENTIABLE = ("image", "text", "scale", "text_negatives", "image_negatives")


def dense_direction(S: Tensor, same: Tensor, extra: Tensor, scale: Tensor, weight: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Mean loss of the rows of S [M, N] with ``extra`` [M, J] more candidates; ``same``: where ids are equal."""
    equal_ids = options.get("equal_ids", "mean") if "ids" in options else "exclude"
    diagonal = torch.eye(*S.shape, dtype=torch.bool)
    positive = diagonal if equal_ids == "exclude" else same
    counted = positive.any(1)
    S, same, extra, diagonal, positive = (part[counted] for part in (S, same, extra, diagonal, positive))
    out = same & ~diagonal if equal_ids == "exclude" else torch.zeros_like(same)
    none = torch.zeros(extra.shape, dtype=torch.bool)
    logits, positive, out = torch.cat([S, extra], 1), torch.cat([positive, none], 1), torch.cat([out, none], 1)
    logits = logits.masked_fill(out, -torch.inf)
    if options.get("tau_plus") is not None:
        tau = torch.as_tensor(options["tau_plus"], dtype=S.dtype)
        negative = ~positive & ~out
        n, of_positive = negative.sum(1), logits[positive].exp()
        mean = torch.where(negative, logits, -torch.inf).exp().sum(1) / n
        g = torch.maximum((mean - tau * of_positive) / (1 - tau), (-scale).exp())
        odds = n * g / of_positive
        loss, missed = odds.log1p(), odds / (1 + odds)
    else:
        log_p = logits.log_softmax(1)
        missed = log_p.masked_fill(positive, -torch.inf).exp().sum(1)
        if equal_ids == "sum":
            loss = -log_p.masked_fill(~positive, -torch.inf).logsumexp(1)
        else:
            loss = -(log_p.masked_fill(~positive, 0.0).sum(1) / positive.sum(1))
        smoothing = options.get("label_smoothing", 0.0)
        uniform = -log_p.masked_fill(out, 0.0).sum(1) / (~out).sum(1)
        loss = (1 - smoothing) * loss + smoothing * uniform if smoothing else loss
    if options.get("focal_gamma"):
        loss = missed ** options["focal_gamma"] * loss
    if weight is not None:
        loss = loss * weight[counted]
    return loss.mean()


def dense(tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The loss by its formulas: products of operands in the dtype of the features, everything else in ``dtype``."""
    image, text, scale = tensors["image"], tensors["text"], tensors["scale"].to(dtype)
    two = {name: pair if isinstance(pair, tuple) else (pair, pair) for name, pair in options.items() if name in ("weights", "ids")}
    r, c = (bias.to(dtype) for bias in options.get("log_weights", (torch.zeros(len(image)), torch.zeros(len(text)))))
    ids = two.get("ids", (torch.arange(len(image)), torch.arange(len(text))))
    same = (ids[0][:, None] == ids[1]) & (ids[0][:, None] >= 0)
    total = torch.zeros((), dtype=dtype)
    for place, width in enumerate(options.get("prefixes") or [WIDTH]):

        def cut(features: Tensor, width: int = width) -> Tensor:
            return F.normalize(features[..., :width], dim=-1) if options.get("prefixes") else features

        def more(anchors: Tensor, name: str) -> Tensor:
            extra = tensors.get(name, options.get(name))
            if extra is None:
                return torch.zeros(len(anchors), 0, dtype=dtype)
            if isinstance(extra, NegativeQueue):
                extra = extra.features[extra.log_weight == 0].to(anchors.dtype)
            extra = cut(extra)
            return scale * (anchors @ extra.T if extra.ndim == 2 else torch.einsum("md,mjd->mj", anchors, extra)).to(dtype)

        x, y = cut(image), cut(text)
        S = scale * (x @ y.T).to(dtype)
        u, v = (None if weight is None else weight.to(dtype) for weight in two.get("weights", (None, None)))
        of_images = dense_direction(S + c, same, more(x, "text_negatives"), scale, u, options)
        of_texts = dense_direction(S.T + r, same.T, more(y, "image_negatives"), scale, v, options)
        often = options["prefix_weights"][place] if options.get("prefix_weights") else 1.0
        total = total + often * (of_images + of_texts) / 2
    return total


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _queue(seed: int) -> NegativeQueue:
    queue = NegativeQueue(50, WIDTH, dtype=torch.float64)
    queue.enqueue(F.normalize(_random(37, WIDTH, seed=seed), dim=1).bfloat16())
    return queue


PAIR_IDS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2, 3, -1, -1, 2, *range(7, 24)])
SOME_IDS = torch.tensor([-1, 7, 90, 90, *range(4, 23)]), torch.tensor([-1, 91, *range(4, 23), 7, 7, 8, 9, 90, 22, 22, 21, 20, 19])
LOG_WEIGHTS = _random(PAIRS, seed=1) / 4, _random(PAIRS, seed=2) / 4
WEIGHTS = _random(PAIRS, seed=3).sigmoid(), _random(PAIRS, seed=4).sigmoid()
SOME_WEIGHTS = _random(IMAGES, seed=3).sigmoid(), _random(TEXTS, seed=4).sigmoid()
SOME_LOG_WEIGHTS = _random(IMAGES, seed=5) / 4, _random(TEXTS, seed=6) / 4
PRIORS = 0.2 * _random(PAIRS, seed=7).sigmoid()

# Names ending in negatives give shapes: the tensors are made with the features.
CASES: dict[str, dict[str, Any]] = {
    "clip": {},
    "weights": {"weights": WEIGHTS[0]},
    "weights of sides": {"weights": WEIGHTS},
    "log weights": {"log_weights": LOG_WEIGHTS},
    "smoothing": {"label_smoothing": 0.1},
    "focal": {"focal_gamma": 2.0},
    "half focal": {"focal_gamma": 0.5},
    "debiased": {"tau_plus": 0.01},
    "debiased by rows": {"tau_plus": PRIORS},
    "mean": {"ids": SOME_IDS},
    "sum": {"ids": SOME_IDS, "equal_ids": "sum"},
    "exclude": {"ids": PAIR_IDS, "equal_ids": "exclude"},
    "shared negatives": {"text_negatives": (37, WIDTH)},
    "own negatives": {"text_negatives": (PAIRS, 3, WIDTH), "image_negatives": (PAIRS, 1, WIDTH)},
    "queues": {"text_negatives": _queue(8), "image_negatives": _queue(9)},
    "prefixes": {"prefixes": (5, 16, WIDTH)},
    "weights, smoothing, mean, log weights": {
        "ids": SOME_IDS, "weights": SOME_WEIGHTS, "label_smoothing": 0.2, "log_weights": SOME_LOG_WEIGHTS,
    },
    "sum, smoothing, negatives": {
        "ids": SOME_IDS, "equal_ids": "sum", "label_smoothing": 0.1, "text_negatives": (IMAGES, 2, WIDTH), "image_negatives": (11, WIDTH),
    },
    "sum, focal, weights": {"ids": SOME_IDS, "equal_ids": "sum", "focal_gamma": 1.5, "weights": SOME_WEIGHTS},
    "exclude, smoothing, queues, log weights": {
        "ids": PAIR_IDS, "equal_ids": "exclude", "label_smoothing": 0.1, "text_negatives": _queue(8), "log_weights": LOG_WEIGHTS,
    },
    "debiased, exclude, focal, negatives": {
        "ids": PAIR_IDS, "equal_ids": "exclude", "tau_plus": PRIORS, "focal_gamma": 1.0, "text_negatives": (9, WIDTH),
        "image_negatives": _queue(9), "weights": WEIGHTS,
    },
    "all with prefixes": {
        "prefixes": (8, WIDTH), "prefix_weights": (0.5, 1.5), "ids": SOME_IDS, "weights": SOME_WEIGHTS, "label_smoothing": 0.1,
        "text_negatives": (IMAGES, 2, WIDTH), "image_negatives": _queue(9), "log_weights": SOME_LOG_WEIGHTS,
    },
    "focal, debiased, prefixes": {"prefixes": (8, WIDTH), "focal_gamma": 2.0, "tau_plus": 0.05, "text_negatives": (11, WIDTH)},
}  # fmt: skip


def make(case: str, scale: float, likeness: float, dtype: torch.dtype, draw: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to differentiate, with features in ``dtype``, and options.

    ``likeness``: how much pairs and equal ids have in common. ``draw``: other random features.
    """
    options = dict(CASES[case])
    of_images, of_texts = SOME_IDS if options.get("ids") is SOME_IDS else (torch.arange(PAIRS),) * 2
    common = _random(100, WIDTH, seed=10 + 1000 * draw)
    tensors = {}
    for seed, (name, ids) in enumerate((("image", of_images), ("text", of_texts)), start=11):
        noise = _random(len(ids), WIDTH, seed=seed + 1000 * draw)
        tensors[name] = F.normalize(likeness * common[ids] + (1 - likeness) * noise, dim=1).to(dtype)
    tensors["scale"] = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for seed, name in enumerate(("text_negatives", "image_negatives"), start=20):
        if isinstance(options.get(name), tuple):
            tensors[name] = F.normalize(_random(*options.pop(name), seed=seed + 1000 * draw), dim=-1).to(dtype)
    return tensors, options


def differentiated(
    function: Any, tensors: dict[str, Tensor], options: dict[str, Any], *rest: Any, autocast: bool = False
) -> dict[str, Tensor]:
    """Value and gradients of ``function(leaves, options, *rest)`` for fresh leaves with these values."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(leaves, options, *rest)
    loss.backward()
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
