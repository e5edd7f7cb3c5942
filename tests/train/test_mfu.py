"""The operations that a step's samples need, and the rate that they are held against."""

import json
import math

import pytest
import torch

from fastvlp import config
from fastvlp.commands.profile import count
from fastvlp.train import flops, loop
from fastvlp.train.flops import MatrixRate
from fastvlp.train.parallel import World
from fastvlp.train.schedule import stage_at
from fastvlp.train.step import Trainer
from tests.train.conftest import recipe_of, run

CPU = World(0, 1, torch.device("cpu"))


def test_a_step_says_what_its_samples_need_once_a_stage(settings, monkeypatch):
    settings["data"]["batch_size"] = 8  # all of them are counted
    settings["train"]["tokens"] = {"image": 40}  # micro-batches, whose second forward is not needed
    recipe = recipe_of(settings)
    system, stream = loop.prepare(recipe, CPU)
    trainer, batches = Trainer(recipe, system, CPU), iter(stream)
    for step in range(7):
        batch = next(batches)
        wanted = count(system, batch, stage_at(recipe, step)).needed
        before, generator = trainer._counted, torch.get_rng_state()
        pending = trainer.step(batch)
        assert torch.equal(torch.get_rng_state(), generator)
        if step in (0, 5):  # the first of a stage
            assert math.isclose(pending.flops, wanted) and trainer._counted != before
        else:
            assert trainer._counted is before and math.isclose(pending.flops, wanted, rel_tol=0.1)  # by the cost model


def test_counting_leaves_running_statistics_alone(settings):
    recipe = recipe_of(settings)
    system, stream = loop.prepare(recipe, CPU)
    system.image_head.add_module("running", torch.nn.BatchNorm1d(16))
    system.image_head.register_forward_hook(lambda head, args, out: head.running(out))
    trainer = Trainer(recipe, system, CPU)
    trainer.step(next(iter(stream)))
    assert int(system.image_head.running.num_batches_tracked) == 1


def test_the_rate_is_one_that_products_reach():
    generator = torch.get_rng_state()
    assert 1e8 < MatrixRate(torch.device("cpu"), torch.float32).best < 1e14
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_rate_is_that_of_the_best_moment_and_costs_little(monkeypatch):
    """On a clock of its own: products of a machine that is busy at the start, then free, then busy again; ten hours of steps of 0.1 s."""
    now, took, measured = [0.0], [1.0], [0]
    monkeypatch.setattr(flops, "perf_counter", lambda: now[0])

    def product(rate):
        now[0] += took[0]
        measured[0] += 1

    monkeypatch.setattr(MatrixRate, "_finished", product)
    rate, found = MatrixRate(torch.device("cpu"), torch.float32), []
    for hour in range(10):
        took[0] = 0.005 if hour == 3 else 0.5
        before, measured[0] = now[0], 0
        for _ in range(3_000):
            now[0] += 0.1
            rate.again()
        spent = measured[0] * took[0]
        assert hour == 3 or 0 < spent <= 0.005 * now[0] + 2  # two products at most too many
        assert now[0] - before - spent == pytest.approx(300)
        found.append(2 * 512**3 / rate.best)
    assert found == pytest.approx([0.5] * 3 + [0.005] * 7)


@pytest.mark.parametrize("threads, side", [(1, 512), (2, 1024), (8, 1024), (9, 1536), (64, 2048)])
def test_more_threads_get_larger_products(threads, side, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(MatrixRate, "_measure", lambda self, seconds: None)
    assert MatrixRate(torch.device("cpu"), torch.float32).side == side


def test_two_processes_need_what_their_tokens_need_and_have_both_rates(settings, tmp_path):
    """Replicated, sharded and compiled; tests/train/two_counted.py counts by the formulas of the layers."""
    settings["data"]["batch_size"] = 16  # all of them are counted
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe_of(settings)))
    pair = run("--standalone", "--nproc-per-node", "2", "-m", "tests.train.two_counted", path, module="torch.distributed.run")
    assert pair.returncode == 0, pair.stderr
    assert pair.stdout.count("as the formulas say") == 6


def test_the_log_and_the_line_say_it(settings, tmp_path, capsys):
    settings["schedule"]["steps"] = 2
    loop.train(recipe_of(settings))
    lines = [json.loads(line) for line in (tmp_path / "runs" / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["mfu"] < 1 for line in lines if "loss" in line) and "% MFU" in capsys.readouterr().out
