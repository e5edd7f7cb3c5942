"""Merging as a switch of the towers: one image at a time in plain float64 mathematics says the same, in values and gradients."""

import contextlib
import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

import fastvlp
from fastvlp import config as configuration
from fastvlp.data import pack_images, pack_texts
from fastvlp.models import ImageConfig, ModelConfig, TextConfig, TwoTower, padded
from fastvlp.profile import block_flops, profile
from fastvlp.train import batches, grad_cache
from tests.matching import merged_rows
from tests.train.test_grad_cache import CPU, PATCH, clip, make_batch

SIZES = [(32, 48), (64, 64), (16, 16), (64, 32), (48, 48)]
IMAGE = ImageConfig(width=32, depth=3, heads=2, image_size=64, grid=8, merge=(0.3, 0.0, 0.5))
TEXT = TextConfig(width=32, depth=2, heads=2, vocab_size=50, context_length=12, merge=(0.25,))


def norm(layer, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def plain(tower, x):
    """Tokens [n, C] of one segment -> its feature, and how many tokens are left."""
    size = torch.ones(len(x), dtype=x.dtype)
    for block, share in zip(tower.blocks, tower.config.merged, strict=True):
        q, k, v = F.linear(norm(block.norm1, x), block.qkv.weight, block.qkv.bias).view(len(x), 3, 2, 16).unbind(1)
        weight = torch.exp(torch.einsum("nhd,mhd->hnm", q, k) / 4) * size
        mixed = torch.einsum("hnm,mhd->nhd", weight / weight.sum(-1, keepdim=True), v).reshape(len(x), 32)
        x = x + mixed @ block.proj.weight.T + block.proj.bias
        rows = merged_rows(k.detach().mean(1), share)
        x = torch.stack([(x[row] * size[row, None]).sum(0) / size[row].sum() for row in rows])
        size = torch.stack([size[row].sum() for row in rows])
        x = x + (norm(block.norm2, x) @ block.up.weight.T + block.up.bias).clamp_min(0).square() @ block.down.weight.T + block.down.bias
    return (norm(tower.norm_out, x) * size[:, None]).sum(0) / size.sum() @ tower.projection, len(x)


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("seed", range(3))
def test_a_merging_tower_equals_a_loop_over_its_segments(kind, seed):
    torch.manual_seed(seed)
    model = TwoTower(ModelConfig(embed_dim=24, image=IMAGE, text=TEXT)).double()
    tower = getattr(model, kind)
    if kind == "image":
        packed = pack_images([torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in SIZES], 16)
        embedded = tower.embed(packed.x, packed.pos)
        left = [3, 6, 1, 3, 4]  # of 6, 16, 1, 8 and 9: without the whole part of 0.3 of them, and then of a half
    else:
        packed = pack_texts([torch.randint(0, 50, (n,)) for n in (3, 12, 1, 7, 7)])
        embedded = tower.embed(packed.x, packed.pos[:, 0].long())
        left = [3, 7, 1, 5, 5]
    found = tower(packed)
    expected, counts = zip(*(plain(tower, x) for x in embedded.split(packed.lengths.tolist())), strict=True)
    assert list(counts) == left
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)
    upstream, leaves = torch.randn_like(found), list(tower.parameters())
    ours, theirs = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (found, torch.stack(expected)))
    for (name, _), one, other in zip(tower.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_a_share_that_rounds_down_to_nothing_merges_nothing():
    """It takes the other way through the block, with the same weights under the same names."""
    torch.manual_seed(0)
    plain_config = ModelConfig(embed_dim=24, image=dataclasses.replace(IMAGE, merge=()), text=dataclasses.replace(TEXT, merge=()))
    model = TwoTower(plain_config)
    tiny = TwoTower(dataclasses.replace(plain_config, image=dataclasses.replace(IMAGE, merge=(0.01,))))
    assert model.state_dict().keys() == tiny.state_dict().keys()
    tiny.load_state_dict(model.state_dict())
    images = pack_images([torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in SIZES], 16)
    torch.testing.assert_close(tiny.image(images), model.image(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_micro_batches_merge_the_same_tokens(keep):
    """GradCache computes every micro-batch twice, and in other company than the whole batch: the same plan, the same gradient."""
    values = []
    for budgets in ((None, None), (20, 9)):
        torch.manual_seed(1)
        image = ImageConfig(width=16, depth=2, heads=2, patch_size=PATCH, image_size=16, merge=(0.4,))
        text = TextConfig(width=16, depth=2, heads=2, vocab_size=50, context_length=8, merge=(0.0, 0.3))
        model = TwoTower(ModelConfig(embed_dim=8, image=image, text=text)).double()
        micro = batches.split(make_batch(), batches.Stage(16, keep), PATCH, *budgets, CPU)
        loss = grad_cache.backward(grad_cache.Towers(model), model, micro, clip, contextlib.nullcontext, lambda x: x)
        values.append({"loss": loss} | {name: p.grad for name, p in model.named_parameters()})
    assert len(micro.images) > 1 and len(micro.texts) > 1
    for name, expected in values[0].items():
        torch.testing.assert_close(values[1][name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_files_recipes_and_overrides_carry_the_shares(tmp_path):
    model = TwoTower(ModelConfig(embed_dim=24, image=IMAGE, text=TEXT))
    model.save(tmp_path)
    assert fastvlp.load(tmp_path).config == model.config
    description = json.loads((tmp_path / "model.json").read_text())
    del description["image"]["merge"], description["text"]["merge"]  # as an older version wrote it
    (tmp_path / "model.json").write_text(json.dumps(description))
    assert fastvlp.load(tmp_path).config.image.merge == ()
    made = configuration.load("mini", ["model.image.merge=[0, 0.3, 0, 0.3, 0, 0]", "model.text.merge=0.1"])
    assert made.model.image.merged == (0, 0.3, 0, 0.3, 0, 0) and made.model.text.merged == (0.1,) * 4
    assert configuration.from_dict(configuration.to_dict(made)) == made
    assert configuration.differences(configuration.load("mini"), made)[:2] == [
        "model.image.merge.0: None -> 0.0", "model.image.merge.1: None -> 0.3"]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    ("model.image.merge=[0.1, 0.1]", r"merge is \[0.1, 0.1\]; shares from 0 to 0.5 .* each of the 6 blocks or one for all"),
    ("model.image.merge=0.6", "from 0 to 0.5"),
    ("model.image.merge=much", "a number is needed"),
])  # fmt: skip
def test_wrong_shares_are_refused(change, message):
    with pytest.raises(configuration.ConfigError, match=message):
        configuration.load("mini", [change])


def test_what_merging_cannot_mean_is_refused():
    with pytest.raises(ValueError, match="causal: false and pool: mean"):
        TextConfig(merge=(0.1,), causal=True)
    with pytest.raises(ValueError, match="use the packed tower"):
        padded.encode_text(TwoTower(ModelConfig(text=TEXT)).text, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))


def test_the_profile_counts_the_tokens_that_are_left():
    layers = profile(configuration.load("mini", ["data.batch_size=8", "model.image.merge=[0.5, 0, 0, 0, 0, 0]"]))
    before, after = (layer for layer in layers if (layer.stage, layer.tower) == (0, "image") and layer.name in ("block 1", "block 2"))
    assert 0.5 <= after.tokens / before.tokens < 0.6 and after.flops < before.flops
    n, m = torch.tensor([8, 5]), torch.tensor([4, 3])
    assert block_flops(n, IMAGE, m) == 8 * 32 * 32 * 13 + 4 * 32 * 128 * 7 + 4 * 32 * (64 + 25)
