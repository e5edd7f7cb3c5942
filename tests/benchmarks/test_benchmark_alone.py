"""Each recipe by itself: what is trained before what, for how long, and what is written down; the trainings are stand-ins."""

import json
import math
import threading

import pytest

from benchmarks import alone
from benchmarks.__main__ import main
from fastvlp import config


class Trainings:
    """In the place of ``fastvlp train``: 0.5 s a step but for a slow start; scores that tell seeds apart."""

    def __init__(self, fails=()):
        self.calls, self.fails, self.busy, self.most, self.lock = [], fails, set(), 0, threading.Lock()

    def __call__(self, bench, core, name, run, seed, changes):
        with self.lock:
            assert core not in self.busy, "one training a core"
            self.busy.add(core)
            self.most = max(self.most, len(self.busy))
            self.calls.append((name, run.name, seed, changes))
        given = dict(change.split("=", 1) for change in changes)
        steps = int(given["schedule.steps"])
        run.mkdir(parents=True)
        (run / "log.jsonl").write_text("".join(json.dumps({"step": n, "seconds": 30.0 + 0.5 * n}) + "\n" for n in range(1, steps + 1)))
        retrieval = {"i2t_mrr": 0.1 + 0.1 * seed, "t2i_mrr": 0.3, "n": 500}
        (run / "results.json").write_text(json.dumps({
            "samples": 128 * steps, "train_seconds": 0.5 * steps, "threads": 1, "retrieval": retrieval, "probe": {"left_out": "no"},
            "captions": {"bits_per_token": 2.0, "n": 400}, "zero_shot": {"top1": 0.1, "mrr": 0.2, "n": 1237}}))
        with self.lock:
            self.busy.remove(core)
        if name in self.fails:
            raise RuntimeError(f"the training of {name} ended with exit code 1")


def measure(monkeypatch, folder, names, trainings, seeds=(0, 1)):
    monkeypatch.setattr(alone.Bench, "_run", lambda bench, *arguments: trainings(bench, *arguments))
    return alone.run(names, 2.0, seeds, folder / "measured.json", folder / "runs"), json.loads((folder / "measured.json").read_text())


def test_a_recipe_is_trained_for_its_minutes_and_written_down(monkeypatch, tmp_path):
    (tmp_path / "measured.json").write_text(json.dumps({"slip": {"scores": []}, "no longer there": {}}))
    trainings = Trainings()
    code, found = measure(monkeypatch, tmp_path, ["clip"], trainings)
    assert code == 0 and list(found) == ["clip", "slip"]
    lengths = [change for _, _, _, changes in trainings.calls for change in changes if "schedule.steps" in change]
    assert sorted(lengths) == ["schedule.steps=12"] * 2 + ["schedule.steps=240"] * 2  # two minutes of half a second each
    made = config.load("clip")
    assert f"schedule.warmup={round(240 * made.schedule.warmup / made.steps)}" in trainings.calls[-1][3]
    entry = found["clip"]
    assert entry["scores"] == [
        {"name": "mean reciprocal rank both ways", "value": pytest.approx(0.225), "items": 500, "of": "pairs"},
        {"name": "mean reciprocal rank of the class", "value": pytest.approx(0.2), "items": 1237, "of": "pictures"},
        {"name": "nats a token", "value": pytest.approx(2 * math.log(2)), "items": 400, "of": "captions"}]
    assert (entry["samples"], entry["seconds"], entry["seeds"], entry["threads"], entry["minutes"]) == (128 * 240, 120.0, 2, 1, 2.0)
    assert entry["machine"].startswith("cpu-") and entry["commit"] and "start" not in entry
    trainings.calls.clear()
    assert measure(monkeypatch, tmp_path, ["clip"], trainings)[0] == 0 and not trainings.calls  # what has ended is kept


def test_what_a_recipe_starts_from_is_trained_before_it_and_once(monkeypatch, tmp_path):
    trainings = Trainings()
    code, found = measure(monkeypatch, tmp_path, ["blip2", "flame", "ep_alm", "lit"], trainings, seeds=(3,))
    assert code == 0 and list(found) == ["blip2", "ep_alm", "flame", "lit"] and found["blip2"]["start"] == alone.BOTH
    order = [run for _, run, _, _ in trainings.calls if not run.endswith("calibration")]
    assert sorted(order) == sorted(["clip", "simvlm", "simvlm-model-text-context-length-32", "blip2", "flame", "ep-alm", "lit"])
    assert max(order.index("clip"), order.index("simvlm")) < min(order.index("blip2"), order.index("ep-alm"))
    changes = {name: changes for name, run, _, changes in trainings.calls if not run.endswith("calibration")}
    start = next(change for change in changes["blip2"] if change.startswith("run.start="))
    folders = config.load("blip2", [start]).run.start
    assert {part: folder.rpartition("/3/")[2] for part, folder in folders.items()} == {"image": "clip", "lm": "simvlm"}
    assert trainings.most <= 2


def test_one_that_fails_keeps_no_other_from_its_number(monkeypatch, tmp_path, capsys):
    code, found = measure(monkeypatch, tmp_path, ["dlip", "clip", "slip"], Trainings(fails=("clip",)), seeds=(0,))
    assert code == 1 and list(found) == ["slip"]
    assert capsys.readouterr().err.count("the training of clip ended with exit code 1") == 2  # dlip has no teacher then


def test_names_are_systems(tmp_path, capsys):
    target = tmp_path / "x.json"
    assert main(["recipes", "--alone", "clap", "--measured", str(target)]) == 2 and not target.exists()
    assert "no system clap; there are" in capsys.readouterr().err


def test_what_recipes_start_from_there_is():
    for name, starts in alone.STARTS.items():
        parts = config.to_dict(config.load(name))["model"]
        for part, what in starts.items():
            other, *changes = what.split()
            assert config.load(other, changes) and (not part or part in parts)
