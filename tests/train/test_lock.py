"""The lock on a run's folder: who holds it, what refuses it, and what it leaves behind."""

import errno
import fcntl
import os
import re
from pathlib import Path

import pytest

from fastvlp.config import ConfigError
from fastvlp.train import lock
from fastvlp.train.lock import RunLock


def test_the_second_is_told_who_holds_it_and_the_third_gets_it(tmp_path):
    folder = tmp_path / "runs" / "a"
    first = RunLock(folder)  # kept: its file is closed by hand, not when nobody holds it any more
    with first:
        held = f"process {os.getpid()} on {os.uname().nodename}"
        assert (folder / ".lock").read_text() == held
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{folder} is in use: {held} is training there')}; wait for it, stop it, or"):
            with RunLock(folder):
                pass
        assert (folder / ".lock").read_text() == held  # who was refused has written nothing
        (folder / "recipe.yaml").touch()
    (folder / ".lock").write_text("a longer line of a process that was killed on a machine with a long name" * 3)
    with RunLock(folder):
        assert (folder / ".lock").read_text() == held
    with RunLock(folder):
        assert {path.name for path in folder.iterdir()} == {".lock", "recipe.yaml"}


def test_a_start_that_was_refused_leaves_no_folder(tmp_path):
    with RunLock(tmp_path / "x" / "y" / "a"):
        pass
    assert list(tmp_path.iterdir()) == []  # nor those above it that were made for it
    (tmp_path / "x").mkdir()
    with RunLock(tmp_path / "x" / "a"):
        pass
    assert list((tmp_path / "x").iterdir()) == []
    with RunLock(tmp_path / "b"):
        (tmp_path / "b" / "log.jsonl").touch()
    assert (tmp_path / "b" / "log.jsonl").exists() and (tmp_path / "b" / ".lock").exists()
    with pytest.raises(KeyError), RunLock(tmp_path / "c"):
        raise KeyError
    assert not (tmp_path / "c").exists()


def test_a_holder_that_has_said_nothing_yet(tmp_path):
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use: another process is training there"), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_or_failing_disk_is_one(tmp_path, monkeypatch, number):
    def fail(self, *rest, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as failed, RunLock(tmp_path / "a"):
        pass
    assert failed.value.errno == number and not isinstance(failed.value, ConfigError)


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, call):
    def refuse(self, *rest, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, call, refuse)
    named = tmp_path / "a" / ".lock" if call == "open" else tmp_path / "a"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(named))}: Permission denied; choose a run.dir that can be written"):
        with RunLock(tmp_path / "a"):
            pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    opened = []
    real = Path.open

    def refuse(file, how):
        assert how == fcntl.LOCK_EX | fcntl.LOCK_NB
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(Path, "open", lambda self, *rest, **options: opened.append(real(self, *rest, **options)) or opened[-1])
    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"is on a file system without locks \(not supported\): two runs could write there; choose"):
        with RunLock(tmp_path / "a"):
            pass
    assert [file.closed for file in opened] == [True]


def test_a_child_forgets_the_lock_and_its_parent_keeps_it(tmp_path):
    with RunLock(tmp_path) as held:
        child = os.fork()
        if not child:
            os._exit(len(lock._held))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert list(lock._held) == [held]
        with pytest.raises(ConfigError), RunLock(tmp_path):
            pass
    assert not lock._held
