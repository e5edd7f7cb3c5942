"""What all processes of a run have to have in common before the first step."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastvlp import __version__
from fastvlp.config import ConfigError, to_dict
from fastvlp.data.shards import Index
from fastvlp.recipe import Recipe
from fastvlp.train.parallel import World

T = TypeVar("T")


def first_decides(world: World, act: Callable[[], T]) -> T:
    """What ``act`` gives, or raises, on the first process, on all of them."""
    found: Any = None
    error: Exception | None = None
    if world.rank == 0:
        try:
            found = act()
        except (ValueError, OSError) as caught:
            error = caught
    found, error = world.told((found, error))
    if error is not None:
        raise error
    return found


def check(world: World, recipe: Recipe, system: nn.Module, indices: Sequence[Index]) -> None:
    """Refuse to train processes that would not train the same thing: versions, settings, data, weights.

    Raises:
        ConfigError: on every process; says which key differs on which process.
    """
    if world.size == 1:
        return
    mine = _facts(recipe, system, indices)
    everyone = world.gather(mine)
    for rank, theirs in enumerate(everyone):
        for key in {**everyone[0], **theirs}:
            if everyone[0].get(key) != theirs.get(key):
                raise ConfigError(f"process {rank} has {key}={theirs.get(key)} and process 0 has {everyone[0].get(key)}; all processes of "
                                  "a run need the same: start them with the same command, code and data")


def _facts(recipe: Recipe, system: nn.Module, indices: Sequence[Index]) -> dict[str, str]:
    settings = {key: value for section, inside in to_dict(recipe).items() for key, value in _leaves(inside, section)}
    return {**settings, "fastvlp": __version__, "torch": torch.__version__, "python": ".".join(map(str, sys.version_info[:2])),
            "data": data_digest(indices), "weights": _weights_digest(system)}


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [(path, json.dumps(value))]
    return [leaf for key, item in items for leaf in _leaves(item, f"{path}.{key}")]


def data_digest(indices: Sequence[Index]) -> str:
    """Names and sizes of all shards."""
    facts = [[os.path.basename(path), os.path.getsize(path)] for index in indices for path in index.paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _weights_digest(system: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in system.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.double().sum().item()!r}".encode())
    return digest.hexdigest()[:16]
