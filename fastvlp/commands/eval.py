"""``fastvlp eval``: scores of a trained model on any shards."""

from __future__ import annotations

import argparse
import json

import torch

from fastvlp import evaluate
from fastvlp.systems.files import load


def command(options: argparse.Namespace) -> int:
    """Zero-shot classification where classes are named, else retrieval."""
    if options.classes is None and options.template:
        raise ValueError("--template is for zero-shot classification; give --classes FILE too")
    system = load(options.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu", recipe=options.recipe)
    if options.classes is None:
        scores = {"retrieval": evaluate.retrieval(system, options.data)}
    else:
        classes = evaluate.load_classes(options.classes)
        scores = {"zero_shot": evaluate.zero_shot(system, options.data, classes, tuple(options.template or ["{}"]))}
    print(json.dumps(next(iter(scores.values()))) if options.json else "\n".join(evaluate.table(scores)))
    return 0
