"""Model folders and checkpoints of strangers: refused in one sentence, before anything is run or allocated."""

import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fastvlp
from fastvlp.systems import files
from fastvlp.systems.state_folder import METADATA, metadata_of, read_state
from fastvlp.train.parallel import World
from fastvlp.train.start import prepare
from tests.train.conftest import recipe_of, settings, shard  # noqa: F401  # fixtures


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def model(settings, tmp_path):  # noqa: F811
    recipe = recipe_of(settings)
    system, _ = prepare(recipe, World(0, 1, torch.device("cpu")))
    files.save(tmp_path / "model", system, recipe)
    return tmp_path / "model"


def change(description, path, value):
    inside = description
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("no_such_key",), 1, "unknown key 'no_such_key'; a description has model, data"),
        (("model", "no_such_key"), 1, "no_such_key"),
        (("model", "embed_dim"), 1 << 40, "embed_dim is 1099511627776; it is at most"),
        (("model", "embed_dim"), 1 << 23, "asks for [0-9,]+ weights, and there are [0-9,]+ bytes"),
        (("model", "image", "depth"), 10**9, "depth is 1000000000; it is at most 1,024"),
        (("model", "image", "make"), "os:system", "os:system"),
        (("model",), [[1]], "model"),
        (("model",), None, "model"),
    ],
)
def test_descriptions(model, path, value, message):
    assert fastvlp.load(model)
    file = model / files.DESCRIPTION
    description = json.loads(file.read_text())
    change(description, path, value)
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message) as refused:
        fastvlp.load(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\0"])
def test_what_is_no_description(model, text):
    (model / files.DESCRIPTION).write_text(text)
    with pytest.raises(ValueError, match="is no description of a model"):
        fastvlp.load(model)


@pytest.fixture
def state(tmp_path):
    values = {"model": {"w": torch.rand(3), "h": torch.rand(2).half()}, "optim": {"lr": 0.5, "betas": (0.9, 0.98), "on": None}}
    dcp.save(values, checkpoint_id=str(tmp_path / "state"), no_dist=True)
    return tmp_path / "state", values


def zeros():
    return {"model": {"w": torch.zeros(3), "h": torch.zeros(2).half()}, "optim": {"lr": 0.0, "betas": (0, 0), "on": 1}}


def test_the_state_comes_back(state):
    folder, values = state
    found = zeros()
    read_state(found, folder, alone=True)
    assert found["optim"] == values["optim"] and all(torch.equal(found["model"][name], values["model"][name]) for name in "wh")


def test_a_description_of_tensors_runs_nothing(state, tmp_path):
    """torch's reader unpickles the file; ours knows the names of which a description is made."""
    folder, _ = state
    (folder / METADATA).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for read in (lambda: metadata_of(folder), lambda: read_state(zeros(), folder, alone=True)):
        with pytest.raises((ValueError, dcp.CheckpointException), match="open has no place in a description of tensors"):
            read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps([1])])
def test_what_describes_no_tensors(state, content):
    (state[0] / METADATA).write_bytes(content)
    with pytest.raises(ValueError, match="is no description of tensors"):
        metadata_of(state[0])


def test_values_that_are_no_tensors_run_nothing(tmp_path, monkeypatch):
    """A number of the optimizer is a pickle of its own, which torch's planner loads as a whole."""
    values = {"optim": {"lr": 0.5}}
    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "save", lambda value, *rest, **options: save(Bomb(tmp_path / "ran") if value == 0.5 else value, *rest, **options)
        )
        dcp.save(values, checkpoint_id=str(tmp_path / "state"), no_dist=True)
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(dcp.CheckpointException, match="Weights only load failed"):
        read_state({"optim": {"lr": 0.0}}, tmp_path / "state", alone=True)
    assert not (tmp_path / "ran").exists()
