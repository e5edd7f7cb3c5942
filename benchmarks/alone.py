"""What the recipe of each system reaches by itself: M minutes of training on one core, and the scores that the recipe asks for.

    python -m benchmarks recipes --alone                          every system that is not measured yet
    python -m benchmarks recipes --alone clip coca --minutes 5    these two

Two systems train at once, with a core each. A system that starts from others' weights gets those of as many minutes. A training that has
ended is kept in runs/alone for the same commit, so that a list that was stopped goes on. ``fastvlp recipes`` shows what is written here.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, describe, environment
from benchmarks.run import write_text
from fastvlp import config

TARGET = ROOT / "fastvlp" / "systems" / "measured.json"
CALIBRATION, COLD = 12, 2  # steps from which the length of a training is told, and the first of them, which say nothing
BOTH = {"image": "clip", "lm": "simvlm"}
# Whose weights a recipe starts from, by part ("": for the whole), each as a recipe and changes of it.
STARTS: dict[str, dict[str, str]] = {
    "lit": {"image": "clip"}, "dlip": {"": "clip"}, "dcd": {"": "vilt"}, "distilbert": {"": "bert"}, "llama_fusion": {"": "simvlm"},
    "blip2": BOTH, "ep_alm": BOTH, "adem_vl": BOTH, "flame": {"lm": "simvlm model.text.context_length=32"},
}  # fmt: skip
# Scores by the measure of a recipe, the first of which is the primary one: what it is called, from what, and of how many of what.
SCORES = {
    "retrieval": ("mean reciprocal rank both ways", lambda s: (s["i2t_mrr"] + s["t2i_mrr"]) / 2, "pairs"),
    "zero_shot": ("mean reciprocal rank of the class", lambda s: s["mrr"], "pictures"),
    "captions": ("nats a token", lambda s: s["bits_per_token"] * math.log(2), "captions"),
    "pairs": ("own caption told from another's", lambda s: s["accuracy"], "pairs"),
    "probe": ("linear probe, top-1", lambda s: s["top1"], "pictures"),
    "knn": ("nearest neighbours, top-1", lambda s: s["top1"], "pictures"),
}


@dataclass
class Bench:
    """Trains what is asked for, each training once, and those that it starts from before it."""

    folder: Path
    minutes: float
    pool: ThreadPoolExecutor
    cores: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)
    trained: dict[tuple[str, int], Future[Path]] = field(default_factory=dict)

    def train(self, what: str, seed: int) -> Future[Path]:
        """The run of a recipe with changes, as it will be."""
        if (what, seed) not in self.trained:
            # Submitted before what waits for them, so that a thread that waits never keeps them from one.
            begins = {part: self.train(other, seed) for part, other in STARTS.get(what.split()[0], {}).items()}
            self.trained[what, seed] = self.pool.submit(self._train, what, seed, begins)
        return self.trained[what, seed]

    def _train(self, what: str, seed: int, begins: Mapping[str, Future[Path]]) -> Path:
        starts = {part: str(future.result()) for part, future in begins.items()}
        name, *changes = what.split()
        run = self.folder / str(seed) / re.sub(r"[^a-z0-9]+", "-", what)
        if (run / "results.json").exists():
            return run
        made = config.load(name, changes)
        if starts:
            changes.append(f"run.start={json.dumps(starts.get('', starts))}")
        core = self.cores.get()
        try:
            tried = run.with_name(f"{run.name}-calibration")
            self._run(core, name, tried, seed, [*changes, f"schedule.steps={CALIBRATION}", "schedule.warmup=1", "eval={}"])
            took = [line["seconds"] for line in map(json.loads, (tried / "log.jsonl").read_text().splitlines()) if "seconds" in line]
            steps = max(20, int(60 * self.minutes * (CALIBRATION - COLD) / (took[-1] - took[COLD - 1])))
            warmup = max(1, round(made.schedule.warmup * steps / made.steps))
            self._run(core, name, run, seed, [*changes, f"schedule.steps={steps}", f"schedule.warmup={warmup}"])
        finally:
            self.cores.put(core)
        return run

    def _run(self, core: int, name: str, run: Path, seed: int, changes: Sequence[str]) -> None:
        command = ["taskset", "-c", str(core), sys.executable, "-m", "fastvlp", "train", name, "--resume", "none", *changes,
                   f"run.dir={run.parent}", f"run.name={run.name}", f"run.seed={seed}", "run.device=cpu", "data.workers=0",
                   "eval.workers=0", "train.checkpoint_every=0"]
        run.parent.mkdir(parents=True, exist_ok=True)
        output = run.with_suffix(".txt")
        with output.open("w") as file:
            ended = subprocess.run(command, env=environment() | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, check=False)
        if ended.returncode:
            raise RuntimeError(f"the training of {name} ended with exit code {ended.returncode}: {output.read_text()[-800:]}")


def scores(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores of a recipe, the mean over its runs with different seeds; the first is the primary one."""
    found = []
    for measure, (name, of, items) in SCORES.items():
        values = [result[measure] for result in results if "left_out" not in result.get(measure, {"left_out": ""})]
        if values:
            found.append({"name": name, "value": sum(map(of, values)) / len(values), "items": values[0]["n"], "of": items})
    return found


def entry(runs: Sequence[Path], name: str, minutes: float, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What is written down of one recipe."""
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in runs]

    def mean(key: str) -> float:
        return sum(result[key] for result in results) / len(results)

    return {"scores": scores(results), "samples": round(mean("samples")), "seconds": round(mean("train_seconds"), 1), "minutes": minutes,
            "threads": results[0]["threads"], "machine": machine["device"], "torch": machine["torch"], "commit": machine["commit"],
            "timestamp": machine["timestamp"], "seeds": len(results), **({"start": STARTS[name]} if name in STARTS else {})}


def _entries(bench: Bench, names: Sequence[str], seeds: Sequence[int], machine: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each name with its entry, or with the error that kept it from one, in the order of ``names``."""
    asked = {name: [bench.train(name, seed) for seed in seeds] for name in names}
    for name, futures in asked.items():
        try:
            yield name, entry([future.result() for future in futures], name, bench.minutes, machine)
        except RuntimeError as error:
            yield name, error


def run(names: Sequence[str], minutes: float, seeds: Sequence[int], target: Path, folder: Path = ROOT / "runs" / "alone") -> int:
    """Measure systems and write them into ``target``; 0, 1 where a training failed, or 2 for a name that is no system's."""
    known = config.names()
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no system {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    measured = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    machine = describe(torch.device("cpu"))
    cores, failed = sorted(os.sched_getaffinity(0))[:2], False
    with ThreadPoolExecutor(len(cores)) as pool:
        bench = Bench(folder / f"{machine['commit'] or 'unknown'}-{minutes:g}m", minutes, pool)
        for core in cores:
            bench.cores.put(core)
        for name, found in _entries(bench, names or [name for name in known if name not in measured], seeds, machine):
            if isinstance(found, RuntimeError):
                print(f"{name}: {found}", file=sys.stderr)
                failed = True
                continue
            measured = {one: value for one, value in sorted({**measured, name: found}.items()) if one in known}
            write_text(target, json.dumps(measured, indent=1) + "\n")
            first = found["scores"][0]
            print(f"{name}: {first['name']} {first['value']:.3f} of {first['items']} {first['of']}, {found['samples']} samples", flush=True)
    return int(failed)
