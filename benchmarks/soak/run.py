"""Faults on purpose for some minutes, and what survived them: ``python -m benchmarks soak``."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.run import write_text
from benchmarks.soak import data, files, operators, ranks, saves, training

Case = Callable[[int, Path, torch.device], int]  # seed, an empty folder, device -> faults survived


@dataclass(frozen=True)
class Part:
    """A kind of case, its share of the time, and after how many faults (None: no end) it is done early."""

    name: str
    about: str
    case: Case
    share: float
    most_faults: int | None = None


@dataclass
class Outcome:
    """What one part found; ``failure`` is its first, after which the part stops."""

    part: str
    about: str
    first_seed: int
    cases: int = 0
    faults: int = 0
    seconds: float = 0.0
    failure: str = ""
    failed_seed: int | None = None


PARTS = (
    Part("operators", "random calls against float64", operators.case, 0.2),
    Part("data", "damaged samples and shards", data.case, 0.1, most_faults=1000),
    Part("files", "shards, pictures, captions and checkpoints of strangers", files.case, 0.1, most_faults=4000),
    Part("ranks", "processes lost in the middle of a loss", ranks.case, 0.2),
    Part("training", "trainings killed and continued", training.case, 0.2, most_faults=200),
    Part("saves", "trainings of which one system call fails", saves.case, 0.2, most_faults=200),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``soak``."""
    parser.add_argument("--minutes", type=float, default=15, help="how long, for all parts together (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first case of each part; the others count up (default: from the clock)")
    parser.add_argument("--only", choices=[part.name for part in PARTS], help="one part")
    parser.add_argument("--cases", type=int, help="at most so many cases of each part: 1 repeats a failure, with --seed and --only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the operators (default: %(default)s)")


def soak(part: Part, seed: int, seconds: float, cases: int | None, device: torch.device) -> Outcome:
    """Cases with the seeds ``seed``, ``seed + 1``, ... for that long, at least one."""
    outcome, start = Outcome(part.name, part.about, seed), time.monotonic()
    while not outcome.cases or time.monotonic() - start < seconds:
        if outcome.cases == cases or (part.most_faults is not None and outcome.faults >= part.most_faults):
            break
        this = seed + outcome.cases
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                outcome.faults += part.case(this, Path(folder), device)
            except Exception as error:  # whatever it is, it is what was looked for
                outcome.failure = f"{type(error).__name__}: {error}".replace(folder, "")
                outcome.failed_seed = this
        outcome.cases += 1
        if outcome.failure:
            break
    outcome.seconds = time.monotonic() - start
    return outcome


def run(arguments: argparse.Namespace, out: Path) -> int:
    """Run the parts, print and write (<out>/<device>/soak.json) what they found; 1 where something failed.

    Time that a part does not need goes to those after it.
    """
    seed = int(time.time()) % 10**8 * 1000 if arguments.seed is None else arguments.seed
    device, parts = torch.device(arguments.device), [part for part in PARTS if arguments.only in (None, part.name)]
    deadline, outcomes = time.monotonic() + 60 * arguments.minutes, []
    for number, part in enumerate(parts):
        left = max(0.0, deadline - time.monotonic()) * part.share / sum(later.share for later in parts[number:])
        print(f"{part.name}: {part.about}, for at most {left:.0f} s", flush=True)
        outcomes.append(soak(part, seed, left, arguments.cases, device))
        print(line(outcomes[-1]), flush=True)
    content: dict[str, Any] = {"op": "soak", "about": "faults on purpose, and what survived them", "machine": describe(device),
                               "parts": [vars(outcome) for outcome in outcomes]}  # fmt: skip
    path = out / str(content["machine"]["device"]) / "soak.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")
    failed = [outcome.part for outcome in outcomes if outcome.failure]
    print(f"failed: {', '.join(failed)}" if failed else "nothing was lost")
    return int(bool(failed))


def line(outcome: Outcome) -> str:
    """An outcome for people, with the command that repeats a failure."""
    counts = f"  {outcome.cases} cases from seed {outcome.first_seed}, {outcome.faults} faults survived, {outcome.seconds:.0f} s"
    if not outcome.failure:
        return counts
    again = f"python -m benchmarks soak --only {outcome.part} --seed {outcome.failed_seed} --cases 1"
    return f"{counts}\n  FAILED at seed {outcome.failed_seed}: {outcome.failure}\n  again: {again}"
