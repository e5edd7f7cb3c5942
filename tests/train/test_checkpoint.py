import random

import numpy as np
import pytest
import torch

from fastvlp.train import checkpoint

CPU = torch.device("cpu")


def write(folder, step, keep=2, save_model=lambda path: (path / "model.json").write_text("{}")):
    return checkpoint.save(folder, step, {"step": step, "config": {}, "model": {"w": torch.full((3,), float(step))}}, save_model, keep)


def test_the_last_ones_are_kept_and_the_newest_is_found(tmp_path):
    for step in (5, 10, 15, 200):
        write(tmp_path, step)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000015", "step-00000200"]
    state = checkpoint.latest(tmp_path, print)
    assert state["step"] == 200 and torch.equal(state["model"]["w"], torch.full((3,), 200.0))
    assert (tmp_path / "step-00000200" / "model.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000200"]


def test_what_was_cut_while_writing_is_no_checkpoint_and_is_cleared_away(tmp_path):
    write(tmp_path, 1)

    def die(path):
        (path / "model.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, save_model=die)
    assert checkpoint.latest(tmp_path, print)["step"] == 1
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-40] + b"x" * 40])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / checkpoint.TRAINER_FILE
    file.write_bytes(damage(file.read_bytes()))
    said = []
    assert checkpoint.latest(tmp_path, said.append)["step"] == 1
    assert len(said) == 1 and "step-00000002" in said[0] and "damaged" in said[0]


def test_nothing_to_find(tmp_path):
    assert checkpoint.latest(tmp_path / "none", print) is None
    with pytest.raises(checkpoint.CheckpointError, match="holds no trainer.pt"):
        checkpoint.load(tmp_path)
    torch.save([1], tmp_path / checkpoint.TRAINER_FILE)
    with pytest.raises(checkpoint.CheckpointError, match="no training state"):
        checkpoint.load(tmp_path)


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    first = write(tmp_path, 4)
    stamp = (first / checkpoint.TRAINER_FILE).stat().st_mtime_ns
    assert write(tmp_path, 4) == first and (first / checkpoint.TRAINER_FILE).stat().st_mtime_ns == stamp


def test_checkpoints_of_another_past_are_forgotten(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=9)
    checkpoint.forget_after(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(2).tolist()

    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number back
    torch.save(checkpoint.random_state(CPU), tmp_path / "state")
    expected = [draw() for _ in range(3)]
    checkpoint.set_random_state(torch.load(tmp_path / "state", weights_only=True), CPU)
    assert [draw() for _ in range(3)] == expected
