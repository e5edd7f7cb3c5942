"""The operations that a step's samples need, and the rate that they are held against."""

import json
import math

import torch

from fastvlp.commands.profile import count
from fastvlp.train import loop
from fastvlp.train.flops import matrix_rate
from fastvlp.train.parallel import World
from fastvlp.train.schedule import stage_at
from fastvlp.train.step import Trainer
from tests.train.conftest import recipe_of

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
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32) < 1e14
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_log_and_the_line_say_it(settings, tmp_path, capsys):
    settings["schedule"]["steps"] = 2
    loop.train(recipe_of(settings))
    lines = [json.loads(line) for line in (tmp_path / "runs" / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["mfu"] < 1 for line in lines if "loss" in line) and "% MFU" in capsys.readouterr().out
