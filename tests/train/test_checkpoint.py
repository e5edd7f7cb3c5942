import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlp.train import checkpoint
from fastvlp.train.checkpoint import CheckpointError, Damaged
from fastvlp.train.state import random_state, set_random_state

CPU = torch.device("cpu")
NAMES = ["manifest.json", "random.pt", "state/part.distcp", "trainer.json"]


def write(folder, step, keep=2):
    temporary = checkpoint.begin(folder, step)
    (temporary / checkpoint.STATE).mkdir()
    (temporary / checkpoint.STATE / "part.distcp").write_bytes(bytes(range(256)) * 20 + bytes([step]))
    return checkpoint.finish(temporary, {"recipe": {}, "counters": {"step": step, "samples": 9}}, [random_state(CPU)], keep)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_named_a_checkpoint_is_on_the_disk(tmp_path, monkeypatch):
    """Every file and folder is flushed before the name is given, and the name after it: a machine that loses its power loses neither."""
    done = []
    rename, fsync = os.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("flush", os.readlink(f"/proc/self/fd/{file}"))) or fsync(file))
    monkeypatch.setattr(os, "rename", lambda old, new: done.append(("rename", str(new))) or rename(old, new))
    final = write(tmp_path, 1)
    partial = tmp_path / ".step-00000001.partial"
    named = done.index(("rename", str(final)))
    everything = {partial, *(partial / path.relative_to(final) for path in final.rglob("*"))}
    assert {Path(place) for kind, place in done[:named]} == everything and done[named + 1:] == [("flush", str(tmp_path))]


def test_the_last_ones_are_kept_and_the_newest_is_found(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (5, 10, 15, 200):
        write(folder, step)
    assert [path.name for path in checkpoint.checkpoints(folder)] == names(folder) == ["step-00000015", "step-00000200"]
    found, described = checkpoint.latest(folder, print)
    assert found == folder / "step-00000200" and checkpoint.verify(found) == described
    assert described == {"recipe": {}, "counters": {"step": 200, "samples": 9}}
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == NAMES


def test_what_was_cut_while_writing_is_no_checkpoint_and_is_cleared_away(tmp_path, monkeypatch):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    assert checkpoint.latest(tmp_path, print)[0].name == "step-00000001"
    assert names(tmp_path) == [".step-00000002.partial", "step-00000001"]
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("name, damage, said", [
    *((name, lambda file: flip(file, len(file.read_bytes()) // 2), f"{name} is not what was written") for name in NAMES[1:]),
    ("state/part.distcp", lambda file: file.write_bytes(file.read_bytes()[:-1]), "state/part.distcp is not what was written"),
    ("state/part.distcp", lambda file: file.unlink(), "state/part.distcp is missing"),
    ("manifest.json", lambda file: file.write_text(file.read_text()[:-9]), "manifest.json is damaged"),
    ("manifest.json", lambda file: file.write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    ("manifest.json", lambda file: file.write_text("[]"), "it lists no files"),
    ("manifest.json", lambda file: file.write_text('{"format": 2, "files": {"../x": [1, ""]}}'), r"it names ../x"),
    ("manifest.json", lambda file: file.write_text('{"format": 2, "files": {"trainer.json": 3}}'), "manifest.json is damaged"),
])
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_taken(tmp_path, name, damage, said):
    """One flipped bit is enough."""
    write(tmp_path, 1)
    broken = write(tmp_path, 2)
    damage(broken / name)
    with pytest.raises(Damaged, match=said):
        checkpoint.verify(broken)
    words = []
    assert checkpoint.latest(tmp_path, words.append, mine=False)[0].name == "step-00000001"  # another run's folder is left as it is
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and len(words) == 1 and "aside" not in words.pop()
    assert checkpoint.latest(tmp_path, words.append)[0].name == "step-00000001"
    assert len(words) == 1 and "step-00000002" in words[0] and "damaged" in words[0] and "aside" in words[0]
    assert names(tmp_path) == ["aside", "step-00000001"] and names(tmp_path / "aside") == ["step-00000002"]


def test_a_manifest_without_its_sums_is_damaged_too(tmp_path):
    """A flipped bit in the sum itself."""
    broken = write(tmp_path, 2)
    text = (broken / "manifest.json").read_text()
    digest = json.loads(text)["files"]["random.pt"][1]
    (broken / "manifest.json").write_text(text.replace(digest, digest[::-1]))
    with pytest.raises(Damaged, match="random.pt is not what was written"):
        checkpoint.verify(broken)


def test_a_checkpoint_without_a_manifest_is_named_and_kept(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").unlink()
    words = []
    assert checkpoint.latest(tmp_path, words.append)[0].name == "step-00000001"
    assert "step-00000002 holds no manifest.json" in words[0] and names(tmp_path / "aside") == ["step-00000002"]


@pytest.mark.parametrize("call", ["listdir", "stat"])
def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path, monkeypatch, call):
    """``Path.glob`` and ``Path.exists`` take what cannot be read for what is not there: the run would start over."""
    write(tmp_path, 1)

    def refuse(place, *rest, **options):
        if str(place).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "refused", str(place))
        return original(place, *rest, **options)

    original = getattr(os, call)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        for act in (lambda: checkpoint.latest(tmp_path, print), lambda: checkpoint.checkpoints(tmp_path)):
            with pytest.raises((CheckpointError, PermissionError), match="refused") as caught:
                act()
            assert not isinstance(caught.value, Damaged)
    assert names(tmp_path) == ["step-00000001"]


def test_memory_that_is_full_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(CheckpointError, match="cannot be read: out of memory; nothing was changed") as caught:
        checkpoint.latest(tmp_path, print)
    assert not isinstance(caught.value, Damaged) and names(tmp_path) == ["step-00000001"]


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    """The sums vouch for the files; whatever is flipped in the sums is refused or named as damage."""
    file = write(tmp_path, 1) / "manifest.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises(CheckpointError):
            checkpoint.verify(file.parent)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN])
def test_what_cannot_be_read_now_may_be_whole(tmp_path, monkeypatch, number):
    """A network file system that hiccups: an error, and nothing is moved or passed over."""
    write(tmp_path, 1)
    write(tmp_path, 2)

    def refuse(file):
        raise OSError(number, "refused", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", refuse)
        with pytest.raises(CheckpointError, match="cannot be read: refused; nothing was changed") as caught:
            checkpoint.latest(tmp_path, print)
    assert not isinstance(caught.value, Damaged) and names(tmp_path) == ["step-00000001", "step-00000002"]
    assert checkpoint.latest(tmp_path, print)[0].name == "step-00000002"


def test_a_newer_format_is_left_to_the_version_that_wrote_it(tmp_path):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99 and this fastvlp reads format 2; use the version that wrote it") as caught:
        checkpoint.latest(tmp_path, print)
    assert not isinstance(caught.value, Damaged) and names(tmp_path) == ["step-00000001", "step-00000002"]


def test_nothing_to_find(tmp_path):
    assert checkpoint.latest(tmp_path / "none", print) is None
    with pytest.raises(CheckpointError, match="holds no manifest.json; name a folder such as"):
        checkpoint.verify(tmp_path)


def test_a_step_that_is_written_again_leaves_the_old_one_aside(tmp_path):
    write(tmp_path, 4)
    (tmp_path / "step-00000004" / "mark").write_text("old")
    write(tmp_path, 4)
    assert names(tmp_path) == ["aside", "step-00000004"] and not (tmp_path / "step-00000004" / "mark").exists()
    assert (tmp_path / "aside" / "step-00000004" / "mark").read_text() == "old"


def test_checkpoints_of_another_past_are_kept_where_nothing_looks(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=9)
    assert [path.name for path in checkpoint.set_aside_after(tmp_path, 2)] == ["step-00000003"]
    write(tmp_path, 3, keep=9)
    assert [path.name for path in checkpoint.set_aside_after(tmp_path, 1)] == ["step-00000002", "step-00000003.1"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
    assert names(tmp_path / "aside") == ["step-00000002", "step-00000003", "step-00000003.1"]
    assert checkpoint.verify(tmp_path / "aside" / "step-00000003.1")["counters"]["step"] == 3
    for step in (2, 3, 4):  # what is set aside is not what keep counts
        write(tmp_path, step, keep=1)
    assert len(names(tmp_path / "aside")) == 3


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(2).tolist()

    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number back
    saved = write(tmp_path, 1)
    expected = [draw() for _ in range(3)]
    set_random_state(checkpoint.random_states(saved)[0], CPU)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("content", [{}, [], {"recipe": {}, "counters": []}, {"recipe": {}, "counters": {"step": 1}},
                                     {"recipe": {}, "counters": {"step": "1", "samples": 1}}, {"recipe": 1, "counters": {}},
                                     {"recipe": {}, "counters": {"step": -1, "samples": 1}}])
def test_a_stranger_s_description_that_is_none(tmp_path, content):
    temporary = checkpoint.begin(tmp_path, 1)
    with pytest.raises(CheckpointError, match="trainer.json does not describe a training run") as caught:
        checkpoint.verify(checkpoint.finish(temporary, content, [], 1))
    assert not isinstance(caught.value, Damaged)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("states", [[Bomb()], {"python": 1}, None])
def test_a_stranger_s_generators_run_nothing(tmp_path, monkeypatch, states):
    monkeypatch.chdir(tmp_path)
    saved = checkpoint.finish(checkpoint.begin(tmp_path, 1), {"recipe": {}, "counters": {"step": 1, "samples": 1}}, states, 1)
    checkpoint.verify(saved)
    with pytest.raises(CheckpointError, match="random.pt holds no states of random generators"):
        checkpoint.random_states(saved)
    assert names(tmp_path) == ["step-00000001"]
