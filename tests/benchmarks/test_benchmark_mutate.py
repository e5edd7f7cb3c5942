"""The changes that tests have to notice are changes, of what is there, with tests that are there."""

import ast
import subprocess

import pytest

from benchmarks import __main__ as command_line
from benchmarks import mutate
from benchmarks.changes import CHANGES


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.about)
def test_a_change_is_one(change):
    text = (mutate.ROOT / change.file).read_text(encoding="utf-8")
    assert text.count(change.old) == 1 and change.old != change.new
    ast.parse(text.replace(change.old, change.new))  # a file that cannot be read would fail every test
    file, _, name = change.test.partition("::")
    assert f"def {name}(" in (mutate.ROOT / file).read_text(encoding="utf-8")


def test_known_changes_are_tried_one_by_one(monkeypatch, tmp_path, capsys):
    """Each alone, in a copy; what no test notices, and what could not be tried, is told."""
    monkeypatch.setattr(mutate, "CHANGES", CHANGES[:4])
    changed, statuses = [], iter([1, 0, 4, None])

    def python(self, *command, timeout):
        here, there = mutate.ROOT, self.tree
        changed.append([one.about for one in CHANGES if (here / one.file).read_bytes() != (there / one.file).read_bytes()])
        assert command[-1] == CHANGES[len(changed) - 1].test
        status = next(statuses)
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return type("Run", (), {"returncode": status})

    monkeypatch.setattr(mutate.Session, "python", python)
    assert command_line.main(["mutate", "--folder", str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in out] == ["noticed", "SURVIVED", "SURVIVED", "noticed", "2 of 4 changes were noticed"]
    assert all(CHANGES[number].about in about for number, about in enumerate(changed))


def test_a_session_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    """It begins once; what an interrupted change left in the copy is put back; survivors are printed."""
    module, calls = "fastvlp/train/ema.py", []
    tree = tmp_path / "fastvlp.train.ema" / "tree"
    lines = ('[{"mutations": [{"module_path": "m.py", "operator_name": "core/X", "start_pos": [3, 4]}]}, '
             '{"worker_outcome": "normal", "test_outcome": "survived", "diff": "- a"}]\n[{"mutations": [{}]}, null]')

    def call(self, *command):
        calls.append(command[1])
        if command[1] == "init":
            (tree / "begun.sqlite").touch()
        if command[1] == "exec":
            assert (tree / module).read_bytes() == (mutate.ROOT / module).read_bytes()
        return lines if command[1] == "dump" else ""

    monkeypatch.setattr(mutate.Session, "call", call)
    for calls_made in (["-q", "init", "begun.sqlite", "exec", "dump"], ["exec", "dump"]):
        assert command_line.main(["mutate", module, "tests/train/test_optim.py", "--folder", str(tmp_path)]) == 1
        assert calls == calls_made and "m.py:3:4 core/X\n- a" in capsys.readouterr().out
        calls.clear()
        (tree / module).write_text("a change that was interrupted")
    assert 'module-path = "fastvlp/train/ema.py"' in (tree / "mutate.toml").read_text()
