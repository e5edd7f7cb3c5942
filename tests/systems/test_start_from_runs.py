"""``run.start``: whose weights a system takes, and for which of its parts."""

import pytest
import torch
from safetensors.torch import save_file

from fastvlp import config
from fastvlp.config import ConfigError
from fastvlp.layers import packed_attend
from fastvlp.systems.files import take_weights
from tests.systems.small import make, whole


def saved(folder, name, shift=1.0):
    """A system of other weights than those of a fresh one, as a run leaves it."""
    system = make(name)
    for parameter in system.parameters():
        parameter.data += shift * torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter)
    (folder / "model").mkdir(parents=True)
    save_file(system.state_dict(), str(folder / "model" / "model.safetensors"))
    return system


def same(part, whole):
    theirs = whole.state_dict()
    return [name for name, value in part.state_dict().items() if name in theirs and torch.equal(value, theirs[name])]


@pytest.mark.parametrize("captioner", ["simvlm", "unified_vlp"])
def test_a_captioner_is_the_language_model_of_a_bridge(captioner, tmp_path):
    """All of it: the bridge's own tower, of the same names and shapes as the captioner's, stays as it was."""
    theirs, system, fresh = saved(tmp_path, captioner), make("blip2"), make("blip2")
    said = take_weights(system, str(tmp_path))
    assert same(system.lm, theirs) == list(system.lm.state_dict())
    assert same(system.image, fresh.image) == list(fresh.image.state_dict()) and same(system.qformer, fresh.qformer)
    assert ("not used of theirs: kinds" in said) == (captioner == "unified_vlp") and "fresh in image, qformer, queries, to_lm" in said


@pytest.mark.parametrize("name", ["adem_vl", "ep_alm", "flame"])
def test_every_bridge_takes_a_captioner(name, tmp_path):
    theirs, system = saved(tmp_path, "simvlm"), make(name)
    take_weights(system, tmp_path)
    assert {"text.tokens.weight", "joint.blocks.0.qkv.weight", "words.weight"} <= set(same(system.lm, theirs))


def test_a_captioner_that_is_taken_apart(tmp_path):
    """LlamaFusion says of words alone what the captioner says, and patches start with the same blocks."""
    theirs, system, texts = saved(tmp_path, "simvlm"), make("llama_fusion"), whole().text
    assert "not used" not in take_weights(system, tmp_path)
    alone = theirs.joint(theirs.text.embed(texts).replace(pos=None), causal=True).x
    x = system.text.embed(texts).x
    rows = torch.arange(len(x)), torch.arange(0)
    for block in system.blocks:
        x = block(x, packed_attend(texts.replace(x=x, pos=None), causal=True), rows)
        assert all(torch.equal(a, b) for a, b in zip(block.kind_0.parameters(), block.kind_1.parameters(), strict=True))
    torch.testing.assert_close(system.norm_out(x), alone)
    assert torch.equal(system.words.weight, theirs.words.weight)


def test_parts_come_from_folders_of_their_own(tmp_path):
    """A tower from CLIP, a language model from a captioner; and each again from a bridge that has both."""
    towers, captioner = saved(tmp_path / "clip", "clip"), saved(tmp_path / "simvlm", "simvlm", 2.0)
    system = make("blip2")
    said = take_weights(system, {"image": str(tmp_path / "clip"), "lm": str(tmp_path / "simvlm")})
    assert same(system.image, towers.image) == list(system.image.state_dict())
    assert same(system.lm, captioner) == list(system.lm.state_dict())
    assert said.count("took") == 2 and f"tensors of image from {tmp_path}" in said and said.endswith("fresh in qformer, queries, to_lm")
    (tmp_path / "blip2").mkdir()
    save_file(system.state_dict(), str(tmp_path / "blip2" / "model.safetensors"))
    again = make("ep_alm")
    take_weights(again, {"lm": str(tmp_path / "blip2")})
    assert same(again.lm.text, captioner.text) == list(captioner.text.state_dict()) and not same(again.image, towers.image)


def test_a_run_of_towers_is_no_language_model(tmp_path):
    towers, system = saved(tmp_path, "clip"), make("blip2")
    take_weights(system, tmp_path)
    assert same(system.image, towers.image) == list(system.image.state_dict())
    assert same(system.lm, make("blip2").lm) == list(system.lm.state_dict())


def test_what_does_not_fit_is_refused(tmp_path):
    saved(tmp_path, "clip")
    with pytest.raises(ConfigError, match="run.start names tower, which is no part of this model with weights; its parts are image, lm"):
        take_weights(make("blip2"), {"tower": str(tmp_path)})
    with pytest.raises(ConfigError, match="nothing in .* has the name and the shape"):
        take_weights(make("blip2"), {"qformer": str(tmp_path)})


def test_a_change_may_name_parts():
    made = config.load("blip2", ["run.start={image: runs/clip, lm: runs/simvlm}"])
    assert made.run.start == {"image": "runs/clip", "lm": "runs/simvlm"} and config.from_dict(config.to_dict(made)) == made
    assert config.load("blip2", ["run.start=runs/clip"]).run.start == "runs/clip" and config.load("blip2").run.start is None
