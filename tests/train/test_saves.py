"""A save, of which each system call fails in turn, or is the last before a crash: what is found afterwards is whole."""

import errno
import os
import shutil

import pytest
import torch

from benchmarks.soak.system_calls import BROKEN_DISK, CRASH, CRASHED, NO_SPACE, faults
from fastvlp.train import checkpoint, loop, state
from fastvlp.train.checkpoint import CheckpointError
from fastvlp.train.parallel import World
from fastvlp.train.step import Trainer
from tests.train.conftest import recipe_of

WORLD = World(0, 1, torch.device("cpu"))


def trainer_of(settings):
    recipe = recipe_of(settings)
    system, stream = loop.prepare(recipe, WORLD)
    return Trainer(recipe, system, WORLD), iter(stream)


@pytest.fixture
def saved(settings, tmp_path):
    """A trainer after its second step, whose first is saved; a save removes that."""
    settings["train"] = {"keep": 1, "ema": 0.9}
    settings["model"]["image"]["depth"] = 1
    trainer, batches = trainer_of(settings)
    for _ in range(2):
        if trainer.counters.step:
            state.Saver(trainer, tmp_path / "first", "").save()
        trainer.settle(trainer.step(next(batches)))
    return trainer, tmp_path / "first"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_whichever_call_of_a_save_fails(saved, tmp_path):
    trainer, first = saved
    folder = shutil.copytree(first, tmp_path / "all")
    with faults(folder) as calls:
        state.Saver(trainer, folder, "").save()
    last = {call: number for number, call in enumerate(calls.made, 1)}  # the last of each kind on each file; the soak tries all
    assert {"mkdir", "open", "write", "close", "fsync", "rename", "unlink", "rmdir"} <= {name for name, _ in last}
    left = set()
    for at in last.values():
        for fault in (CRASH, (NO_SPACE, BROKEN_DISK)[at % 2]):
            folder = shutil.copytree(first, tmp_path / f"{fault}-{at}")
            left.add(fail(trainer, folder, at, fault))
            (_, described), said = checkpoint.latest(folder, print), f"{fault} at call {at}"
            assert described["counters"]["step"] in (1, 2), said  # ``latest`` has compared every sum
            if fault == CRASH:
                trainer.counters.step = 3
                state.Saver(trainer, folder, "").save()  # goes on as if nothing had been
                trainer.counters.step = 2
                assert names(folder) == ["step-00000003"] and checkpoint.verify(folder / "step-00000003"), said
            shutil.rmtree(folder)
    assert left == {(f"step-0000000{step}", partial) for step in (1, 2) for partial in (False, True)}  # all that may be found was


def fail(trainer, folder, at, fault):
    """What is left by a save whose call number ``at`` fails."""
    if fault == CRASH:
        child = os.fork()
        if not child:
            with faults(folder, at, fault):
                state.Saver(trainer, folder, "").save()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == CRASHED
    else:
        failed = None
        with faults(folder, at, fault):
            try:
                state.Saver(trainer, folder, "").save()
            except OSError as error:
                failed = error
        if failed is None:  # a folder that was to be made and is there
            assert names(folder) == ["step-00000002"]
        else:
            assert failed.errno in (getattr(errno, fault), errno.EIO)  # torch's writer says no more than that
    partial = [name for name in names(folder) if name.endswith(".partial")]
    assert fault == CRASH or not [name for name in partial if "00000002" in name]  # who lives clears up
    return checkpoint.checkpoints(folder)[-1].name, bool(partial)


def test_what_a_checkpoint_gives_back(settings, saved):
    """Weights, averages, moments, counters, and the scaler's factor: without it float16 begins to skip steps again."""
    trainer, first = saved
    settings["train"]["amp"] = "fp16"
    before, batches = trainer_of(settings)
    before.scaler.load_state_dict({**before.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 77})
    before.settle(before.step(next(batches)))
    factor = before.scaler.state_dict()
    assert factor["scale"] == 8.0 and factor["_growth_tracker"] == 78
    folder = first.with_name("half")
    torch.rand(5)
    state.Saver(before, folder, "").save()
    drawn = torch.rand(3)
    after, _ = trainer_of(settings)
    path, described = checkpoint.latest(folder, print)
    state.restore(after, path, described)
    assert after.scaler.state_dict() == factor and after.counters == before.counters and after.ema.updates == before.ema.updates
    for one, other in ((before.system.state_dict(), after.system.state_dict()), (before.ema.averages, after.ema.averages)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    moments = before.optimizer.state_dict()["state"], after.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[0][key][name], moments[1][key][name]) for key in moments[0] for name in moments[0][key])
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("change", [{"ema_updates": "x"}, {"counters": {"step": 1, "samples": 1, "seconds": "x"}},
                                    {"counters": {"step": 1, "samples": 1, "no": 1}},
                                    {"counters": {"step": 1, "samples": 1, "positions": 5, "tokens": None}}])
def test_a_stranger_s_state_that_is_whole_and_no_state(settings, saved, change):
    trainer, first = saved
    path, described = checkpoint.latest(first, print)
    with pytest.raises(CheckpointError, match="does not describe a training run of this fastvlp"):
        state.restore(trainer, path, {**described, **change})
