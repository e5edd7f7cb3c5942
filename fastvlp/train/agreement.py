"""What all processes of a run have to have in common before the first step."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastvlp import __version__
from fastvlp.config import ConfigError, to_dict
from fastvlp.data.shards import Index
from fastvlp.recipe import Recipe
from fastvlp.train.parallel import World

HEADERS = 1 << 16  # samples whose headers are read to compare data; of shards beyond these, the sizes of the files have to do

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
    # The error travels, too: processes that waited for a result that never comes would hang until the timeout.
    found, error = world.told((found, error))
    if error is not None:
        raise error
    return found


def all_or_none(world: World, act: Callable[[], T]) -> T:
    """What ``act`` gives on each process; where it is refused on one, it is on all, and says on which."""
    found: Any = None
    error: Exception | None = None
    try:
        found = act()
    except (ValueError, OSError, RuntimeError) as caught:
        error = caught
    # Every process takes part in this exchange, also one that failed: leaving would let the others wait.
    for rank, theirs in enumerate(world.gather(None if error is None else str(error))):
        if theirs is not None and world.size > 1:
            raise ConfigError(f"process {rank}: {theirs}") from error
    if error is not None:
        raise error
    return found


def check(world: World, facts: Callable[[], Mapping[str, str]]) -> None:
    """Refuse to train processes that would not train the same thing.

    Raises:
        ConfigError: on every process; says which of the ``facts`` differ on which process.
    """
    if world.size == 1:
        return
    everyone = world.gather(dict(facts()))
    # In the order in which keys were met, so that all processes name the same ones.
    differing = [key for key in {key: None for theirs in everyone for key in theirs}
                 if any(theirs.get(key) != everyone[0].get(key) for theirs in everyone)]
    if not differing:
        return
    said = []
    for key in differing[:4]:
        rank, other = next((rank, theirs.get(key)) for rank, theirs in enumerate(everyone) if theirs.get(key) != everyone[0].get(key))
        said.append(f"process {rank} has {key}={other} and process 0 has {everyone[0].get(key)}")
    more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise ConfigError(f"{'; '.join(said)}{more}: all processes of a run need the same; start them with the same command, code and data")


def settings(recipe: Recipe, device: torch.device) -> dict[str, str]:
    """Versions and every setting, by dotted key."""
    values = {key: value for section, inside in to_dict(recipe).items() for key, value in _leaves(inside, section)}
    return {**values, "fastvlp": __version__, "torch": torch.__version__, "python": ".".join(map(str, sys.version_info[:2])),
            "device": device.type}


def same_file(world: World, path: Path, why: str) -> None:
    """Refuse to go on when a process does not see what the first one sees at ``path``.

    Raises:
        ConfigError: on every process; ``why`` completes the sentence.
    """
    if world.size == 1:
        return
    try:
        mine: str | None = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        mine = None
    everyone = world.gather(mine)
    for rank, theirs in enumerate(everyone):
        if theirs is None or theirs != everyone[0]:
            raise ConfigError(f"process {rank} {'does not see' if theirs is None else 'sees another'} {path}, {why}; run.dir has to lie on "
                              "a file system that all processes share")


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [(path, json.dumps(value))]
    return [leaf for key, item in items for leaf in _leaves(item, f"{path}.{key}")]


def data_digest(indices: Sequence[Index]) -> str:
    """Names the shards of all sources."""
    return hashlib.sha256(" ".join(index.digest(HEADERS) for index in indices).encode()).hexdigest()[:16]


def weights_digest(system: nn.Module) -> str:
    """Names the weights of a system by name, shape and sum of each."""
    digest = hashlib.sha256()
    for name, tensor in system.state_dict().items():
        # Sums in float64 tell seeds and checkpoints apart; hashing gigabytes of weights would take longer than starting.
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.double().sum().item()!r}".encode())
    return digest.hexdigest()[:16]
