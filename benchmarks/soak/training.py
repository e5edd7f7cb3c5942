"""A tiny training that is killed at random moments and started again, against the same training undisturbed, bit by bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.processes import forkserver
from benchmarks.soak.system_calls import CRASH, faults

STEPS, MOST_KILLS = 12, 30
PATIENCE = 120.0  # seconds in which one undisturbed training has to end


def settings(seed: int, folder: Path, name: str) -> dict[str, Any]:
    """A run of a few steps on the shipped data, with what a checkpoint has to hold drawn at random: averages, queues, micro-batches."""
    draw = random.Random(seed)
    base = draw.choice(("clip", "siglip", "brivl"))
    tokens = {"image": draw.choice((60, 4096)), "text": draw.choice((50, 4096))}
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(folder), "seed": seed % 2**31, "device": "cpu"},
        "data": {"train": "mini:val-openclipart", "batch_size": draw.choice((8, 13)), "workers": 0},
        "model": {"embed_dim": 16, "image": {"width": 32, "depth": 2, "heads": 2}, "text": {"width": 32, "depth": 1, "heads": 2},
                  **({"queue": 40} if base == "brivl" else {})},
        "optim": {"grad_clip": draw.choice((None, 1.0))},
        "schedule": {"steps": STEPS, "warmup": 2,
                     "stages": [{"until": 0.5, "image_size": 32, "keep": 0.5}, {"image_size": 64, "augment": 0.5}]},
        "train": {"ema": draw.choice((None, 0.9)), "tokens": tokens, "checkpoint_every": draw.choice((1, 2)), "keep": draw.choice((1, 2))},
    }  # fmt: skip
    texts = [f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
             for section, inside in changes.items() for key, value in inside.items()]
    return {"recipe": base, "changes": ["eval={}", *texts], "folder": str(folder / name)}


def run(values: dict[str, Any], output: str) -> None:
    """Train in this process, its words and its traceback to a file; ``values["fault"]`` is (number, fault) of a system call."""
    torch.set_num_threads(1)
    from fastvlp.config import load
    from fastvlp.train import plots, train

    no_pictures = mock.patch.object(plots, "available", return_value=False)  # they would take longer than the training
    with open(output, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), no_pictures, \
            faults(Path(values["folder"]), *values.get("fault", (None, CRASH))) as calls:
        try:
            train(load(values["recipe"], values["changes"]))
        except BaseException:  # also an exit: the parent reads the traceback and the code
            traceback.print_exc()
            file.flush()
            os._exit(1)
        Path(f"{values['folder']}.calls").write_text(str(len(calls.made)))


def weights(folder: Path) -> dict[str, Tensor]:
    """Everything that training ended with, by name: weights, averages and the optimizer's state."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from fastvlp.train.checkpoint import checkpoints

    whole = folder / "whole.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no process group
        dcp_to_torch_save(checkpoints(folder / "checkpoints")[-1] / "state", whole)
    state = torch.load(whole)
    found = dict(state["model"]) | {f"average {name}": x for name, x in state.get("ema", {}).items()}
    for name, moments in state["optim"]["state"].items():
        found |= {f"optimizer {name} {kind}": x for kind, x in moments.items()}
    return found


def train(values: dict[str, Any], kill_after: float | None = None) -> bool:
    """Train in a process of its own; whether it came to its end before it was killed.

    Raises:
        AssertionError: it failed, or hung; with what it said.
    """
    output = Path(values["folder"] + ".txt")
    process = forkserver().Process(target=run, args=(values, str(output)), daemon=True)
    process.start()
    process.join(PATIENCE if kill_after is None else kill_after)
    if process.is_alive():
        process.kill()
        process.join()
        assert kill_after is not None, f"a training hung for {PATIENCE:.0f} s:\n{output.read_text(encoding='utf-8')[-2000:]}"
        return False
    said = output.read_text(encoding="utf-8") if output.exists() else ""
    assert process.exitcode == 0, f"a training ended with exit code {process.exitcode}:\n{said[-2000:]}"
    return True


def case(seed: int, folder: Path, device: torch.device) -> int:
    """One training killed until it ends; returns how often it was killed.

    The moments are those of the seed, as shares of the time that the undisturbed training took.

    Raises:
        AssertionError: it failed to go on, or ended with other weights.
    """
    draw = random.Random(seed)
    whole, parts = settings(seed, folder, "whole"), settings(seed, folder, "parts")
    begin = time.perf_counter()
    train(whole)
    length, kills = time.perf_counter() - begin, 0
    while not train(parts, kill_after=length * draw.random() if kills < MOST_KILLS else None):
        kills += 1
    compare(folder, f"after {kills} kills")
    return kills


def compare(folder: Path, when: str) -> None:
    """The training in ``parts`` ended with every bit of the one in ``whole``."""
    one, other = weights(folder / "whole"), weights(folder / "parts")
    assert one.keys() == other.keys(), f"{when} the training holds other things: {sorted(one.keys() ^ other.keys())}"
    wrong = [name for name in one if not torch.equal(one[name], other[name])]
    assert not wrong, f"{when} {len(wrong)} of {len(one)} tensors differ, the first is {wrong[0]}"
