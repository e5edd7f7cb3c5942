"""``fastvlp train``: any recipe, from its name or its file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from fastvlp.commands import recipes
from fastvlp.config import load
from fastvlp.recipe import Recipe


def command(options: argparse.Namespace) -> int:
    """Train, or say the keys that may be changed."""
    name, changes = named(options.arguments)
    if options.resume is not None:
        # As JSON, since a path may hold what the language of changes reads as a list or a mapping.
        changes.append(f"run.resume={json.dumps(options.resume)}")
    recipe = load(name, changes)
    if options.help:
        print(f"\n{recipes.keys(recipe)}")
        return 0

    from fastvlp.train import Interrupted, train
    from fastvlp.train.interrupt import say

    try:
        train(recipe)
    except Interrupted as stopped:
        say(str(stopped))  # the terminal may be gone
        return 128 + stopped.signum
    return 0


def named(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, where the first word is one, and the changes."""
    changes = list(arguments)
    return (changes.pop(0) if changes and "=" not in changes[0] else None), changes


def from_arguments(arguments: Sequence[str]) -> Recipe:
    """The recipe that a command line names, with its changes."""
    return load(*named(arguments))
