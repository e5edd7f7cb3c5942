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
from fastvlp import config
from fastvlp.train import Interrupted, Trainer, TrainingError, plots, train
from fastvlp.train.checkpoint import checkpoints, load
from fastvlp.train.distributed import World
from fastvlp.train.loop import build_trainer
from tests.train.conftest import COLOURS, log_lines


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Only the first test draws: a plot costs more than a run here."""
    if request.node.name != "test_a_run_leaves_everything_behind":
        monkeypatch.setattr(plots, "available", lambda: False)


def final(settings) -> dict[str, torch.Tensor]:
    run = settings["run"]
    return load(checkpoints(Path(run["dir"]) / run["name"] / "checkpoints")[-1])["model"]


def folder_of(settings):
    return Path(settings["run"]["dir"]) / settings["run"]["name"]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def go(settings, **run):
    settings = {**settings, "run": {**settings["run"], **run}}
    return train(config.from_dict(settings)), settings


def test_a_run_leaves_everything_behind(settings, shard, tmp_path, capsys):
    classes = tmp_path / "colours.txt"
    classes.write_text("\n".join(COLOURS))
    settings["eval"] = {"zero_shot": [str(shard)], "classes": str(classes), "retrieval": [str(shard)], "every": 6}
    results, _ = go(settings)
    folder, out = folder_of(settings), capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "log.jsonl", "curves.png", "retrieval.png", "results.json", "checkpoints", "model"}
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["steps"] == 10 and results["samples"] == 120 and results["zero_shot"]["n"] == 48
    assert 0 < results["train_seconds"] and {"startup_seconds", "evaluation_seconds", "plot_seconds"} <= results.keys()
    assert "top-1" in out and "R@10" in out and "step 10/10" in out
    assert config.load(str(folder / "config.yaml")) == config.from_dict(settings)

    steps = [line for line in log_lines(folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11)) and steps[-1]["loss"] < steps[0]["loss"]
    assert [line["image_size"] for line in steps] == [24] * 5 + [32] * 5
    assert [line["step"] for line in log_lines(folder) if "zero_shot_top1" in line] == [6, 10]
    for name, wide, high in (("curves.png", 800, 500), ("retrieval.png", 600, 600)):
        width, height = struct.unpack(">II", (folder / name).read_bytes()[16:24])
        assert width > wide and height > high

    model = fastvlp.load(folder)
    assert equal(dict(model.state_dict()), final(settings))
    again = fastvlp.evaluate.zero_shot(model, str(shard), list(COLOURS))
    assert again["top1"] == results["zero_shot"]["top1"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(settings):
    del settings["train"]
    _, one = go(settings, name="one")
    _, two = go({**settings, "data": {**settings["data"], "workers": 1}}, name="two")
    _, three = go(settings, name="three", seed=1)
    assert equal(final(one), final(two))
    assert not equal(final(one), final(three))


@pytest.mark.parametrize("merge", [[], [0.3]], ids=["plain", "merging"])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_weights(settings, merge, monkeypatch, capsys):
    settings["train"] |= {"ema": 0.9, "image_tokens": 60, "text_tokens": 40}
    settings["model"]["image"]["merge"] = merge
    _, whole = go(settings, name="whole")
    step = Trainer.step

    def step_then_signal(self, batch, stop=0):
        values = step(self, batch, stop)
        if self.counters.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_then_signal)
        with pytest.raises(Interrupted) as stopped:
            go(settings, name="parts")
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.name for path in checkpoints(folder_of({**settings, "run": {**settings["run"], "name": "parts"}}) / "checkpoints")] == [
        "step-00000004", "step-00000007"]
    torch.manual_seed(99)  # another process would have another state
    _, parts = go(settings, name="parts")
    assert "after step 7" in capsys.readouterr().out
    assert equal(final(whole), final(parts))
    assert equal(*(dict(fastvlp.load(folder_of(s)).state_dict()) for s in (whole, parts)))
    assert not equal(dict(fastvlp.load(folder_of(whole)).state_dict()), final(whole))  # the averages are exported
    losses = [[(line["step"], line["loss"]) for line in log_lines(folder_of(s)) if "loss" in line] for s in (whole, parts)]
    assert losses[0] == losses[1]
    state = load(checkpoints(folder_of(parts) / "checkpoints")[-1])
    assert state["counters"]["samples"] == 120 and state["step"] == 10


def test_a_finished_run_is_shown_and_not_run_again(settings, capsys):
    first, _ = go(settings)
    capsys.readouterr()
    second, _ = go(settings)
    assert first == second and "finished" in capsys.readouterr().out
    third, _ = go(settings, resume="none")
    assert third["train_seconds"] != first["train_seconds"]


def test_other_settings_are_refused_by_auto_and_taken_from_a_path(settings, capsys):
    go(settings)
    changed = {**settings, "optim": {"lr": 1e-3}, "schedule": {**settings["schedule"], "steps": 12}}
    with pytest.raises(config.ConfigError, match=r"optim.lr: 0.003 -> 0.001.*run.name.*--resume none"):
        go(changed)
    results, _ = go(changed, name="other", resume=str(folder_of(settings)))
    assert results["steps"] == 12 and "optim.lr: 0.003 -> 0.001" in capsys.readouterr().out
    go({**settings, "eval": {"batch_size": 8}, "train": {"checkpoint_every": 3}})  # these may change


class Criterion(torch.nn.Module):
    """Not finite at the given steps."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, image, text, scale, bias, local_sizes=None):
        self.calls += 1
        loss = (scale * image @ text.T).logsumexp(1).mean()
        return loss * math.nan if self.calls in self.bad else loss


def trainer_with(settings, bad):
    made = config.from_dict(settings)
    trainer = build_trainer(made, World(0, 1, torch.device("cpu")))
    trainer.criterion = Criterion(bad)
    return trainer, iter_batches(made, trainer)


def iter_batches(made, trainer):
    from fastvlp.data import Stage, Stream

    return iter(Stream(made.data.train, trainer.model.tokenizer, made.data.batch_size, 8, 12, seed=0, stage_at=Stage(24)))


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_loss_that_is_not_finite_leaves_no_trace(settings, amp):
    settings["train"] |= {"ema": 0.9, "amp": amp}
    trainer, pairs = trainer_with(settings, bad={2})
    trainer.step(next(pairs))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    average = {name: p.clone() for name, p in trainer.ema.averages.items()}
    values = trainer.step(next(pairs))
    assert math.isnan(values["loss"])
    assert equal(before, dict(trainer.model.named_parameters())) and equal(average, trainer.ema.averages)
    assert (trainer.counters.step, trainer.counters.nonfinite, trainer.counters.nonfinite_in_a_row) == (2, 1, 1)
    for _ in range(12):  # the float16 scaler has to find its factor first
        trainer.step(next(pairs))
    assert trainer.counters.nonfinite == 1 and trainer.counters.nonfinite_in_a_row == 0
    assert not equal(before, dict(trainer.model.named_parameters()))


def test_too_many_in_a_row_stop_the_run_with_an_explanation(settings):
    settings["train"]["max_nonfinite"] = 3
    trainer, pairs = trainer_with(settings, bad={1, 2, 4, 5, 6})
    for _ in range(5):
        trainer.step(next(pairs))
    with pytest.raises(TrainingError, match=r"3 steps in a row .*step 6.*optim.lr"):
        trainer.step(next(pairs))


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
    trainer, pairs = trainer_with(settings, bad=set())
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(
        torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm().item()))
    values = trainer.step(next(pairs))
    assert values["grad_norm"] > 1e-2 and seen == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("change, message", [
    ({"data": {"train": ["nowhere/*.tar"]}}, "nowhere"),
    ({"data": {"tokenizer": "nowhere.json"}}, "nowhere.json"),
    ({"model": {"text": {"vocab_size": 10}}}, "model.text.vocab_size=4096"),
    ({"model": {"init_bias": -10}}, "loss.name=siglip"),
    ({"model": {"image": {"grid": 4, "patch_size": 4, "image_size": 16}}}, "reaches 16 pixels"),
    ({"train": {"text_tokens": 5}}, "train.text_tokens is 5, and one sample may have 12"),
    ({"run": {"log": ["tensorboard", "wandb"]}}, "fastvlp\\[log\\]"),
    ({"eval": {"zero_shot": ["mini:val-emoji"], "classes": "nowhere.txt"}}, "nowhere.txt"),
    ({"run": {"resume": "nowhere"}}, "nowhere holds no trainer.pt"),
])
def test_what_cannot_work_is_refused_before_anything_is_written(settings, change, message, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("tensorboard", "wandb") else find(name, *rest))
    for section, values in change.items():
        target = settings.setdefault(section, {})
        for key, value in values.items():
            target[key] = {**target.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises((config.ConfigError, FileNotFoundError, ValueError), match=message):
        train(config.from_dict(settings))
    assert not folder_of(settings).exists()
