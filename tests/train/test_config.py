"""Recipes by name and file, changed by keys, as plain values and back; and what is said where they do not fit."""

import dataclasses
import json
import sys
from pathlib import Path

import fiddle as fdl
import pytest
import yaml

from fastvlp import config
from fastvlp.config import ConfigError
from fastvlp.data.fields import Caption, Image, Other
from fastvlp.data.stream import Source
from fastvlp.recipe import Recipe


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("schedule: {steps: 100, stages: [{until: 0.5, keep: 0.5}, {}]}\noptim: {lr: 1e-3}\n")
    return str(path)


OWN = '''
from dataclasses import dataclass, replace

import fiddle as fdl
import torch
from torch import nn

from fastvlp.data.fields import Field
from fastvlp.recipe import Data, Recipe, Schedule
from fastvlp.systems import clip
from fastvlp.systems.system import System


@dataclass(frozen=True)
class Brightness(Field):
    """The mean of all pixels."""

    factor: float = 1.0

    def __call__(self, samples, words, stage):
        return torch.tensor([[self.factor * sample.picture(16, 8).mean() / 255] for sample in samples], dtype=torch.float32)


class Grey(System):
    def __init__(self, width: int = 4, losses: str = "good", head: nn.Module | None = None):
        super().__init__()
        self.net, self.losses = head or nn.Linear(1, width), losses

    def encode(self, batch):
        x = self.net(batch.brightness).square().sum(1)
        return {"good": {"x_loss": x}, "none": {"x": x}, "mean": {"x_loss": x.mean()}, "long": {"x_loss": torch.cat([x, x])},
                "list": {"x": [x]}, "bare": x, "detached": {"x_loss": x.detach()}}.get(self.losses, {"x_loss": x})

    def objective(self, out, batch):
        x = out.get("x_loss")
        return {"terms": x, "rows": {"near": x}, "float": {"near": 1.0}}.get(self.losses, self.means(out, batch))


def recipe() -> Recipe:
    """Grey."""
    return Recipe(fdl.Config(Grey), Schedule(steps=3), Data(fields={"brightness": Brightness()}, batch_size=4, workers=0))


def small() -> Recipe:
    """Narrow."""
    return replace(recipe(), model=fdl.Config(Grey, width=2))


def wrong():
    return 3


def made():
    return replace(recipe(), model=Grey())


def bare():
    return replace(recipe(), model=Grey)


def mapping():
    return replace(recipe(), data={"batch_size": 4})


def text():
    return replace(recipe(), schedule=Schedule(steps="three"))


def breaks():
    raise KeyError("a")


class Broken(Grey):
    def __init__(self):
        super().__init__()
        self.width = width


def broken():
    return replace(recipe(), model=fdl.Config(Broken))
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_recipe.py"
    path.write_text(OWN)
    yield str(path)
    sys.modules.pop("own_recipe", None)
    config._own_files.discard("own_recipe")


@pytest.mark.parametrize("name", [f"{name}{which}" for name in config.names() for which in ("", ":paper")])
def test_every_recipe_survives_yaml_and_json(name, tmp_path):
    made = config.load(name)
    (tmp_path / "recipe.yaml").write_text(config.dump(made))
    again = config.load(str(tmp_path / "recipe.yaml"), [f"run.name={made.run.name}"])
    assert again == made == config.from_dict(json.loads(json.dumps(config.to_dict(made))))


def test_changes_survive_their_own_file(recipe, tmp_path):
    made = config.load(recipe, ["model.image.width=96", "run.log=[wandb]", "optim.betas=[0.8, 0.9]", "train.ema=0.99",
                                "model.image.merge=[0.3]", "optim.scales={image: 0.1}", "train.tokens={image: 512}", "train.shard=world"])
    (tmp_path / "recipe.yaml").write_text(config.dump(made))
    assert config.load(str(tmp_path / "recipe.yaml"), ["run.name=mine"]) == made
    assert made.optim.scales == {"image": 0.1} and made.train.tokens == {"image": 512} and made.train.shard == "world"


def test_sources_and_fields_survive(recipe):
    fields = {"image": Image(views=2), "other": Other(Caption(pick=3))}
    made = config.load(recipe)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, fields=fields, train=(Source(("a.tar",), 2.0, {"text": Caption()}),
                                                                                              Source(("b.tar",)))))
    assert config.from_dict(json.loads(json.dumps(config.to_dict(made)))) == made
    changed = config.change(made, ["data.train.1.weight=3", "data.train.0.fields.text.length=7", "data.fields.other.field.pick=one"])
    assert changed.data.train[1].weight == 3.0 and changed.data.train[0].fields["text"].length == 7
    assert changed.data.fields["other"].field.pick == "one" and changed.data.fields["image"] == fields["image"]


def test_changes_reach_every_depth_and_kind(recipe):
    made = config.load(recipe, ["optim.lr=2e-4", "model.text.causal=true", "optim.grad_clip=1", "schedule.stages.0.keep=0.25",
                                "schedule.stages.1.image_size=96", "data.batch_size=1e3", "train.ema=null",
                                "data.fields.image.augment=0.5"])
    assert made.optim.lr == 2e-4 and made.model.text.causal is True and made.optim.grad_clip == 1.0 and made.train.ema is None
    assert made.schedule.stages[0].keep == 0.25 and made.schedule.stages[1].image_size == 96
    assert made.data.batch_size == 1000 and made.data.fields["image"].augment == 0.5
    text = fdl.build(config.load("clip", ["model.text={width: 64, depth: 1, heads: 2}"]).model).text
    assert (text.width, len(text.blocks)) == (64, 1)  # made by what made it before


@pytest.mark.parametrize("typed", ["010", "1:30", "1e3", "true", "0x1f", "2024-01-01", "1_000", "yes", "~x", "a#b", "=", "a: b", "%"])
def test_names_are_what_was_typed(recipe, tmp_path, typed):
    """YAML would make 8, 90, a date or nothing of some of these; a name is a text, on the command line and in a file."""
    assert config.load(recipe, [f"run.name={typed}"]).run.name == typed
    (tmp_path / "typed.yaml").write_text(f"run: {{name: {json.dumps(typed)}}}")
    assert config.load(str(tmp_path / "typed.yaml")).run.name == typed
    if typed[0].isalnum() and ": " not in typed:  # may stand without quotes
        (tmp_path / "typed.yaml").write_text(f"run:\n  name: {typed}\n")
        assert config.load(str(tmp_path / "typed.yaml")).run.name == typed
    for shards in (f"{typed}.tar", f"{typed}/*.tar"):
        assert config.load(recipe, [f"data.train={shards}"]).data.train == (shards,)


@pytest.mark.parametrize("typed", ["*.tar", "{00..01}.tar", "data/{a,b}/*.tar", "*", "{a,b}.tar", "[ab]*.tar"])
def test_patterns_are_no_anchors_or_mappings(recipe, typed):
    assert config.load(recipe, [f"data.train={typed}"]).data.train == (typed,)
    assert config.load(recipe, [f'data.train=["{typed}", 010.tar]']).data.train == (typed, "010.tar")


def test_a_yaml_file_is_changes_on_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: siglip:paper\nmodel:\n  embed_dim: 32\n  pool_text: first\noptim:\n  lr: 1e-5\n")
    made, base = config.load(str(path)), config.load("siglip:paper")
    assert config.differences(base, made) == ["model.embed_dim: 768 -> 32", "model.pool_text: last -> first",
                                              "run.name: siglip-paper -> mine", "optim.lr: 0.001 -> 1e-05"]
    path.write_text("")  # no change on the default
    assert config.differences(config.load(), config.load(str(path))) == ["run.name: clip -> mine"]
    path.write_text("recipe: clip\neval: {}\n")
    assert not config.load(str(path)).eval.retrieval


def test_names_of_runs_and_recipes():
    assert [config.load(name).run.name for name in (None, "mini", "coca", "jina-clip", "coca:paper", "coca:recipe")] == [
        "clip", "mini", "coca", "jina-clip", "coca-paper", "coca"]
    assert config.load("mini").model == config.load("clip").model


def test_samples_replace_steps_and_steps_samples(recipe):
    assert config.load(recipe, ["schedule.samples=1000", "data.batch_size=300"]).steps == 4
    assert config.load("clip:paper", ["schedule.steps=7"]).steps == 7


def test_what_differs_is_named(recipe):
    one, other = config.load(recipe), config.load(recipe, ["optim.lr=5", "schedule.stages.0.keep=1", "model.image.depth=2"])
    assert config.differences(one, other) == ["model.image.depth: 6 -> 2", "schedule.stages.0.keep: 0.5 -> 1.0", "optim.lr: 0.001 -> 5.0"]
    assert config.differences(one, one) == []


@pytest.mark.parametrize("change, message", [
    ("optim.learning_rate=1", r"unknown key optim.learning_rate; known keys of optim: lr, betas"),
    ("optm.lr=1", r"unknown key optm.lr; did you mean optim.lr\?"),
    ("lr=1", r"unknown key lr; did you mean optim.lr\?"),
    ("model.image.widht=1", r"unknown key model.image.widht; did you mean model.image.width\?"),
    ("model.embed_din=1", r"unknown key model.embed_din; did you mean model.embed_dim\?"),
    ("data.fields.image.kep=1", r"unknown key data.fields.image.kep; did you mean data.fields.image.keep\?"),
    ("schedule.stages.0.kep=1", r"unknown key schedule.stages.0.kep; did you mean schedule.stages.0.keep\?"),
    ("nonsense=1", r"unknown key nonsense; known keys: model, schedule, data"),
    ("optim.lr", r"'optim.lr' is no change; write key=value"),
    ("optim.lr=fast", r"optim.lr is 'fast'; a number is needed"),
    ("optim.lr=true", r"optim.lr is 'true'; a number is needed"),
    ("optim.lr=-1", r"optim: lr is -1.0; a finite number"),
    ("optim.lr=.nan", r"optim: lr is nan; a finite number"),
    ("optim.betas=[0.9]", r"optim.betas has 1 entries; exactly 2 are needed"),
    ("optim.betas=[0.9, 1]", r"betas is \[0.9, 1.0\]; both must be"),
    ("optim.scales={image: -1}", r"scales is {'image': -1.0}; factors are finite"),
    ("optim.layer_decay=1.5", r"layer_decay is 1.5; it lies above 0"),
    ("optim=3", r"optim is '3'; a section with the keys lr, betas"),
    ("data.batch_size=2.5", r"data.batch_size is '2.5'; a whole number is needed"),
    ("data.batch_size=0", r"batch_size is 0; it is at least 1"),
    ("data.train=[]", r"train is empty"),
    ("data.fields.image=3", r"data.fields.image is '3'; a field is needed"),
    ("data.fields.image={make: 'os:system'}", r"data.fields.image: os:system is outside of fastvlp.data.fields"),
    ("model={make: 'os:system', command: ls}", r"model: os:system is outside of fastvlp.systems"),
    ("model={make: 'fastvlp.systems.clip:Clap'}", r"model: there is no fastvlp.systems.clip:Clap"),
    ("model={make: 'fastvlp.systems.clip:paper'}", r"model: fastvlp.systems.clip:paper makes no module"),
    ("model.image=3", r"model.image is '3'; a call that makes a Module is needed"),
    ("run.log=tensorbord", r"run.log.0 is 'tensorbord'; allowed: tensorboard, wandb \(did you mean tensorboard\?\)"),
    ("run.name=a/b", r"name is 'a/b'; a folder name without slashes"),
    ("run.seed=-1", r"seed is -1; it lies between"),
    ("model.text.causal=1", r"model.text.causal is '1'; true or false is needed"),
    ("schedule.steps=null", r"no length is given; exactly one of steps, samples, epochs"),
    ("schedule.stages.1.until=0.5", r"the stages end at \[0.5, 0.5\]; rising fractions"),
    ("schedule.stages.4.keep=1", r"4 is no place in a list of 2"),
    ("schedule.stages.0.keep=0", r"schedule.stages.0: keep is 0.0"),
    ("train.ema=1", r"ema is 1.0; a decay between 0 and 1"),
    ("train.tokens={image: 0}", r"tokens is {'image': 0}; budgets are numbers of tokens"),
    ("train.shard=0", r"shard is 0; it is a number of processes, at least 1, or world"),
    ("train.shard=word", r"train.shard is 'word'; a whole number is needed, or world"),
    ("=3", r"'=3' is no change; write key=value"),
    ("train.print_every=-1", r"print_every is -1.0; seconds between lines"),
    ("train.keep=0", r"keep is 0; it must be at least 1"),
    ("eval={zero_shot: [x.tar]}", r"classes is not"),
    ("eval={knn: [x.tar]}", r"knn or probe is set and probe_train is not"),
    ("eval.templates=[a photo]", r"each needs \{\} where the class name goes"),
    ("eval.workers=-1", r"workers is -1"),
    ("optim.betas=[", r"is not YAML"),
])
def test_every_mistake_gets_one_sentence_that_helps(recipe, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(recipe, [change])
    assert "\n" not in str(caught.value)


def test_recipes_that_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown recipe mimi; did you mean mini\?"):
        config.load("mimi")
    with pytest.raises(ConfigError, match=r"unknown recipe zzz; known: adem_vl, .*or the path of a Python or YAML file"):
        config.load("zzz")
    with pytest.raises(ConfigError, match=r"clip has no recipe big; it has recipe, paper"):
        config.load("clip:big")
    for name in ("none.yaml", "none.py"):
        with pytest.raises(ConfigError, match="there is no such file"):
            config.load(str(tmp_path / name))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds no sections"):
        config.load(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    with pytest.raises(ConfigError, match="broken.yaml is not YAML"):
        config.load(str(tmp_path / "broken.yaml"))


def test_a_recipe_of_ones_own(own):
    made, small = config.load(own), config.load(f"{own}:small", ["model.width=7", "data.fields.brightness.factor=2"])
    assert isinstance(made, Recipe) and made.steps == 3
    assert fdl.build(small.model).net.out_features == 7 and small.data.fields["brightness"].factor == 2.0
    assert config.from_dict(json.loads(json.dumps(config.to_dict(small)))) == small
    head = config.load(own, ["model.head={make: 'torch.nn:Linear', in_features: 1, out_features: 9, bias: false}"])
    assert fdl.build(head.model).net.weight.shape == (9, 1)
    with pytest.raises(ConfigError, match="unknown key model.widht; did you mean model.width"):
        config.load(own, ["model.widht=7"])
    with pytest.raises(ConfigError, match="has no recipe tiny; it has recipe, small"):
        config.load(f"{own}:tiny")
    with pytest.raises(ConfigError, match="returns int; a recipe returns fastvlp.recipe.Recipe"):
        config.load(f"{own}:wrong")
    changed = Path(own).with_suffix(".yaml")
    changed.write_text(f"recipe: {own}:small\nmodel: {{width: 5}}\n")
    assert fdl.build(config.load(str(changed)).model).net.out_features == 5


@pytest.mark.parametrize("content, message", [
    ("import nowhere_at_all", "does not import: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("def recipe(:", "does not import: SyntaxError"),
    ("\nraise ValueError('two\\nlines')", r"does not import: ValueError: two lines \(bad_recipe.py, line 2\)"),
    ("", "has no recipe recipe; it has none: write def recipe"),
])
def test_a_file_that_does_not_import(tmp_path, content, message):
    (tmp_path / "bad_recipe.py").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(str(tmp_path / "bad_recipe.py"))
    assert "\n" not in str(caught.value)
    sys.modules.pop("bad_recipe", None)
    config._own_files.discard("bad_recipe")


@pytest.mark.parametrize("losses, message", [
    ("none", "Grey has nothing to train on: encode gives x; name an output \\*_loss"),
    ("mean", r"Grey.encode: x_loss is \(\); a \*_loss is one number a sample, here \[4\]"),
    ("long", r"Grey.encode: x_loss is \(8,\); a \*_loss is one number a sample, here \[4\]"),
    ("list", "Grey.encode: x is list; a tensor with a row a sample, or Packed tokens, is needed"),
    ("bare", "Grey.encode returns Tensor; outputs have names"),
    ("terms", "Grey.objective returns Tensor; terms have names"),
    ("rows", r"Grey.objective: near is \(4,\); a term is a tensor of one number"),
    ("float", "Grey.objective: near is float; a term is a tensor of one number"),
])
def test_a_system_without_losses_or_with_wrong_ones(own, shard, tmp_path, losses, message):
    from fastvlp.train import train

    changes = [f"data.train=[{shard}]", f"run.dir={tmp_path}/runs", "run.device=cpu"]
    with pytest.raises(ConfigError, match=message):
        train(config.load(own, [*changes, f"model.losses={losses}", "run.name=wrong"]))
    assert not (tmp_path / "runs").exists()  # a start that was refused leaves nothing
    if losses == "none":
        assert train(config.load(own, changes))["steps"] == 3


def test_a_loss_that_trains_nothing_is_said(own, shard, tmp_path, capsys):
    from fastvlp.train import train

    changes = [f"data.train=[{shard}]", f"run.dir={tmp_path}", "run.device=cpu"]
    train(config.load(own, [*changes, "model.losses=detached"]))
    assert "note: the first step has no gradient; a loss that is detached" in capsys.readouterr().out
    train(config.load(own, [*changes, "run.name=trains"]))
    assert "no gradient" not in capsys.readouterr().out


@pytest.mark.parametrize("name, message", [
    ("made", r"made fails: ValueError: model is a Grey; write the call that makes it, .*: fdl.Config\(Grey, ...\) \(own_recipe.py, line"),
    ("bare", r"model is a Grey; write the call .*fdl.Config\(Grey, ...\)"),
    ("mapping", r"data is a dict; fastvlp.recipe.Data\(...\) is needed"),
    ("text", "text fails: TypeError: .*own_recipe.py, line"),
    ("breaks", r"breaks fails: KeyError: 'a' \(own_recipe.py, line"),
    ("broken", r"model cannot be made: NameError: name 'width' is not defined \(own_recipe.py, line [0-9]+\)$"),
])
def test_a_recipe_that_is_wrong_is_one_sentence_with_its_place(own, name, message):
    from fastvlp.systems.files import build_system

    with pytest.raises(ConfigError, match=message) as caught:
        build_system(config.load(f"{own}:{name}"))
    assert "\n" not in str(caught.value)


def test_what_a_function_sets_is_checked_as_what_a_user_sets(own):
    Path(own).write_text(OWN + "\ndef shards():\n    return replace(recipe(), data=replace(recipe().data, shuffle=2.5))\n")
    with pytest.raises(ConfigError, match="data.shuffle is 2.5; a whole number is needed"):
        config.load(f"{own}:shards")
    assert config.load(f"{own}:").steps == 3  # mine.py: is mine.py


def test_sections_cannot_be_changed_after_the_fact(recipe):
    made = config.load(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.optim.lr = 1.0
    assert yaml.safe_load(config.dump(made))["optim"]["lr"] == 1e-3
