"""Disks, memory, workers and signals that fail a run: one sentence, and the same command goes on."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from fastvlp.data.loader import Loader
from fastvlp.evaluate.reading import Reading
from fastvlp.train import Interrupted, Trainer, TrainingError, checkpoint, failures, plots, report, train
from fastvlp.train.interrupt import Watchdog
from tests.train.conftest import log_lines, recipe_of, weights, write_shard


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)


def folder_of(settings):
    return Path(settings["run"]["dir"]) / settings["run"]["name"]


def saved(settings):
    return [path.name for path in checkpoint.checkpoints(folder_of(settings) / "checkpoints")]


def sends(number, act):
    def wrapped(*arguments, **options):
        os.kill(os.getpid(), number)
        return act(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(settings, asynchronous):
    settings["train"]["asynchronous"] = asynchronous
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(TrainingError, match="no checkpoint at step .*; the last whole checkpoint stays") as failed:
            train(recipe_of(settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(failed.value)
    assert not list(folder_of(settings).rglob("*.partial")) and saved(settings) == []
    assert train(recipe_of(settings))["steps"] == 10


@pytest.mark.parametrize("error, sentence", [
    (OSError(28, "No space left on device", "x/log.jsonl"), "x/log.jsonl: No space left on device"),
    (OSError(28, "No space left on device"), "runs/a: No space left on device"),
    (MemoryError(), "out of memory; lower"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory; lower data.batch_size, set train.tokens"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory; lower"),
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "a loading process died .*lower data.workers"),
    (RuntimeError("[pair.cc:5] Connection closed by peer [127.0.0.1]:1"), "another process of this run has ended"),
])
def test_sentences(error, sentence):
    with pytest.raises(TrainingError, match=f"^{sentence}.*the same command continues from it$"), failures.explained(Path("runs/a")):
        raise error


def test_what_has_its_sentence_or_none_passes():
    for error in (TrainingError("said"), Interrupted(2, "said"), ValueError("said"), RuntimeError("a bug")):
        with pytest.raises(type(error)) as caught, failures.explained(Path("x")):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("end, sentence", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "a loading process died"),
    (lambda: (_ for _ in ()).throw(RuntimeError("256 samples in a row could not be used")), "^256 samples in a row could not be used; the"),
], ids=["killed", "nothing usable"])
def test_a_loading_process_that_ends(settings, monkeypatch, end, sentence):
    settings["data"]["workers"] = 1
    load = Loader.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__getitem__", lambda self, request: end() if request.index == 8 else load(self, request))
        with pytest.raises(TrainingError, match=sentence):
            train(recipe_of(settings))
    assert saved(settings)[0] == "step-00000004"
    assert train(recipe_of(settings))["steps"] == 10


def test_a_reader_that_hangs_in_an_evaluation_is_waited_for_as_in_training(settings, shard, monkeypatch):
    settings["eval"] = {"retrieval": [str(shard)], "workers": 1}
    settings["run"]["timeout"] = 2
    settings["schedule"] = {"steps": 1}
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)  # else it may be the first to end, and would end this process
    monkeypatch.setattr(Reading, "__getitem__", lambda self, number: time.sleep(600))
    with pytest.raises(TrainingError, match="timed out after 2 seconds: the data cannot be read any more"):
        train(recipe_of(settings))


@pytest.mark.parametrize("place, number, owner, name, left", [
    ("first step", signal.SIGUSR2, Trainer, "step", ["step-00000001"]),
    ("saving", signal.SIGTERM, checkpoint, "finish", ["step-00000004"]),
    ("evaluation on the way", signal.SIGHUP, report, "score", ["step-00000003"]),
    ("evaluation at the end", signal.SIGINT, report, "finish", ["step-00000008", "step-00000010"]),
])
def test_a_signal_saves_wherever_it_comes(settings, shard, monkeypatch, place, number, owner, name, left):
    settings["eval"] = {"retrieval": [str(shard)], "every": 3 if "way" in place else 0}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, sends(number, getattr(owner, name)))
        with pytest.raises(Interrupted, match="evaluates again" if "end" in place else "continues from here") as stopped:
            train(recipe_of(settings))
    assert stopped.value.signum == number and saved(settings) == left
    assert train(recipe_of(settings))["retrieval"]["n"] == 48
    assert [line["step"] for line in log_lines(folder_of(settings)) if "loss" in line] == list(range(1, 11))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_is_heard_while_data_does_not_come(settings, monkeypatch, workers):
    """A reader on a dead mount: what was trained is saved, and the bits that follow are those of a run that never waited."""
    settings["data"]["workers"] = workers
    load, main = Loader.__getitem__, os.getpid()

    def stalls(self, request):
        if request.index == 6:
            threading.Timer(0.3, os.kill, (main, signal.SIGTERM)).start()
            time.sleep(60)
        return load(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__getitem__", stalls)
        with pytest.raises(Interrupted, match="stopped at step 6"):
            train(recipe_of(settings))
    assert saved(settings)[-1] == "step-00000006"
    train(recipe_of(settings))
    settings["run"]["name"] = "whole"
    train(recipe_of(settings))
    parts, whole = weights(folder_of(settings).with_name("run")), weights(folder_of(settings))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_shards_that_were_replaced_are_said(settings, tmp_path, capsys):
    settings["data"]["train"] = [str(write_shard(tmp_path / "x.tar"))]
    train(recipe_of(settings))
    (folder_of(settings) / "results.json").unlink()
    checkpoint.set_aside_after(folder_of(settings) / "checkpoints", 8)
    write_shard(tmp_path / "x.tar", 40)
    capsys.readouterr()
    train(recipe_of(settings))
    out = capsys.readouterr().out
    assert "continuing" in out and "the shards are not those that" in out and "step-00000008 was trained on" in out


def test_a_run_that_continues_another_has_no_past_of_its_own(settings, capsys):
    """Into the folder of a third run: that one is kept beside it, and its lines are not taken for those of this past."""
    train(recipe_of(settings))
    settings["run"]["name"] = "third"
    train(recipe_of({**settings, "optim": {"lr": 1e-3}}))
    settings["run"]["resume"] = str(folder_of(settings).with_name("run"))
    settings["schedule"]["steps"] = 12
    train(recipe_of(settings))
    assert [line["step"] for line in log_lines(folder_of(settings)) if "loss" in line] == [11, 12]
    assert saved(settings) == ["step-00000012"]
    assert saved({"run": {**settings["run"], "name": "third.before-1"}}) == ["step-00000008", "step-00000010"]


def test_a_finished_run_that_goes_on_in_its_folder_keeps_its_results(settings):
    first = train(recipe_of(settings))
    settings["run"]["resume"] = str(folder_of(settings))
    settings["schedule"]["steps"] = 12
    assert train(recipe_of(settings))["steps"] == 12
    aside = folder_of(settings).with_name("run.before-1")
    assert {path.name for path in aside.iterdir()} == {"results.json", "model", "recipe.yaml"} and first["steps"] == 10
    assert [line["step"] for line in log_lines(folder_of(settings)) if "loss" in line] == list(range(1, 13))


def test_what_follows_the_step_that_was_named_is_of_another_past(settings, capsys):
    """Else the next start would take the old run's last checkpoint for this one's."""
    settings["train"]["keep"] = 9
    train(recipe_of(settings))
    settings["run"]["resume"] = str(folder_of(settings) / "checkpoints" / "step-00000004")
    settings["schedule"]["steps"] = 6
    assert train(recipe_of(settings))["steps"] == 6
    assert saved(settings) == ["step-00000004", "step-00000006"] and "step-00000010 is of another past" in capsys.readouterr().out
    assert {path.name for path in (folder_of(settings) / "checkpoints" / "aside").iterdir()} == {"step-00000008", "step-00000010"}
    settings["run"]["resume"] = "auto"
    assert train(recipe_of(settings))["steps"] == 6


def test_a_damaged_checkpoint_of_a_run_that_was_named_is_passed_over(settings, capsys):
    train(recipe_of(settings))
    broken = folder_of(settings) / "checkpoints" / "step-00000010" / "trainer.json"
    broken.write_bytes(broken.read_bytes()[:-1])
    settings["run"] |= {"resume": str(folder_of(settings)), "name": "other"}
    train(recipe_of(settings))
    out = capsys.readouterr().out
    assert "step-00000010 is damaged: trainer.json" in out and "after step 8" in out
    assert broken.exists()  # the other run's folder is as it was
