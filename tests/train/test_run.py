"""Whole runs in this process: what they leave behind, that they repeat, stop, go on, and refuse."""

import json
import math
import os
import signal
import struct
from pathlib import Path

import pytest
import torch

import fastvlp
from fastvlp import config, evaluate
from fastvlp.systems.clip import Clip
from fastvlp.train import Interrupted, Trainer, TrainingError, loop, plots, train
from fastvlp.train.checkpoint import CheckpointError, checkpoints, verify
from fastvlp.train.parallel import World
from tests.train.conftest import COLOURS, log_lines, recipe_of, weights


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Only the first test draws: a plot costs more than a run here."""
    if request.node.name != "test_a_run_leaves_everything_behind":
        monkeypatch.setattr(plots, "available", lambda: False)


def folder_of(settings):
    return Path(settings["run"]["dir"]) / settings["run"]["name"]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def go(settings, base="clip", **run):
    settings = {**settings, "run": {**settings["run"], **run}}
    return train(recipe_of(settings, base)), settings


def test_a_run_leaves_everything_behind(settings, shard, tmp_path, capsys):
    classes = tmp_path / "colours.txt"
    classes.write_text("\n".join(COLOURS))
    settings["eval"] = {"zero_shot": [str(shard)], "classes": str(classes), "retrieval": [str(shard)], "every": 6}
    results, _ = go(settings)
    folder, out = folder_of(settings), capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "log.jsonl", "curves.png", "retrieval.png", "results.json", "checkpoints", "model", ".lock"}
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["steps"] == 10 and results["samples"] == 120 and results["zero_shot"]["n"] == 48
    assert 0 < results["train_seconds"] and {"startup_seconds", "evaluation_seconds", "plot_seconds"} <= results.keys()
    assert "top-1" in out and "R@10" in out and "step 10/10" in out
    assert config.load(str(folder / "recipe.yaml")) == recipe_of(settings)

    steps = [line for line in log_lines(folder) if "loss" in line]
    assert all(name in steps[0] for name, _ in plots.PANELS)
    assert [line["step"] for line in steps] == list(range(1, 11)) and steps[-1]["loss"] < steps[0]["loss"]
    assert [line["step"] for line in log_lines(folder) if "zero_shot_top1" in line] == [6, 10]
    for name, wide, high in (("curves.png", 800, 500), ("retrieval.png", 600, 600)):
        width, height = struct.unpack(">II", (folder / name).read_bytes()[16:24])
        assert width > wide and height > high

    system = fastvlp.load(folder)
    assert equal(dict(system.state_dict()), weights(folder))
    assert len({path.stat().st_mode & 0o777 for path in (folder / "model").iterdir()}) == 1  # all as the umask says
    again = evaluate.zero_shot(system, str(shard), list(COLOURS))
    assert again["top1"] == results["zero_shot"]["top1"]
    assert equal(dict(fastvlp.load(folder / "checkpoints" / "step-00000010").state_dict()), weights(folder))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(settings):
    del settings["train"]
    go(settings, name="one")
    go({**settings, "data": {**settings["data"], "workers": 1}}, name="two")
    go(settings, name="three", seed=1)
    one, two, three = (weights(folder_of(settings).with_name(name)) for name in ("one", "two", "three"))
    assert equal(one, two)
    assert not equal(one, three)


@pytest.mark.parametrize("base", ["clip", "brivl"])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_weights(settings, base, monkeypatch, capsys):
    """With merging in the tower, averages, micro-batches; and with momentum copies and queues."""
    settings["train"] |= {"ema": 0.9, "tokens": {"image": 60, "text": 40}}
    settings["model"] |= {"queue": 40} if base == "brivl" else {}
    settings["model"]["image"]["merge"] = [0.3] if base == "clip" else []
    _, whole = go(settings, base, name="whole")
    step = Trainer.step

    def step_then_signal(self, batch, stop=0):
        values = step(self, batch, stop)
        if self.counters.step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_then_signal)
        with pytest.raises(Interrupted) as stopped:
            go(settings, base, name="parts")
    assert stopped.value.signum == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    parts = {**settings, "run": {**settings["run"], "name": "parts"}}
    assert [path.name for path in checkpoints(folder_of(parts) / "checkpoints")] == ["step-00000004", "step-00000006"]
    torch.manual_seed(99)  # another process would have another state
    go(settings, base, name="parts")
    assert "after step 6" in capsys.readouterr().out
    assert equal(weights(folder_of(whole)), weights(folder_of(parts)))
    assert equal(*(dict(fastvlp.load(folder_of(s)).state_dict()) for s in (whole, parts)))
    assert not equal(dict(fastvlp.load(folder_of(whole)).state_dict()), weights(folder_of(whole)))  # the averages are exported
    losses = [[(line["step"], line["loss"]) for line in log_lines(folder_of(s)) if "loss" in line] for s in (whole, parts)]
    assert losses[0] == losses[1]
    counters = verify(checkpoints(folder_of(parts) / "checkpoints")[-1])["counters"]
    assert counters["samples"] == 120 and counters["step"] == 10 and counters["positions"] == [120]


def test_a_finished_run_is_shown_and_never_overwritten(settings, capsys):
    first, _ = go(settings)
    capsys.readouterr()
    second, _ = go(settings)
    assert first == second and "finished" in capsys.readouterr().out
    third, _ = go(settings, resume="none")
    assert third["train_seconds"] != first["train_seconds"]
    aside = folder_of(settings).with_name("run.before-1")
    assert str(aside) in capsys.readouterr().out and json.loads((aside / "results.json").read_text()) == first


def test_other_settings_are_refused_by_auto_and_taken_from_a_path(settings, capsys):
    go(settings)
    changed = {**settings, "optim": {"lr": 1e-3}, "schedule": {**settings["schedule"], "steps": 12}}
    with pytest.raises(config.ConfigError, match=r"optim.lr: 0.003 -> 0.001.*run.name.*--resume none"):
        go(changed)
    results, _ = go(changed, name="other", resume=str(folder_of(settings)))
    assert results["steps"] == 12 and "optim.lr: 0.003 -> 0.001" in capsys.readouterr().out
    go({**settings, "data": {**settings["data"], "workers": 1}, "train": {"checkpoint_every": 3}})  # these may change
    with pytest.raises(config.ConfigError, match="nothing is left to do.*run.start"):
        go({**settings, "schedule": {**settings["schedule"], "steps": 5}}, name="less", resume=str(folder_of(settings)))
    deeper = {**settings, "model": {**settings["model"], "image": {**settings["model"]["image"], "depth": 3}},
              "schedule": {**settings["schedule"], "steps": 12}}
    with pytest.raises(CheckpointError, match="does not fit this model.*run.start"):
        go(deeper, name="deeper", resume=str(folder_of(settings)))
    go(deeper, name="started", start=str(folder_of(settings)))
    assert "fresh in image" in capsys.readouterr().out


def test_the_position_is_counted_in_samples(settings):
    """80 of 160 samples seen in batches of 8; the other 80 come in batches of 16, none twice and none left out."""
    settings["schedule"] = {"steps": None, "samples": 160, "stages": [{"image_size": 24}]}
    settings["data"]["batch_size"] = 8
    settings["train"] = {"checkpoint_every": 5, "keep": 9}
    go(settings)
    settings["data"]["batch_size"] = 16
    results, _ = go(settings, name="other", resume=str(folder_of(settings) / "checkpoints" / "step-00000010"))
    assert results["samples"] == 160 and results["steps"] == 10


def trainer_with(settings, bad):
    """A trainer whose loss is not a number at some steps, and its batches."""
    recipe, world = recipe_of(settings), World(0, 1, torch.device("cpu"))
    system, stream = loop.prepare(recipe, world)

    def objective(out, batch):
        terms = Clip.objective(system, out, batch)
        return {name: value * math.nan if batch.index + 1 in bad else value for name, value in terms.items()}

    system.objective = objective
    return Trainer(recipe, system, world), iter(stream)


def settled(trainer, batches, steps=1):
    return [trainer.settle(trainer.step(next(batches))) for _ in range(steps)][-1]


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_loss_that_is_not_finite_leaves_no_trace(settings, amp):
    settings["schedule"]["steps"] = 99
    settings["train"] |= {"ema": 0.9, "amp": amp, "max_nonfinite": 99}
    trainer, batches = trainer_with(settings, bad={30})
    settled(trainer, batches, 29)  # the float16 scaler has to find its factor first
    counted = trainer.counters.nonfinite
    before = {name: p.detach().clone() for name, p in trainer.system.named_parameters()}
    average = {name: p.clone() for name, p in trainer.ema.averages.items()}
    values = settled(trainer, batches)
    assert math.isnan(values["loss"])
    assert equal(before, dict(trainer.system.named_parameters())) and equal(average, trainer.ema.averages)
    assert (trainer.counters.step, trainer.counters.nonfinite, trainer.counters.nonfinite_in_a_row) == (30, counted + 1, 1)
    settled(trainer, batches, 4)
    assert trainer.counters.nonfinite_in_a_row == 0
    assert not equal(before, dict(trainer.system.named_parameters()))


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_too_many_in_a_row_stop_the_run_with_an_explanation(settings, amp):
    settings["train"] |= {"max_nonfinite": 25, "amp": amp}
    trainer, batches = trainer_with(settings, bad=set(range(30, 99)))
    settled(trainer, batches, 53)
    with pytest.raises(TrainingError, match=r"25 steps in a row .*step 54.*optim.lr"):
        settled(trainer, batches)


def test_half_precision_trains_to_nearly_the_same_loss(settings):
    """bf16 and fp16 autocast against float32; products carry 8 and 11 bits. The float16 scaler skips steps until its factor fits."""
    found = {}
    for amp in ("none", "bf16", "fp16"):
        settings["train"]["amp"] = amp
        _, run = go(settings, name=amp)
        found[amp] = [line["loss"] for line in log_lines(folder_of(run))]
    assert found["bf16"] != found["none"] and found["fp16"] != found["none"]
    assert found["bf16"][:3] == pytest.approx(found["none"][:3], rel=2e-2)
    assert found["fp16"][0] == pytest.approx(found["none"][0], rel=1e-3) and min(found["fp16"]) < found["none"][0]


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(settings):
    settings["optim"]["grad_clip"] = 1e-3
    trainer, batches = trainer_with(settings, bad=set())
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(
        torch.cat([p.grad.flatten() for p in trainer.system.parameters() if p.grad is not None]).norm().item()))
    values = settled(trainer, batches)
    assert values["grad_norm"] > 1e-2 and seen == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("moved, bound", [(7.0, 100.0), (-2.0, 1.0)])
def test_the_scale_is_brought_back_into_its_bounds_after_each_step(settings, moved, bound):
    """CLIP's section 2.5: without it training comes apart."""
    trainer, batches = trainer_with(settings, bad=set())
    with torch.no_grad():
        trainer.system.scale.log_scale.fill_(moved)
    settled(trainer, batches)
    assert trainer.system.scale()[0].item() == pytest.approx(bound)


def test_a_stage_freezes_parts_and_the_next_trains_them(settings):
    settings["schedule"] = {"steps": 4, "stages": [{"until": 0.5, "frozen": ["image", "text.blocks.0"]}, {}]}
    trainer, batches = trainer_with(settings, bad=set())
    start = {name: p.detach().clone() for name, p in trainer.system.named_parameters()}
    frozen = [name for name in start if name.startswith(("image.", "text.blocks.0."))]
    settled(trainer, batches, 2)
    now = dict(trainer.system.named_parameters())
    assert all(torch.equal(now[name], start[name]) for name in frozen)
    assert not any(torch.equal(now[name], start[name]) for name in ("text.norm_out.weight", "image_head.projection"))
    settled(trainer, batches, 2)
    assert not torch.equal(now["image.patch.weight"], start["image.patch.weight"])


@pytest.mark.parametrize("change, message", [
    ({"data": {"train": ["nowhere/*.tar"]}}, "nowhere"),
    ({"data": {"tokenizer": "nowhere.json"}}, "nowhere.json"),
    ({"data": {"fields": {}}}, "fields is empty"),
    ({"model": {"text": {"vocab_size": 10}}}, "vocabulary is 4096"),
    ({"model": {"image": {"grid": 4, "patch_size": 4, "image_size": 32}}}, "lies between 1 and 16"),
    ({"train": {"tokens": {"pictures": 5}}}, "train.tokens names pictures; the streams of this recipe are image, text"),
    ({"train": {"shard": 2}}, "train.shard is 2 on 1 process;"),
    ({"schedule": {"stages": [{"frozen": ["tower"]}]}}, "no part 'tower'; its parts are image, text"),
    ({"optim": {"scales": {"tower": 0.1}}}, "optim.scales names tower"),
    ({"run": {"log": ["tensorboard", "wandb"]}}, "fastvlp\\[log\\]"),
    ({"run": {"start": "nowhere"}}, "nowhere holds no model.safetensors"),
    ({"eval": {"zero_shot": ["mini:val-emoji"], "classes": "nowhere.txt"}}, "nowhere.txt"),
    ({"run": {"resume": "nowhere"}}, "nowhere holds no manifest.json"),
])
def test_what_cannot_work_is_refused_before_anything_is_written(settings, change, message, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("tensorboard", "wandb") else find(name, *rest))
    for section, values in change.items():
        target = settings.setdefault(section, {})
        for key, value in values.items():
            target[key] = {**target.get(key, {}), **value} if isinstance(value, dict) and value else value
    with pytest.raises((config.ConfigError, FileNotFoundError, CheckpointError), match=message):
        train(recipe_of(settings))
    assert not folder_of(settings).exists()
