import dataclasses

import pytest
import yaml

from fastvlp import config, recipes
from fastvlp.config import ConfigError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("schedule: {steps: 100, stages: [{until: 0.5, keep: 0.5}, {}]}\noptim: {lr: 1e-3}\n")
    return str(path)


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_that_ships_is_valid_and_says_what_it_is(name):
    made = config.load(name)
    assert made.steps >= 1
    summary = recipes.summary(name).splitlines()
    assert len(summary) >= 2 and any("fastvlp train" in line for line in summary)


def test_a_configuration_survives_its_own_file(recipe, tmp_path):
    made = config.load(recipe, ["model.image.width=96", "run.log=[wandb]", "optim.betas=[0.8, 0.9]", "train.ema=0.99"])
    (tmp_path / "config.yaml").write_text(config.dump(made))
    assert config.load(str(tmp_path / "config.yaml")) == made
    assert config.from_dict(config.to_dict(made)) == made


def test_overrides_reach_every_depth_and_kind(recipe):
    made = config.load(recipe, ["optim.lr=2e-4", "run.name=7", "model.text.causal=true", "optim.grad_clip=1",
                                "schedule.stages.0.keep=0.25", "schedule.stages.1.image_size=96",
                                "data.train=a.tar", "data.batch_size=1e3"])
    assert made.optim.lr == 2e-4 and made.run.name == "7" and made.model.text.causal is True and made.optim.grad_clip == 1.0
    assert made.schedule.stages[0].keep == 0.25 and made.schedule.stages[1].image_size == 96
    assert made.data.train == ("a.tar",) and made.data.batch_size == 1000


def test_samples_replace_steps(recipe):
    assert config.load(recipe, ["schedule.steps=null", "schedule.samples=1000", "data.batch_size=300"]).steps == 4


def test_what_differs_is_named(recipe):
    one, other = config.load(recipe), config.load(recipe, ["optim.lr=5", "schedule.stages.0.keep=1"])
    assert config.differences(one, other) == ["schedule.stages.0.keep: 0.5 -> 1.0", "optim.lr: 0.001 -> 5.0"]
    assert config.differences(one, one) == []


@pytest.mark.parametrize("override, message", [
    ("optim.learning_rate=1", r"unknown key optim.learning_rate; known keys of optim: lr, betas"),
    ("optm.lr=1", r"unknown key optm.lr; did you mean optim.lr\?"),
    ("lr=1", r"unknown key lr; did you mean optim.lr\?"),
    ("model.image.widht=1", r"unknown key model.image.widht; did you mean model.image.width"),
    ("schedule.stages.0.kep=1", r"unknown key schedule.stages.0.kep; did you mean schedule.stages.0.keep\?"),
    ("nonsense=1", r"unknown key nonsense; known keys: schedule, run, data"),
    ("optim.lr", r"'optim.lr' is no change; write key=value"),
    ("optim.lr=fast", r"optim.lr is 'fast'; a number is needed"),
    ("optim.lr=true", r"optim.lr is True; a number is needed"),
    ("optim.lr=-1", r"optim: lr is -1.0; a finite number"),
    ("optim.lr=.nan", r"optim: lr is nan; a finite number"),
    ("optim.betas=[0.9]", r"optim.betas has 1 entries; exactly 2 are needed"),
    ("optim.betas=[0.9, 1]", r"betas is \[0.9, 1.0\]; both must be"),
    ("optim=3", r"optim is 3; a section with the keys lr, betas"),
    ("data.batch_size=2.5", r"data.batch_size is 2.5; a whole number is needed"),
    ("data.batch_size=1", r"batch_size is 1; a contrastive batch needs at least 2"),
    ("data.train=[]", r"train is empty"),
    ("loss.name=clap", r"loss.name is 'clap'; allowed: clip, siglip \(did you mean clip\?\)"),
    ("run.log=tensorbord", r"run.log.0 is 'tensorbord'; allowed: tensorboard, wandb \(did you mean tensorboard\?\)"),
    ("run.name=a/b", r"name is 'a/b'; a folder name without slashes"),
    ("model.text.causal=1", r"model.text.causal is 1; true or false is needed"),
    ("model.image.heads=5", r"model.image: width is 192 and heads is 5"),
    ("schedule.samples=5", r"steps is 100 and samples is 5; exactly one"),
    ("schedule.stages.1.until=0.5", r"the stages end at \[0.5, 0.5\]; rising fractions"),
    ("schedule.stages.4.keep=1", r"4 is no place in a list of 2"),
    ("schedule.stages.0.keep=0", r"schedule.stages.0: image_size is 64, keep is 0.0"),
    ("train.ema=1", r"ema is 1.0; a decay between 0 and 1"),
    ("train.image_tokens=0", r"image_tokens is 0; a number of tokens"),
    ("train.keep=0", r"keep is 0; it must be at least 1"),
    ("eval.zero_shot=[x.tar]", r"classes is not"),
    ("eval.templates=[a photo]", r"each needs \{\} where the class name goes"),
    ("optim.lr=[", r"is not YAML"),
])
def test_every_mistake_gets_one_sentence_that_helps(recipe, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(recipe, [override])
    assert "\n" not in str(caught.value)


def test_recipes_that_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown recipe mimi; did you mean mini\?"):
        config.load("mimi")
    with pytest.raises(ConfigError, match="there is no such file"):
        config.load(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds no sections"):
        config.load(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    with pytest.raises(ConfigError, match="broken.yaml is not YAML"):
        config.load(str(tmp_path / "broken.yaml"))


def test_sections_cannot_be_changed_after_the_fact(recipe):
    made = config.load(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.optim.lr = 1.0
    assert yaml.safe_load(config.dump(made))["optim"]["lr"] == 1e-3
