"""Runs in processes of their own: killed at any moment, interrupted, and spread over several ranks."""

import os
import random
import signal
import time

import pytest
import torch
import yaml

from fastvlp.train.checkpoint import checkpoints, load
from tests.train.conftest import log_lines, run, start

STEPS = 40


@pytest.fixture
def long(settings, tmp_path):
    """A run of many checkpoints, so that a kill often lands in the writing of one."""
    from fastvlp import config

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
    whole = start("train", long, "run.name=whole")
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
    assert whole.communicate(timeout=300) and whole.returncode == 0
    one, other = (state_of(tmp_path, name) for name in ("whole", "killed"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert all(torch.equal(one["ema"]["averages"][name], other["ema"]["averages"][name]) for name in one["ema"]["averages"])
    for a, b in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[(line["step"], line["loss"]) for line in log_lines(tmp_path / "runs" / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_write_a_checkpoint_and_end_with_their_status(long, tmp_path, signum, code):
    process = start("train", long, "data.workers=1", "train.checkpoint_every=0")
    wait_for_log(tmp_path / "runs" / "run" / "log.jsonl", 1, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    saved, = checkpoints(tmp_path / "runs" / "run" / "checkpoints")
    step = load(saved)["step"]
    assert f"stopped at step {step}" in err and "continues" in err and "Traceback" not in err


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    code = ("import time, sys; from fastvlp.train.interrupt import StopRequest\n"
            "with StopRequest():\n  print('ready', flush=True)\n  [time.sleep(0.05) for _ in range(1200)]")
    import subprocess
    import sys

    from tests.train.conftest import ROOT

    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    process.stdout.close()


def torchrun(*arguments, **options):
    return run("--nproc-per-node", "2", "--master-port", str(20000 + os.getpid() % 20000), "-m", "fastvlp", "train", *arguments,
               module="torch.distributed.run", **options)


def test_two_processes_give_the_curve_of_one(settings, tmp_path):
    """An odd batch, micro-batches, dropped patches: the same losses, gradient norms and weights to float32 rounding."""
    from fastvlp import config

    settings["data"]["batch_size"] = 13
    settings["optim"]["eps"] = 1e-3  # attention's key biases have gradient 0; Adam would blow its rounding up to whole steps
    settings["train"] |= {"image_tokens": 60, "text_tokens": 40}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(config.from_dict(settings))))
    alone = run("train", path, "run.name=one")
    assert alone.returncode == 0, alone.stderr
    pair = torchrun(path, "run.name=two")
    assert pair.returncode == 0, pair.stderr
    assert "2 x cpu" in pair.stdout and pair.stdout.count("trained 10 steps") == 1
    one, two = (log_lines(tmp_path / "runs" / name) for name in ("one", "two"))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)
    weights = [load(checkpoints(tmp_path / "runs" / name / "checkpoints")[-1]) for name in ("one", "two")]
    assert weights[0]["counters"]["image_tokens"] == weights[1]["counters"]["image_tokens"]
    assert weights[1]["counters"]["samples"] == 130 and len(weights[1]["random"]) == 2
    for name, value in weights[0]["model"].items():
        torch.testing.assert_close(weights[1]["model"][name], value, rtol=1e-4, atol=1e-5)
