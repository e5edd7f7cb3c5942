"""Every recipe that ships: trained for a few steps by the command line, built at the paper's size, and described."""

import json
from types import SimpleNamespace

import fiddle as fdl
import pytest
import torch

from fastvlp import cli, config
from fastvlp.data.fields import bind
from fastvlp.systems.system import System
from fastvlp.train import Trainer, plots
from tests.train.conftest import COLOURS, log_lines, write_shard

TOWERS = {part: {"width": 32, "depth": 1, "heads": 2} for part in ("image", "text")}
IMAGE, JOINT = {"image": TOWERS["image"]}, {"width": 32, "depth": 1, "heads": 2}
EMBEDDINGS = {part: {"width": 32} for part in ("image", "text")}
LM = {**EMBEDDINGS, "joint": JOINT}
DEEP = {**LM, "joint": {**JOINT, "depth": 6}}
SMALL = {
    "adem_vl": {**IMAGE, "lm": LM, "grids": [2, 1], "hidden": 8, "alpha": 1.0, "beta": 1.0},
    "aim": {**IMAGE, "head_width": 32},
    "align": {**TOWERS, "embed_dim": 16},
    "albef": {**TOWERS, "fusion": JOINT, "embed_dim": 16},
    "bert": {"text": TOWERS["text"]},
    "blip2": {**IMAGE, "qformer": {"encoder_width": 32, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
              "lm": LM},
    "brivl": {**TOWERS, "embed_dim": 16, "queue": 32},
    "clip": {**TOWERS, "embed_dim": 16},
    "coca": {**TOWERS, "decoder": {**JOINT, "source": 32}, "embed_dim": 16},
    "dcd": {**TOWERS, "teacher": LM, "embed_dim": 16, "drawn": 5, "hard": 2},
    "distilbert": {"text": TOWERS["text"], "teacher": {"text": {**TOWERS["text"], "depth": 2}}},
    "dlip": {**TOWERS, "teacher": {**TOWERS, "embed_dim": 24}, "embed_dim": 16},
    "ep_alm": {"image": {**TOWERS["image"], "depth": 2}, "lm": DEEP},
    "fiber": {part: {**tower, "depth": 2} for part, tower in TOWERS.items()},
    "filip": {**TOWERS, "embed_dim": 16},
    "flame": {**IMAGE, "lm": {**LM, "joint": {**JOINT, "depth": 2}}, "hidden": 32},
    "jina_clip": {**TOWERS, "embed_dim": 32, "prefixes": [8, 16, 32]},
    "lexlip": TOWERS,
    "lit": {**TOWERS, "embed_dim": 16},
    "llama_fusion": {"image": EMBEDDINGS["image"], "lm": LM},
    "m2_encoder": {**TOWERS, "embed_dim": 16},
    "mae": {**IMAGE, "decoder": {"width": 16, "depth": 1, "heads": 2}},
    "navit": {**TOWERS, "image": {**TOWERS["image"], "heads": 4}, "embed_dim": 16},
    "pix2struct": {**IMAGE, "decoder": JOINT},
    "proto_clip": {**TOWERS, "embed_dim": 16, "clusters": 4, "hidden": 32, "projection": 16},
    "pyramid_drop": {**DEEP, **IMAGE},
    "rwkv_clip": {**TOWERS, "embed_dim": 16},
    "scaling_down": {**TOWERS, "embed_dim": 16},
    "siglip": {**TOWERS, "embed_dim": 16},
    "simvlm": LM,
    "slip": {**TOWERS, "embed_dim": 16, "hidden": 32, "projection": 16},
    "solo": LM,
    "unified_vlp": LM,
    "vilt": LM,
}


def changes(values: dict, path: str) -> list[str]:
    return [line for key, value in values.items() for line in
            (changes(value, f"{path}.{key}") if isinstance(value, dict) else [f"{path}.{key}={value}"])]


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    (folder / "classes.txt").write_text("\n".join(COLOURS))
    return write_shard(folder / "boxes.tar", 24)


def test_every_recipe_is_tested():
    assert config.names() == sorted(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_twenty_steps(name, boxes, tmp_path, monkeypatch, capsys):
    """Of a narrow model, on small pictures: losses that fall, and every measure that the recipe asks for."""
    monkeypatch.setattr(plots, "available", lambda: False)
    measures = config.load(name).eval
    asked = [key for key in ("zero_shot", "retrieval", "captions", "pairs", "knn", "probe") if getattr(measures, key)]
    assert asked, "a recipe measures something"
    sets = [key for key in (*asked, "probe_train") if getattr(measures, key)]
    command = ["train", name, f"data.train=[{boxes}]", "data.batch_size=8", "data.workers=0", "eval.workers=0", "schedule.steps=20",
               "schedule.warmup=2", "optim.lr=3e-3", f"run.dir={tmp_path}", "run.device=cpu", "run.name=small",
               *changes(SMALL[name], "model"), *(f"eval.{key}=[{boxes}]" for key in sets), f"eval.classes={boxes.parent / 'classes.txt'}"]
    idle, update = set(), Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda trainer, finite: idle.update(
        name for name, p in trainer.system.named_parameters() if p.requires_grad and p.grad is None) or update(trainer, finite))
    assert cli.main(command) == 0, capsys.readouterr().err
    assert not idle, "weights that take no part"
    losses = [line["loss"] for line in log_lines(tmp_path / "small") if "loss" in line]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    assert all("left_out" not in results[key] and results[key]["n"] == 24 for key in asked)
    assert results["nonfinite_steps"] == 0 and results["samples"] == 160


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_papers_size(name):
    """The published setting can be built (on no device) and its fields fit it; both functions say what they are."""
    for function in ("recipe", "paper"):
        assert len(config.function(f"{name}:{function}").__doc__.split()) > 4
    made = config.load(f"{name}:paper")
    assert made.steps >= 1000 and made.steps * made.data.batch_size > 200_000
    assert config.from_dict(config.to_dict(made)) == made
    with torch.device("meta"):
        system = fdl.build(made.model)
    assert isinstance(system, System)
    assert bind(made.data.fields, system, SimpleNamespace(vocab_size=1000, context_length=None)).keys() == made.data.fields.keys()
    assert sum(p.numel() for p in system.parameters()) > 80e6
