"""Runs in processes of their own: killed at any moment, interrupted, and spread over several ranks."""

import os
import random
import signal
import time

import pytest
import torch
import yaml

from fastvlp import config
from fastvlp.train import train
from fastvlp.train.checkpoint import checkpoints, load
from fastvlp.train.interrupt import StopRequest
from tests.train.conftest import log_lines, run, start

STEPS = 40


@pytest.fixture
def long(settings, tmp_path):
    """A run of many checkpoints, so that a kill often lands in the writing of one."""
    settings["schedule"]["steps"] = STEPS
    settings["train"] |= {"checkpoint_every": 2, "ema": 0.9}
    path = tmp_path / "long.yaml"
    path.write_text(config.dump(config.from_dict(settings)))
    return path


def state_of(tmp_path, name):
    state = load(checkpoints(tmp_path / "runs" / name / "checkpoints")[-1])
    assert state["step"] == STEPS
    return state


def wait_for_log(path, lines, process):
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def test_sigkill_at_random_moments_changes_no_bit(long, tmp_path):
    random.seed(time.time_ns())
    kills = 0
    for first in (1, 20):
        process = start("train", long, "run.name=killed")
        wait_for_log(tmp_path / "runs" / "killed" / "log.jsonl", first, process)
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills == 2
    (tmp_path / "runs" / "killed" / "checkpoints" / ".step-00000099.partial").mkdir()  # and a half-written one, if none was left
    result = run("train", long, "run.name=killed")
    assert result.returncode == 0, result.stderr
    assert "continuing" in result.stdout
    train(config.load(str(long), ["run.name=whole"]))
    one, other = (state_of(tmp_path, name) for name in ("whole", "killed"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert all(torch.equal(one["ema"]["averages"][name], other["ema"]["averages"][name]) for name in one["ema"]["averages"])
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[(line["step"], line["loss"]) for line in log_lines(tmp_path / "runs" / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_ctrl_c_writes_a_checkpoint_and_ends_with_130(long, tmp_path):
    process = start("train", long, "data.workers=1", "train.checkpoint_every=0")
    wait_for_log(tmp_path / "runs" / "run" / "log.jsonl", 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    saved, = checkpoints(tmp_path / "runs" / "run" / "checkpoints")
    step = load(saved)["step"]
    assert f"stopped at step {step}" in err and "continues" in err and "Traceback" not in err


def test_a_second_ctrl_c_ends_at_once():
    ready, say = os.pipe()
    child = os.fork()
    if not child:
        with StopRequest() as stop:
            os.write(say, b"1")
            while True:
                time.sleep(0.01)
                if stop.signum:
                    os.write(say, b"2")
                    time.sleep(60)
                    os._exit(1)
    assert os.read(ready, 1) == b"1"
    os.kill(child, signal.SIGINT)
    assert os.read(ready, 1) == b"2"  # the first is only kept
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130


def torchrun(*arguments):
    return run("--nproc-per-node", "2", "--master-port", str(20000 + os.getpid() % 20000), *arguments, module="torch.distributed.run")


@pytest.mark.parametrize("name,strategy", [("clip", "gather"), ("siglip", "ring"), ("clip", "grouped")])
def test_two_processes_give_the_curve_of_one(settings, tmp_path, name, strategy):
    """An odd batch, micro-batches, dropped patches: the same losses, gradient norms and weights to float32 rounding."""
    settings["loss"] = {"name": name, "strategy": strategy}
    settings["model"]["init_bias"] = -3.0 if name == "siglip" else None
    settings["data"]["batch_size"] = 13
    settings["optim"]["eps"] = 1e-3  # attention's key biases have gradient 0; Adam would blow its rounding up to whole steps
    settings["train"] |= {"image_tokens": 60, "text_tokens": 40}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(config.from_dict(settings))))
    train(config.load(str(path), ["run.name=one"]))
    pair = torchrun("-m", "tests.train.two_ranks", path, "run.name=two")
    assert pair.returncode == 0, pair.stderr
    assert pair.stdout.count("decided together") == 2
    assert "2 x cpu" in pair.stdout and pair.stdout.count("trained 10 steps") == 1
    one, two = (log_lines(tmp_path / "runs" / name) for name in ("one", "two"))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)
    weights = [load(checkpoints(tmp_path / "runs" / name / "checkpoints")[-1]) for name in ("one", "two")]
    assert weights[0]["counters"]["image_tokens"] == weights[1]["counters"]["image_tokens"]
    assert weights[1]["counters"]["samples"] == 130 and len(weights[1]["random"]) == 2
    for name, value in weights[0]["model"].items():
        torch.testing.assert_close(weights[1]["model"][name], value, rtol=1e-4, atol=1e-5)
