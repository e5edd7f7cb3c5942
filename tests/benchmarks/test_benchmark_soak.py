"""The soak finds nothing where nothing is wrong, and finds each kind of planted fault with the seed that repeats it."""

import json
import os
import types

import pytest
import torch

import fastvlp_kernels
from benchmarks import __main__ as command_line
from benchmarks.soak import data, files, operators, ranks, saves, training

CPU = torch.device("cpu")


def soak(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    code = command_line.main(["soak", "--out", str(tmp_path), "--device", "cpu", *arguments])
    (path,) = tmp_path.glob("*/soak.json")
    return code, json.loads(path.read_text())["parts"]


@pytest.mark.slow
def test_a_short_soak_runs_every_part_and_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(training, "MOST_KILLS", 3)
    code, parts = soak(tmp_path, "--minutes", "0.15", "--seed", "6", "--cases", "40")
    out = capsys.readouterr().out
    assert code == 0 and out.endswith("nothing was lost\n"), out
    found = {part["part"]: part for part in parts}
    assert list(found) == ["operators", "data", "files", "ranks", "training", "saves"]
    assert found["data"]["faults"] >= 20 and found["ranks"]["faults"] >= 1
    # How many cases fit into seconds is the machine's affair; one is always made.
    assert all(part["cases"] >= 1 and part["first_seed"] == 6 and part["failure"] == "" and part["failed_seed"] is None for part in parts)


def planted(monkeypatch, tmp_path, capsys, part: str, cases: int = 40) -> str:
    """What a soak of one part with a fault in it says; the command that it names has to find the fault again."""
    code, (found,) = soak(tmp_path, "--only", part, "--seed", "0", "--cases", str(cases), "--minutes", "1")
    out = capsys.readouterr().out
    assert code == 1 and f"failed: {part}" in out and found["failure"] and found["cases"] == found["failed_seed"] + 1
    command = next(line for line in out.splitlines() if line.startswith("  again: python -m benchmarks soak ")).split()[4:]
    code, (again,) = soak(tmp_path, *command[1:])
    assert code == 1 and again["cases"] == 1 and again["failed_seed"] == found["failed_seed"] and again["failure"] == found["failure"]
    return found["failure"]


def test_every_operator_is_called():
    public = {name for name, value in vars(fastvlp_kernels).items() if isinstance(value, types.FunctionType) and not name.startswith("_")}
    assert {draw.__name__ for draw in operators.OPERATORS} == public


def test_a_wrong_operator_is_found(monkeypatch, tmp_path, capsys):
    """A pool that is off only where there are many segments."""
    right = fastvlp_kernels.segment_pool

    def wrong(x, cu_seqlens, *arguments, impl=None, **options):
        out = right(x, cu_seqlens, *arguments, impl=impl, **options)
        return out if impl == "reference" or len(out) < 6 else out * 1.01 + x.sum() * 0

    monkeypatch.setattr(fastvlp_kernels, "segment_pool", wrong)
    assert "segment_pool lengths=" in planted(monkeypatch, tmp_path, capsys, "operators", 400)


@pytest.mark.parametrize("fault", ["loses", "keeps quiet", "counts twice"])
def test_a_pipeline_that_loses_or_hides_a_sample_is_found(fault, monkeypatch, tmp_path, capsys):
    from fastvlp.data import Stream
    from fastvlp.data import samples as module

    right, calls = module.Reader.image, []

    def image(self, shard, member, wanted=None):
        calls.append(member)
        if fault == "loses" and member == 4:
            raise module.Unusable("image is broken")
        return right(self, shard, member, wanted)

    monkeypatch.setattr(module.Reader, "image", image)
    if fault == "keeps quiet":
        monkeypatch.setattr(Stream, "_skip", lambda self, reason, name: None)
    if fault == "counts twice":
        skip = Stream._skip
        monkeypatch.setattr(Stream, "_skip", lambda self, reason, name: (skip(self, reason, name), self.skips.add((reason, 0))))
    failure = planted(monkeypatch, tmp_path, capsys, "data")
    assert {"loses": "did not come out", "keeps quiet": "named 0 times", "counts twice": "as a stream: counted"}[fault] in failure
    assert calls


def test_a_training_that_goes_on_otherwise_is_found(monkeypatch, tmp_path):
    """The killed training is given another seed, as if it had forgotten where it was."""
    right = training.settings

    def settings(seed, folder, name):
        values = right(seed, folder, name)
        return values | {"changes": [*values["changes"], "schedule.steps=4", f"run.seed={seed + (name == 'parts')}"]}

    monkeypatch.setattr(training, "settings", settings)
    monkeypatch.setattr(training, "MOST_KILLS", 1)
    with pytest.raises(AssertionError, match=r"after \d+ kills \d+ of \d+ tensors differ, the first is "):
        training.case(0, tmp_path, CPU)


@pytest.mark.slow
def test_a_save_that_loses_something_is_found(monkeypatch, tmp_path):
    right = training.settings

    def settings(seed, folder, name):
        values = right(seed, folder, name)
        return values | {"changes": [*values["changes"], "schedule.steps=2", f"run.seed={seed + (name == 'parts')}"]}

    monkeypatch.setattr(training, "settings", settings)
    with pytest.raises(AssertionError, match=r"at system call \d+ of \d+: \d+ of \d+ tensors differ"):
        saves.case(0, tmp_path, CPU)


def raises(seed, folder, base):
    raise KeyError(f"{seed}")


def eats(seed, folder, base):
    bytearray(2 << 30)


def burns(seed, folder, base):
    while True:
        pass


def crashes(seed, folder, base):
    os.abort()


@pytest.mark.parametrize("kind, message", [
    (raises, "raises of seed 5, number 0: exit code 1\n.*KeyError: '40'"), (eats, "eats .*: exit code 1\n.*MemoryError"),
    (burns, "burns .*: exit code -24"), (crashes, "crashes .*: exit code -6")], ids=["raises", "eats", "burns", "crashes"])
def test_a_file_that_is_neither_used_nor_refused_is_found(kind, message, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "KINDS", (files.a_caption, kind))
    monkeypatch.setattr(files, "SECONDS", 1)
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        files.case(5, tmp_path, CPU)


def test_files_of_strangers_are_the_same_for_the_same_seed(tmp_path):
    import random

    assert files.case(3, tmp_path, CPU) == 8 * len(files.KINDS)
    made = [{files.damaged(data, random.Random(seed)) for data in files.pictures()} for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and not made[2] & set(files.pictures())


def test_a_training_that_fails_says_why(tmp_path):
    values = training.settings(0, tmp_path, "whole")
    values["changes"].append("data.train=nowhere.tar")
    with pytest.raises(AssertionError, match=r"(?s)ended with exit code 1:.*no shard matches 'nowhere.tar'"):
        training.train(values)


def swallow(rank, size, node_size, folder, loss_name, strategy, seed):
    """A process that takes the loss of another for the end of its work."""
    try:
        ranks._compute(rank, size, node_size, folder, loss_name, strategy, seed)
    except RuntimeError:
        os._exit(0)


def test_a_process_that_ends_without_an_error_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "work", swallow)
    with pytest.raises(AssertionError, match=r"strategy='gather', rank \d of \d .*: the others ended with exit codes .*: 0"):
        ranks.case(0, tmp_path, CPU)


@pytest.mark.parametrize("what", data.BROKEN)
def test_every_damage_is_one(what, tmp_path):
    """Damage that changes nothing would be a fault that nobody had to survive."""
    import random

    for seed in range(5):
        members = dict(data.sound()[seed])
        data.BROKEN[what](members, random.Random(seed))
        assert members != data.sound()[seed]
