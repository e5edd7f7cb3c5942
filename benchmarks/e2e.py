"""Time to zero-shot accuracy on the shipped data: our default recipe against open_clip's own model and loss.

Every part (one training of one system with one seed) runs in a process of its own, one after the other, and leaves
results/<device>/mini/<part>.json at once, so that an interrupted benchmark goes on with --resume. Training seconds count
neither start-up nor evaluation, for both; the score is that of the last step.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.machine import describe, environment, load
from benchmarks.rivals import version
from benchmarks.run import write_text

OURS, OURS_CLIP, RIVAL = "fastvlp", "fastvlp, CLIP's tokenizer", "open_clip"
CLIP_TOKENIZER = ("data.tokenizer=clip", "model.text.vocab_size=49408")
_TABLES = ("tokens", "places", "rows", "columns")
_COLUMNS = ("part", "system", "seed", "train_seconds", "wall_seconds", "steps", "images_per_second", "top1", "top5", "i2t_r10",
            "tower_parameters", "load_before", "version", "device", "threads", "torch", "commit", "timestamp")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One training: the command that runs it, given a folder, and what reads the scores from that folder."""

    system: str
    seed: int
    command: Callable[[Path], list[str]]
    read: Callable[[Path], dict[str, Any]]

    @property
    def name(self) -> str:
        """Also the name of the part's file."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.system} seed {self.seed}".lower())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run --e2e mini``."""
    parser.add_argument("--minutes", type=float, default=15, help="e2e: training minutes of open_clip's model (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="e2e: seeds of our runs (default: 0 1 2)")
    parser.add_argument("--clip-seeds", type=int, nargs="*", default=[0], help="e2e: seeds of our runs with CLIP's tokenizer (default: 0)")
    parser.add_argument("--resume", action="store_true", help="e2e: keep the parts that are already measured")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e2e: a change of our recipe (schedule.steps=20)")


def _baseline(minutes: float, seed: int) -> Part:
    def command(folder: Path) -> list[str]:
        return ["benchmarks.open_clip_baseline", "--minutes", str(minutes), "--seed", str(seed), "--json", str(folder / "result.json")]

    return Part(RIVAL, seed, command, lambda folder: json.loads((folder / "result.json").read_text(encoding="utf-8")))


def ours(system: str, seed: int, changes: list[str], program: Sequence[str] = ("fastvlp", "train")) -> Part:
    """A training of ours: the module and its first words, with changes of the default recipe."""

    def command(folder: Path) -> list[str]:
        return [*program, f"run.dir={folder}", "run.name=run", f"run.seed={seed}", *changes]

    return Part(system, seed, command, lambda folder: read_run(folder / "run"))


def read_run(folder: Path) -> dict[str, Any]:
    """Scores, speed, sizes and curve of a finished training of ours."""
    import fastvlp

    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    parameters = {"image": 0, "text": 0}
    for name, parameter in fastvlp.load(folder).named_parameters():
        part, _, rest = name.partition(".")
        tower = part.removesuffix("_head")
        if tower in parameters and rest.split(".")[0] not in _TABLES:
            parameters[tower] += parameter.numel()
    scores = {"top1": found["zero_shot"]["top1"], "top5": found["zero_shot"]["top5"], "i2t_r10": found["retrieval"]["i2t_r10"]}
    speed = {name: found[name] for name in ("train_seconds", "steps", "images_per_second")}
    return scores | speed | {"parameters": parameters, "curve": [{"seconds": found["train_seconds"], "top1": scores["top1"]}], "run": found}


def parts(arguments: argparse.Namespace) -> list[Part]:
    """What is run, in this order: the rival once, ours with every seed, ours with the rival's tokenizer."""
    own = [ours(OURS, seed, arguments.set) for seed in arguments.seeds]
    with_clip = [ours(OURS_CLIP, seed, [*CLIP_TOKENIZER, *arguments.set]) for seed in arguments.clip_seeds]
    return [_baseline(arguments.minutes, 0), *own, *with_clip]


def measure(part: Part) -> dict[str, Any]:
    """Run one part.

    Raises:
        RuntimeError: its process failed.
    """
    before = load()
    distribution = "open_clip_torch" if part.system == RIVAL else "fastvlp"
    about = describe(torch.device("cpu")) | {"version": version(distribution) or "source"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *part.command(Path(folder))]
        start = time.perf_counter()
        code = subprocess.run(command, env=environment(), check=False).returncode
        if code:
            raise RuntimeError(f"{part.name} ended with exit code {code}: {' '.join(command)}; the finished parts are kept (--resume)")
        wall = time.perf_counter() - start
        found = part.read(Path(folder))
    found["tower_parameters"] = sum(found["parameters"].values())
    return {"part": part.name, "system": part.system, "seed": part.seed, "wall_seconds": wall, "load_before": before} | found | about


def summarise(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per system the means over its seeds."""
    systems = []
    for system in dict.fromkeys(part["system"] for part in measured):
        members = [part for part in measured if part["system"] == system]
        means = {name: fmean(part[name] for part in members) for name in ("train_seconds", "images_per_second", "top1", "top5", "i2t_r10")}
        first = {name: members[0][name] for name in ("tower_parameters", "parameters", "version")}
        systems.append({"system": system, "seeds": [part["seed"] for part in members], "top1_of_seeds": [part["top1"] for part in members]}
                       | means | first)  # fmt: skip
    return systems


def run(arguments: argparse.Namespace, out: Path) -> Path:
    """Run or, with ``resume``, finish the benchmark; returns the path of the summary."""
    return run_parts("mini", parts(arguments), out, arguments.resume)


def run_parts(name: str, planned: list[Part], out: Path, resume: bool, wanted: Container[str] | None = None) -> Path:
    """Run the parts one after the other; returns the path of the summary, <out>/<device>/<name>.json (and .csv).

    Args:
        resume: parts that are measured already are kept. wanted: only these systems run now (None: all), the others are kept if they are
            there and left out if not.
    """
    machine = describe(torch.device("cpu"))
    folder = out / str(machine["device"])
    measured = []
    for part in planned:
        path = folder / name / f"{part.name}.json"
        now = wanted is None or part.system in wanted
        if not now and not path.exists():
            continue
        if path.exists() and (resume or not now):
            print(f"{part.name}: kept from {path}", flush=True)
        else:
            print(f"{part.name}: runs now; nothing else should be running", flush=True)
            write_text(path, json.dumps(measure(part), indent=1) + "\n")
        measured.append(json.loads(path.read_text(encoding="utf-8")))
        content = {"op": name, "machine": machine, "systems": summarise(measured), "parts": measured}
        write_text(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(measured)
    write_text(folder / f"{name}.csv", table.getvalue())
    for system in summarise(measured):
        print(f"{system['system']:<28} {system['train_seconds'] / 60:5.1f} min  top-1 {system['top1']:.2%}  top-5 {system['top5']:.2%}  "
              f"clip-art R@10 {system['i2t_r10']:.1%}  {system['images_per_second']:.0f} images/s")  # fmt: skip
    return folder / f"{name}.json"
