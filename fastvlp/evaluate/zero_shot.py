"""Zero-shot classification with prompt templates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvlp.data.shards import Shards
from fastvlp.evaluate.features import Encoder, Features, encode_texts, features, ranks, reciprocal, shares
from fastvlp.evaluate.reading import How


def zero_shot(model: Encoder, shards: Shards, classes: Sequence[str], templates: Sequence[str] = ("{}",),
              batch_size: int = 256) -> dict[str, float]:
    """Top-1 and top-5 accuracy and mean reciprocal rank on samples that name their class ("class" in the JSON).

    A class is embedded as the normalised mean of the normalised features of its name in each template (Radford et al. 2021). Of
    equally similar classes the first listed counts as nearer.

    Args:
        model: see ``fastvlp.evaluate.features``.
        classes: the names to choose among.
        templates: each holds {} where the name goes.
        batch_size: samples or prompts encoded at a time.

    Returns:
        top1, top5, mrr in 0..1; n: samples; skipped: samples that could not be used.

    Raises:
        FileNotFoundError: the shard list matches nothing.
        ValueError: no usable sample, a sample whose class is missing or not in ``classes``, a name twice, a template without {}.
    """
    check(classes, templates)
    return named(model, features(model, shards, batch_size, texts=False), classes, templates, How(batch_size))


def check(classes: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse what cannot be chosen among."""
    names = set(classes)
    if not names or len(names) < len(classes):
        raise ValueError(f"{len(classes)} classes with {len(names)} different names; at least one is needed, and each only once")
    if not templates:
        raise ValueError("there are no templates; ('{}',) is the bare name")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}}; put {{}} where the class name goes, as in 'a drawing of {{}}'")


def named(model: Encoder, found: Features, classes: Sequence[str], templates: Sequence[str], how: How) -> dict[str, float]:
    """``zero_shot`` of features that there are already; with several processes a collective call."""
    places = {name: i for i, name in enumerate(classes)}
    strangers = Counter(name for name in found.classes if name not in places)
    if strangers:
        some = ", ".join("no class" if name is None else repr(name) for name, _ in strangers.most_common(5))
        raise ValueError(f"{sum(strangers.values())} of {len(found.classes)} samples have a class that is not among the {len(classes)} "
                         f"given ({some}); give the list of classes these shards were made with")
    targets = torch.tensor([places[name] for name in found.classes if name is not None])
    weights = class_features(model, classes, templates, how)
    rank = ranks(found.images, weights, targets, torch.arange(len(classes)), how.batch_size)
    return {**shares(rank, (1, 5), "top"), "mrr": reciprocal(rank), "n": len(rank), "skipped": sum(found.skipped.values())}


def class_features(model: Encoder, classes: Sequence[str], templates: Sequence[str], how: How) -> Tensor:
    """Normalised mean over the templates of the features of each class: float32 [classes, D]."""
    prompts = [[template.replace("{}", name) for name in classes] for template in templates]
    # Means of features, not of scores: CLIP's way, and one product for any number of templates.
    mean = torch.stack([encode_texts(model, texts, how) for texts in prompts]).mean(0)
    return torch.nn.functional.normalize(mean, dim=-1)
