"""What ``fastvlp plan`` says of a recipe, against formulas by hand and what a real step computes and keeps."""

import dataclasses
import json

import fiddle as fdl
import pytest
import torch
from torch import nn

from fastvlp import cli, config
from fastvlp._schema import ConfigError
from fastvlp.commands import dry_run
from fastvlp.commands.plan import plan, table
from fastvlp.commands.strategies import Cluster
from fastvlp.data.batch import Batch
from fastvlp.systems.flops import FlopCount
from fastvlp.systems.system import System

SHALLOW = ("model.image.depth=2", "model.text.depth=2", "model.decoder.depth=2")


def priced(name, *changes, devices=8, **options):
    return plan(config.load(name, changes), Cluster(devices), **options)


def tower(width, depth, tokens, pairs=None):
    """Operations of transformer blocks with an MLP of four times the width."""
    return depth * (24 * width**2 * tokens + 4 * width * (tokens**2 if pairs is None else pairs))


def test_clip_s_paper_costs_what_the_formulas_say():
    """ViT-B/32 sees 49 patches; the causal text tower 77 tokens, each with those before it; the pools project one token."""
    found = priced("clip:paper")
    image = 2 * 3 * 32**2 * 768 * 49 + tower(768, 12, 49) + 2 * 768 * 512
    text = tower(512, 12, 77, 77 * 78 / 2) + 2 * 512 * 512
    stage = found.stages[0]
    # The loss between few samples, counted too, is a thousandth of a per mille.
    assert stage.forward == pytest.approx(image + text, rel=1e-5)
    assert stage.backward == pytest.approx(2 * (image + text) - 2 * 3 * 32**2 * 768 * 49, rel=1e-5)  # pixels need no gradient
    assert stage.tokens == {"image": 49, "text": 77} and found.parameters == pytest.approx(151e6, rel=0.01) == found.trained
    assert found.dtype == "float16" and len(stage.losses) == 1 and stage.samples == 4096


def test_keep_and_merge_make_it_cheaper():
    changes = ("model.image.merge=[0.5, 0, 0, 0, 0, 0]",)
    whole, merged = priced("clip"), priced("clip", *changes)
    kept, every = (stage.forward for stage in whole.stages)
    assert every - kept == pytest.approx(2 * 3 * 16**2 * 192 * 8 + tower(192, 6, 16) - tower(192, 6, 8), rel=1e-3)  # half of 16 patches
    attention, mlp = 8 * 192**2, 16 * 192**2
    saved = 8 * mlp + 5 * (8 * (attention + mlp) + 4 * 192 * (16**2 - 8**2))  # the first block merges before its MLP
    assert every - merged.stages[1].forward == pytest.approx(saved, rel=1e-3)


def test_teachers_and_frozen_parts_cost_forward_alone():
    found = priced("dlip")
    teacher, student = priced("clip"), priced("clip", *(f"model.{side}.{key}" for side, depth in (("image", 4), ("text", 2))
                                                        for key in ("width=128", "heads=2", f"depth={depth}")))
    assert found.parameters == pytest.approx(teacher.parameters + student.parameters, abs=2) and found.trained == student.parameters
    for both, one, other in zip(found.stages, student.stages, teacher.stages, strict=True):
        assert both.backward == pytest.approx(one.backward, rel=1e-3)
        assert both.forward == pytest.approx(one.forward + other.forward, rel=1e-3)
        assert both.memory.gradients == 4 * found.trained
    stages = "schedule.stages=[{until: 0.5, frozen: [image]}, {until: 1.0}]"
    first, second = priced("clip", stages).stages
    assert first.backward < second.backward / 2 and first.forward == second.forward


def test_what_is_kept_for_the_backward_is_what_autograd_keeps():
    """By hand: x @ A keeps x (A needs a gradient), relu its result, and that @ B the same tensor, which counts once."""
    recipe = dataclasses.replace(config.load("clip"), model=fdl.Config(Mlp, 40))
    system = dry_run.build(recipe)
    sizes, once = dry_run.per_sample(system, recipe, recipe.schedule.stages[1], None)
    tokens, pixels = 16, 3 * 16**2
    assert sizes.saved[None] == 4 * tokens * (pixels + 40) and once == 0
    assert sizes.forward == 2 * tokens * (pixels * 40 + 40 * 8) and sizes.backward == 2 * tokens * (pixels * 40 + 2 * 40 * 8)
    assert sizes.outputs == 4


class Mlp(System):
    """Two products."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.image = nn.Module()
        self.image.patch_size, self.image.image_size = 16, 64
        self.text = nn.Module()
        self.one, self.two = nn.Linear(768, hidden, bias=False), nn.Linear(hidden, 8, bias=False)

    def encode(self, batch: Batch) -> dict:
        made = self.two(self.one(batch.image.x.float()).relu())
        return {"size_loss": made.sum(1).unflatten(0, (len(batch), -1)).sum(1) / 16}


@pytest.mark.parametrize("name", ["coca", "vilt"])
def test_sizes_without_values_are_those_of_real_tensors(name):
    """The same batch through the real system: operations, and bytes that autograd keeps."""
    recipe = config.load(name)
    stage = recipe.schedule.stages[1]
    on_paper, real = dry_run.build(recipe), fdl.build(recipe.model)
    batch = dry_run.longest_batch(on_paper, recipe, stage, 2)
    found = dry_run.measure(on_paper, batch, None)
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in (*real.parameters(), *real.buffers())}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with FlopCount() as counted, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real.objective(real.encode(batch), batch)
    assert found.forward == sum(counted.forward.values()) and found.backward == sum(counted.backward.values())
    assert found.saved[None] == pytest.approx(sum(storage.nbytes() for place, storage in kept.items() if place not in parameters), rel=0.02)


def test_memory_is_divided_as_training_divides_it():
    whole = priced("coca:paper", *SHALLOW, devices=16).stages[0]
    shared = priced("coca:paper", *SHALLOW, "train.shard=8", devices=16).stages[0]
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(shared.memory, part) == pytest.approx(getattr(whole.memory, part) / 8)
    assert whole.memory.optimizer == 2 * whole.memory.parameters and shared.memory.workspace > whole.memory.workspace
    assert whole.memory.activations == shared.memory.activations and whole.intra_bytes + whole.inter_bytes > 0
    assert shared.inter_bytes < whole.inter_bytes < shared.intra_bytes  # shards stay inside a node, replicas send an eighth
    parted = priced("coca:paper", *SHALLOW, "train.tokens={image: 65536}", devices=16).stages[0]
    assert parted.parts == 4096 * 256 // 65536 == 16 and parted.micro == 256
    assert parted.memory.activations == pytest.approx(whole.memory.activations / 16)
    assert parted.computed == pytest.approx(whole.computed + 4096 * whole.forward)  # GradCache's first forward
    again = priced("coca:paper", *SHALLOW, "train.tokens={image: 65536}", "train.checkpointing=blocks", devices=16).stages[0]
    some = priced("coca:paper", *SHALLOW, "train.tokens={image: 65536}", "train.checkpointing=selective", devices=16).stages[0]
    assert again.memory.activations < some.memory.activations < parted.memory.activations and again.computed > parted.computed
    averaged = priced("coca:paper", *SHALLOW, "train.ema=0.999", devices=16).stages[0]
    assert averaged.memory.total - whole.memory.total == whole.memory.gradients


def test_advice_on_what_does_not_fit_can_be_followed():
    recipe = config.load("coca:paper", SHALLOW)
    found = plan(recipe, Cluster(16), 20e9)
    said = table(found, recipe, Cluster(16), 20e9)
    assert "does not fit; micro-batches of " in said
    advice = said.partition("would: ")[2].splitlines()[0]
    followed = config.load("coca:paper", [*SHALLOW, advice])
    assert ": fits" in table(plan(followed, Cluster(16), 20e9), followed, Cluster(16), 20e9)
    assert "however small the micro-batches" in table(plan(recipe, Cluster(16), 1e8), recipe, Cluster(16), 1e8)


SOON = ("clip", "coca", "brivl", "mae")  # a contrast, two losses, copies and queues, no text; the others are in make test-all


@pytest.mark.parametrize("name", [name if name in SOON else pytest.param(name, marks=pytest.mark.slow) for name in config.names()])
def test_every_published_setting_has_a_price(name):
    recipe = config.load(f"{name}:paper")
    found = plan(recipe, Cluster(8))
    assert found.parameters >= found.trained > 0
    for stage in found.stages:
        assert 0 < stage.backward < 2 * stage.forward * 1.001 and 0 < stage.seconds < 1e4 and stage.memory.activations > 0
    text = table(found, recipe, Cluster(8), 80e9)
    said = [line for line in ("fastest: ", "the objective compares samples of all devices", "no sample is compared") if line in text]
    assert len(said) == 1 and (said[0] == "no sample is compared") == (not found.compares)


def test_the_command_says_which_strategy_wins(capsys):
    asked = ["plan", "clip", "data.batch_size=1048576", "model.embed_dim=1024", "--devices", "256"]
    assert cli.main(asked) == 0
    out = capsys.readouterr().out
    assert "on 32 x 8 devices" in out and "fastest: grouped; least memory: ring" in out
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["strategy"] for one in found["stages"][0]["losses"][0]] == ["grouped", "gather", "ring"]
    assert found["parameters"] > 1e6 and found["cluster"]["devices"] == 256
    memory = found["stages"][0]["memory"]
    assert memory.pop("total") == pytest.approx(sum(memory.values()))


@pytest.mark.parametrize("arguments, message", [
    (["--devices", "12"], "12 devices are no whole number of nodes of 8"),
    (["--devices", "256"], "data.batch_size is 128 for 256 devices"),
    (["train.shard=3"], "train.shard is 3 on 8 devices"),
    (["--memory", "0"], "--memory is 0; it is a positive number of GB"),
    (["model.image.width=7"], "model: "),
    (["schedule.stages.0.frozen=[nose]"], "Clip has no part 'nose'"),
])
def test_what_cannot_be_planned_is_one_line(arguments, message, capsys):
    assert cli.main(["plan", "clip", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


class Reads(Mlp):
    """Looks at what it computed."""

    def encode(self, batch: Batch) -> dict:
        out = super().encode(batch)
        return out if float(out["size_loss"].sum()) > 0 else {}


def test_a_system_that_reads_values_is_refused_by_name():
    recipe = dataclasses.replace(config.load("clip"), model=fdl.Config(Reads, 8))
    with pytest.raises(ConfigError, match="Reads asks for values of features while it computes .*fastvlp profile"):
        plan(recipe, Cluster(8))


def test_epochs_of_no_data_ask_for_samples(capsys):
    assert cli.main(["plan", "clip-vit-b-32", "--devices", "1"]) == 2
    assert "schedule.epochs is 32 of data that is not named; give samples=N" in capsys.readouterr().err
