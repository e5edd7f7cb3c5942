"""What the training thread waits for, on a clock that moves only where something is made slow."""

import json

import pytest
import torch

from fastvlp import cli
from fastvlp.commands import times
from fastvlp.data.batch import Batch
from fastvlp.data.stream import Stream
from fastvlp.systems.clip import Clip
from fastvlp.train import checkpoint, log, spans, train
from fastvlp.train.step import Trainer
from tests.train.conftest import log_lines, one_thread, recipe, recipe_of, run, settings, shard  # noqa: F401  (fixtures)

SLOW = {  # seconds of each call by what it is part of, and where that is
    spans.DATA: (Stream, "__next__", 0.5), spans.COPY: (Batch, "to", 0.25), spans.FORWARD: (Clip, "encode", 8.0),
    spans.BACKWARD: (torch.Tensor, "backward", 4.0), spans.UPDATE: (torch.optim.AdamW, "step", 2.0),
    spans.DEVICE: (Trainer, "settle", 1.0), spans.LOGGING: (log.Log, "write", 0.125), spans.CHECKPOINT: (checkpoint, "finish", 16.0),
}


@pytest.fixture
def clock(monkeypatch, settings):  # noqa: F811
    settings["schedule"] = {"steps": 10}  # one stage, at whose start operations are counted
    now = [0.0]
    monkeypatch.setattr(spans, "perf_counter", lambda: now[0])
    return now


def slow(monkeypatch, clock, owner, name, seconds):
    def wait():
        clock[0] += seconds

    if owner is Stream:
        read = Stream.__iter__
        monkeypatch.setattr(Stream, "__iter__", lambda stream: (wait() or batch for batch in read(stream)))
        return
    act = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **options: wait() or act(*arguments, **options))


@pytest.mark.parametrize("what", [*SLOW, "all"])
def test_what_is_slow_is_what_shows(what, settings, monkeypatch, clock):  # noqa: F811
    """Each alone, to the last digit; a checkpoint is no part of a step, and one in four counts a fourth."""
    made = [name for name in SLOW if what in (name, "all")]
    for name in made:
        slow(monkeypatch, clock, *SLOW[name])
    found = times.measure(recipe_of(settings), 3)
    wanted = {name: SLOW[name][2] for name in made if name != spans.CHECKPOINT}
    for step in found.steps:
        assert {name: seconds for name, seconds in step.items() if seconds} == wanted
    assert found.checkpoints == [16.0 * (spans.CHECKPOINT in made)] * 2  # of steps 4 and 8
    shown = times.table(found, recipe_of(settings))
    for name in made:
        row = next(line for line in shown.splitlines() if line.startswith(name))
        assert float(row.replace("one in 4 steps", "").split()[-3]) == 1e3 * SLOW[name][2] / (4 if name == spans.CHECKPOINT else 1)
    assert float(shown.splitlines()[-1].split()[-3]) == 1e3 * (sum(wanted.values()) + 4.0 * (spans.CHECKPOINT in made))


def test_micro_batches_go_forward_twice_and_backward_once_each(settings, monkeypatch, clock):  # noqa: F811
    settings["train"]["tokens"] = {"image": 60}
    parts = []
    split = Batch.split
    monkeypatch.setattr(Batch, "split", lambda batch, k, widths: parts.append(k) or split(batch, k, widths))
    slow(monkeypatch, clock, Clip, "encode", 1.0)
    slow(monkeypatch, clock, torch.autograd, "backward", 0.25)
    slow(monkeypatch, clock, torch.Tensor, "backward", 0.5)  # of the objective; it calls torch.autograd.backward
    found = times.measure(recipe_of(settings), 2)
    for step, k in zip(found.steps, parts[times.WARM:], strict=False):
        assert k > 1 and (step[spans.FORWARD], step[spans.BACKWARD]) == (2.0 * k, 0.75 + 0.25 * k)


def test_nothing_is_left_behind_and_the_real_clock_adds_up(settings, tmp_path, capsys):  # noqa: F811
    found = times.measure(recipe_of(settings), 2, str(tmp_path / "trace.json"))
    assert all(min(step.values()) >= 0 and step[spans.FORWARD] > 0 and step[spans.BACKWARD] > 0 for step in found.steps)
    assert not (tmp_path / "runs").exists()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {spans.FORWARD, spans.BACKWARD, spans.UPDATE, spans.LOGGING} <= set(named)
    assert named.count(spans.DATA) == times.TRACED
    assert spans.span("anything").__enter__() is None and spans._recorder is None  # and nothing is recorded any more


def test_a_run_beside_it_is_left_alone(settings, tmp_path):  # noqa: F811
    train(recipe_of(settings))
    before = sorted(path for path in (tmp_path / "runs").rglob("*"))
    times.measure(recipe_of(settings), 1)
    assert sorted(path for path in (tmp_path / "runs").rglob("*")) == before and len(log_lines(tmp_path / "runs" / "run")) == 10


@pytest.mark.parametrize("arguments, message", [
    (["--trace", "x.json"], "--trace is for steps"), (["--steps", "0"], "--steps is 0"),
    (["--steps", "6"], "--steps is 6; it is at least 1, and with 5 others at most the 10 of the recipe"),
    (["--steps", "1", "--trace", "nowhere/x.json"], "there is no folder nowhere"),
])
def test_what_cannot_be_timed_is_one_line(recipe, arguments, message, capsys):  # noqa: F811
    assert cli.main(["profile", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_process_waits_for_another(recipe, tmp_path):  # noqa: F811
    """The second sleeps once the first has come to wait for it: tests/commands/two_waiting.py."""
    pair = run("--standalone", "--nproc-per-node", "2", "-m", "tests.commands.two_waiting", recipe, tmp_path / "waits",
               module="torch.distributed.run")
    assert pair.returncode == 0, pair.stderr
    assert "2 x cpu" in pair.stdout and "waiting for other processes, each process: " in pair.stdout
    waited = float(next(line for line in pair.stdout.splitlines() if line.startswith("waiting for other processes ")).split()[-3])
    assert waited >= 1e3 * 0.6 / 3  # of three steps one waited for 0.6 s
