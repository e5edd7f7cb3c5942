"""What processes agree on: two of them played by one, whose partner's answers are given."""

import dataclasses
import re

import pytest
import torch

from fastvlp.config import ConfigError
from fastvlp.data.shards import Index
from fastvlp.train import agreement, start
from fastvlp.train.parallel import World
from tests.train.conftest import recipe_of, write_shard

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Pair(World):
    """The first of two processes; the other one answers ``other(value)``."""

    other: object = None

    def gather(self, value):
        return [value, self.other(value)]


def pair(other):
    return Pair(0, 2, CPU, other)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optim.lr", "0.5"),
        ("run.seed", "7"),
        ("data.batch_size", "3"),
        ("torch", "1.0"),
        ("python", "3.10"),
        ("fastvlp", "0"),
        ("device", "cuda"),
    ],
)
def test_a_fact_that_differs_is_named_with_its_process(settings, key, value):
    mine = agreement.settings(recipe_of(settings), CPU)
    assert key in mine
    with pytest.raises(
        ConfigError, match=rf"process 1 has {key}={value} and process 0 has {re.escape(mine[key])}: all processes of a run need"
    ):
        agreement.check(pair(lambda facts: {**facts, key: value}), lambda: mine)
    agreement.check(pair(dict), lambda: mine)


def test_every_fact_that_differs_is_named(settings):
    with pytest.raises(ConfigError, match="a=9 .*; process 1 has d=9 .*; and 1 more"):
        agreement.check(pair(lambda facts: {key: "9" for key in facts}), lambda: dict.fromkeys("abcde", "1"))
    with pytest.raises(ConfigError, match="process 1 has b=None and process 0 has 2"):  # one knows what the other does not
        agreement.check(pair(lambda facts: {"a": "1"}), lambda: {"a": "1", "b": "2"})


def test_what_one_process_refuses_all_refuse():
    def refuse():
        raise FileNotFoundError("no shard matches 'x'")

    with pytest.raises(ConfigError, match="process 1: no shard matches"):
        agreement.all_or_none(pair(lambda mine: "no shard matches 'x'"), lambda: 1)
    with pytest.raises(ConfigError, match="process 0: no shard matches"):
        agreement.all_or_none(pair(lambda mine: None), refuse)
    with pytest.raises(FileNotFoundError):  # alone, it stays what it was
        agreement.all_or_none(World(0, 1, CPU), refuse)
    assert agreement.all_or_none(pair(lambda mine: mine), lambda: 5) == 5


def test_a_folder_that_one_process_does_not_see_is_no_place_to_continue_from(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"process 1 does not see .*manifest.json, from which .* file system that all processes share"):
        agreement.same_file(pair(lambda mine: None), file, "from which process 0 continues")
    with pytest.raises(ConfigError, match="process 1 sees another .*manifest.json"):  # of its own disk
        agreement.same_file(pair(lambda mine: mine[::-1]), file, "")
    agreement.same_file(pair(lambda mine: mine), file, "")


def test_data_are_named_by_names_sizes_and_counts(tmp_path):
    def digest(*names):
        return agreement.data_digest([Index([str(tmp_path / name) for name in names], lambda *_: None)])

    for name, count in (("a.tar", 4), ("b.tar", 4)):
        write_shard(tmp_path / name, count)
    before, swapped, fewer = digest("a.tar", "b.tar"), digest("b.tar", "a.tar"), digest("a.tar")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    assert digest("copy/a.tar") == fewer  # the folder is not part of it
    size = (tmp_path / "b.tar").stat().st_size
    write_shard(tmp_path / "b.tar", 3)
    with (tmp_path / "b.tar").open("ab") as file:
        file.truncate(size)  # a tar's padding hides how much is in it
    replaced = digest("a.tar", "b.tar")
    (tmp_path / "b.tar").unlink()
    assert len({before, swapped, fewer, replaced, digest("a.tar", "b.tar")}) == 5


def test_of_shards_beyond_the_first_only_sizes_are_read(tmp_path):
    for name in "abc":
        write_shard(tmp_path / f"{name}.tar", 4)
    index = Index([str(tmp_path / f"{name}.tar") for name in "abc"], lambda *_: None)
    first = index.digest(5)
    assert index.scanned == 8
    with (tmp_path / "c.tar").open("ab") as file:
        file.write(bytes(512))
    assert index.digest(5) != first and index.scanned == 8


def test_weights_are_part_of_what_is_agreed(settings):
    system, _ = start.prepare(recipe_of(settings), World(0, 1, CPU))
    before = agreement.weights_digest(system)
    assert agreement.weights_digest(system) == before
    with torch.no_grad():
        next(system.parameters()).view(-1)[0] += 1e-3
    assert agreement.weights_digest(system) != before
