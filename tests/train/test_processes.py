"""Runs in processes of their own: killed at any moment, interrupted, and spread over several ranks."""

import os
import random
import signal
import sys
import time

import psutil
import pytest
import torch

from fastvlp import config
from fastvlp.train import train
from fastvlp.train.checkpoint import checkpoints, verify
from fastvlp.train.interrupt import StopRequest
from tests.train.conftest import log_lines, recipe_of, run, start, weights, whole_state

STEPS = 40


@pytest.fixture
def long(settings, tmp_path):
    """A run of many checkpoints, so that a kill often lands in the writing of one."""
    settings["schedule"]["steps"] = STEPS
    settings["train"] |= {"checkpoint_every": 2, "ema": 0.9}
    path = tmp_path / "long.yaml"
    path.write_text(config.dump(recipe_of(settings)))
    return path


def state_of(tmp_path, name):
    """Weights, averages and optimizer of a finished run, by torch's own conversion."""
    assert verify(checkpoints(tmp_path / "runs" / name / "checkpoints")[-1])["counters"]["step"] == STEPS
    return whole_state(tmp_path / "runs" / name)


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
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in {**one[part], **other[part]})
    moments = one["optim"]["state"], other["optim"]["state"]
    assert len(moments[0]) > 20
    for name in moments[0]:
        assert all(torch.equal(moments[0][name][key], moments[1][name][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    losses = [[(line["step"], line["loss"]) for line in log_lines(tmp_path / "runs" / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_ctrl_c_writes_a_checkpoint_and_ends_with_130(long, tmp_path):
    process = start("train", long, "data.workers=1", "train.checkpoint_every=0")
    wait_for_log(tmp_path / "runs" / "run" / "log.jsonl", 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    saved, = checkpoints(tmp_path / "runs" / "run" / "checkpoints")
    step = verify(saved)["counters"]["step"]
    assert f"stopped at step {step}" in err and "continues" in err and "Traceback" not in err


def test_sigterm_to_everything_of_a_torchrun_is_a_checkpoint_and_143(settings, tmp_path):
    """To torchrun, which sends it on, to both of its processes and to their readers, as a scheduler does; nothing stays behind."""
    settings["schedule"]["steps"] = 5000
    settings["data"]["workers"] = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe_of(settings)))
    code = "import sys; from fastvlp.cli import main; code = main(sys.argv[1:]); print('code', code, flush=True); sys.exit(code)"
    launcher = start("--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", code, "train", path,
                     "train.checkpoint_every=0", module="torch.distributed.run")
    wait_for_log(tmp_path / "runs" / "run" / "log.jsonl", 1, launcher)
    everything = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    assert len(everything) == 5
    for process in everything:
        process.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 1 and out.count(f"code {128 + signal.SIGTERM}") == 2, out + err
    saved, = checkpoints(tmp_path / "runs" / "run" / "checkpoints")
    step = verify(saved)["counters"]["step"]
    assert err.count(f"stopped at step {step}; the same command continues from here") == 2 and "DataLoader" not in err
    assert log_lines(tmp_path / "runs" / "run")[-1]["step"] == step
    assert not psutil.wait_procs(everything[1:], timeout=60)[1]


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


@pytest.mark.parametrize("base,strategy,split", [("clip", "gather", 1), ("siglip", "ring", 2)])
def test_two_processes_give_the_curve_of_one(settings, tmp_path, base, strategy, split):
    """An odd batch, micro-batches, dropped patches, replicas, shards: the same losses, gradient norms and weights to float32 rounding."""
    settings["model"]["strategy"] = strategy
    settings["data"]["batch_size"] = 13
    settings["optim"]["eps"] = 1e-3  # attention's key biases have gradient 0; Adam would blow its rounding up to whole steps
    settings["train"] |= {"tokens": {"image": 60, "text": 40}, "ema": 0.9}
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe_of(settings, base)))
    train(config.load(str(path), ["run.name=one"]))
    pair = torchrun("-m", "tests.train.two_ranks", path, "run.name=two", f"train.shard={split}")
    assert pair.returncode == 0, pair.stderr
    assert pair.stdout.count("decided together") == 2
    assert "2 x cpu" in pair.stdout and pair.stdout.count("trained 10 steps") == 1
    one, two = (log_lines(tmp_path / "runs" / name) for name in ("one", "two"))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)
    described = [verify(checkpoints(tmp_path / "runs" / name / "checkpoints")[-1]) for name in ("one", "two")]
    assert described[0]["counters"]["tokens"] == described[1]["counters"]["tokens"]
    assert described[1]["counters"]["samples"] == 130 and described[1]["world"] == 2
    a, b = (whole_state(tmp_path / "runs" / name) for name in ("one", "two"))
    for part in ("model", "ema"):
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=1e-4, atol=1e-5)


def test_a_sharded_run_that_is_killed_goes_on_alone(settings, tmp_path):
    """CoCa over two processes, killed with SIGKILL, continued by one that is not sharded: the curve of a run that one process made."""
    settings["model"] = {"embed_dim": 16, "image": {"width": 32, "depth": 1, "heads": 2, "patch_size": 8, "image_size": 32},
                         "text": {"width": 32, "depth": 1, "heads": 2, "vocab_size": 4099, "context_length": 12, "causal": True},
                         "decoder": {"width": 32, "depth": 1, "heads": 2, "vocab_size": None, "source": 32}}
    settings["optim"]["eps"] = 1e-3
    settings["schedule"]["steps"] = 30
    path = tmp_path / "coca.yaml"
    path.write_text(config.dump(recipe_of(settings, "coca")))
    train(config.load(str(path), ["run.name=whole"]))
    process = start("--standalone", "--nproc-per-node", "2", "-m", "fastvlp", "train", str(path), "run.name=killed", "train.shard=2",
                    module="torch.distributed.run", start_new_session=True)
    wait_for_log(tmp_path / "runs" / "killed" / "log.jsonl", 9, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    result = run("train", path, "run.name=killed")
    assert result.returncode == 0, result.stderr
    assert "train.shard: 2 -> 1" in result.stdout and "continuing" in result.stdout
    losses = [[line["loss"] for line in log_lines(tmp_path / "runs" / name)] for name in ("whole", "killed")]
    assert len(losses[1]) == 30 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, other = (weights(tmp_path / "runs" / name) for name in ("whole", "killed"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_processes_that_differ_are_told(settings, tmp_path):
    """A learning rate of its own on one of two processes, or weights: refused on both, with the key."""
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe_of(settings)))
    pair = torchrun("-m", "tests.train.two_that_differ", path, "optim.lr")
    assert pair.returncode == 0, pair.stderr
    assert pair.stdout.count("told: ") == 2 and pair.stdout.count("optim.lr=") == 2
