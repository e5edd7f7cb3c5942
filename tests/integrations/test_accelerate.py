"""What ``fastvlp.accelerate`` is given and may not get wrong in silence: masks, hidden states, dropout, shared blocks, copies, wrappers."""

import copy
import importlib
import io

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import fastvlp
from tests.integrations import models
from tests.integrations.test_towers import encoded, gradients, made, value

N = 17  # tokens of models.timm_class: a class token and 16 patches


@pytest.fixture(scope="module", autouse=True)
def installed():
    models.libraries()


def padding(fill=None):
    """The mask of images of 17, 9 and 13 tokens: boolean, or with ``fill`` added to the scores of the others."""
    real = torch.arange(N) < torch.tensor([17, 9, 13])[:, None]
    mask = real[:, None, None]
    return mask if fill is None else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, fill)


def bias(*shape):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


MASKS = {
    "bool": padding(), "minus inf": padding(-torch.inf), "finfo": padding(torch.finfo(torch.float64).min), "-1e9": padding(-1e9),
    "-1e4": padding(-1e4), "each query": padding(-1e9).expand(3, 1, N, N), "one for all": torch.arange(N).expand(N, N) < 12,
    "keys": bias(3, 1, 1, N), "keys and padding": bias(3, 1, 1, N) + padding(-1e9), "keys of heads": bias(1, 4, 1, N).expand(3, 4, N, N),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("options", [{"attention": "packed"}, {"pack": True}], ids=str)
def test_masks_are_applied(name, options):
    model, batch, _ = made(models.timm_class)
    plain, want = model(batch), model(batch, attn_mask=MASKS[name])
    fastvlp.accelerate(model, **options)
    torch.testing.assert_close(model(batch, attn_mask=MASKS[name]), want, rtol=1e-9, atol=1e-9)
    assert (want - plain).abs().max() > 1e-3


def test_a_bias_of_keys_has_its_gradient():
    model, batch, _ = made(models.timm_class)
    found = []
    for accelerated in (False, True):
        if accelerated:
            fastvlp.accelerate(model, attention="packed")
        mask = bias(3, 1, 1, N).requires_grad_()
        model(batch, attn_mask=mask).square().sum().backward()
        found.append(mask.grad)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_masks_of_merging():
    """However padding is written, the same images; a bias, which merged tokens cannot have, is refused."""
    model, batch, _ = made(models.timm_class)
    fastvlp.accelerate(model, merge=2)
    want = model(batch, attn_mask=padding())
    assert not torch.allclose(want, model(batch))
    for name in ("minus inf", "finfo", "-1e9", "-1e4", "each query"):
        assert torch.equal(model(batch, attn_mask=MASKS[name]), want), name
    with pytest.raises(ValueError, match="mask adds to the scores of keys, which merge="):
        model(batch, attn_mask=MASKS["keys"])


@pytest.mark.parametrize("options", [{"attention": "packed"}, {"pack": True}, {"merge": 2}], ids=str)
def test_masks_that_are_refused(options):
    model, batch, _ = made(models.timm_class)
    fastvlp.accelerate(model, **options)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    learned = torch.zeros(1, 4, N, N, dtype=torch.float64, requires_grad=True)
    integers, short = torch.ones(3, 1, 1, N, dtype=torch.int64), torch.ones(1, 1, 1, 5)
    for mask in (bias(3, 1, N, N), causal, learned, padding(float("nan")), integers, short):
        with pytest.raises(ValueError, match="attention mask"):
            model(batch, attn_mask=mask)
    clip, images, tower = made(models.open_clip_clip)
    fastvlp.accelerate(clip, **options)
    block = models.blocks_of(tower)[0]
    x = torch.randn(3, N, models.WIDTH, dtype=torch.float64)
    if options != {"pack": True}:
        with pytest.raises(ValueError, match="called with argument 2, argument 3, which is not supported"):
            block(x, x, x)
    with pytest.raises(ValueError, match="mask of this open_clip block is torch.bool"):
        block(x, attn_mask=causal)


@pytest.mark.parametrize("build", [models.clip, models.siglip, models.vit], ids=lambda build: build.__name__)
def test_hidden_states_of_merged_tokens(build):
    """After each block, every patch has the token that it went to in that block."""
    model, batch, tower = made(build)
    prefix = 0 if build is models.siglip else 1
    blocks, first = copy.deepcopy(models.blocks_of(tower)), tower(**batch, output_hidden_states=True).hidden_states[0]
    fastvlp.accelerate(model, merge=3)
    states = tower(**batch, output_hidden_states=True).hidden_states
    assert len(states) == models.DEPTH + 1
    for depth in range(1, models.DEPTH + 1):
        want = torch.stack([encoded(image, blocks[:depth], [3] * depth, prefix) for image in first])
        torch.testing.assert_close(states[depth], want, rtol=1e-9, atol=1e-9)


def test_hidden_states_of_dropped_patches_are_refused():
    _, batch, tower = made(models.clip)
    fastvlp.accelerate(tower, drop=0.5)
    assert tower(**batch, output_hidden_states=True).hidden_states[1].shape[1] == N
    with pytest.raises(ValueError, match="output_hidden_states=True asks for all patches"):
        tower.train()(**batch, output_hidden_states=True)


def test_reentrant_checkpointing():
    """Right where tensors flow between blocks, refused by name where more does."""
    for options, right in (({"attention": "packed"}, True), ({"merge": 2}, False)):
        model, batch, tower = made(models.vit)
        model.train()
        fastvlp.accelerate(model, **options)
        want = gradients(model, batch)[1]
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        if right:
            found = gradients(model, batch)[1]
            assert found.keys() == want.keys() and all(torch.allclose(found[name], want[name]) for name in want)
        else:
            with pytest.warns(UserWarning, match="requires_grad"), pytest.raises(ValueError, match="use_reentrant=False"):
                model(batch)


def dropping(build):
    if build is models.timm_class:
        return lambda: models._timm("vit_tiny_patch16_224", attn_drop_rate=0.3)
    if build is models.vit:
        return lambda: models._transformers("ViT", attention_probs_dropout_prob=0.3)
    return lambda: models._transformers("CLIP", attention_dropout=0.3)


@pytest.mark.parametrize("build", [models.timm_class, models.vit, models.clip], ids=lambda build: build.__name__)
def test_attention_dropout(build):
    """The same weights are dropped as in the untouched model from the same seed; merging drops too, and evaluation does not."""
    model, batch, _ = made(dropping(build))

    def train():
        torch.manual_seed(3)
        return gradients(model.train(), batch)

    evaluated, (want, grads) = value(model(batch)), train()
    report = fastvlp.accelerate(model, attention="packed")
    torch.testing.assert_close(value(model.eval()(batch)), evaluated)
    found, others = train()
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    for name, gradient in grads.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    report.restore()
    fastvlp.accelerate(model, merge=2)
    assert not torch.allclose(train()[0], value(model(batch))), "two draws"
    assert torch.equal(value(model.eval()(batch)), value(model(batch)))


def test_attention_dropout_without_padding():
    model, batch, tower = made(lambda: (*models._transformers("Siglip2", num_patches=16, attention_dropout=0.3)[:1], *models.siglip2()[1:]))
    del tower
    fastvlp.accelerate(model, merge=1)
    expected = value(model(batch))
    torch.manual_seed(0)
    draws = torch.stack([value(model.train()(batch)).detach() for _ in range(3)])
    assert draws.isfinite().all() and not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], expected)


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"merge": 1}], ids=str)
def test_dropped_patches_of_padded_batches(options):
    """SigLIP 2: blocks and pooling see max(1, int(n (1 - drop))) of the n real patches of each image, in training alone."""
    model, batch, tower = made(models.siglip2)
    stock, _, stock_tower = made(models.siglip2)
    seen = []
    tower.head.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    first = tower.encoder.layers[0].layer_norm1
    rows = []
    first.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    fastvlp.accelerate(model, drop=0.4, **options)
    fastvlp.accelerate(stock, **(options or {"merge": 0}))
    assert torch.equal(value(model(batch)), value(stock(batch)))
    torch.manual_seed(0)
    output = value(model.train()(batch))
    real, kept = batch["pixel_attention_mask"].bool(), seen[-1].bool()
    assert not (kept & ~real).any() and kept.sum(1).tolist() == [max(1, int(n * 0.6)) for n in real.sum(1).tolist()]
    assert rows[-1] == (int(kept.sum()), models.WIDTH), "only the kept patches are computed"
    want = value(stock(batch | {"pixel_attention_mask": kept.long()}))
    torch.testing.assert_close(output, want, rtol=1e-9, atol=1e-9)
    model(batch)
    assert not torch.equal(seen[-1], seen[-2])
    with pytest.raises(ValueError, match="drop= needs pixel_attention_mask"):
        tower(batch["pixel_values"], spatial_shapes=batch["spatial_shapes"], pixel_attention_mask=None)


def test_dropping_twice_or_where_all_patches_are_needed_is_refused():
    timm, transformers = importlib.import_module("timm"), importlib.import_module("transformers")
    with pytest.raises(ValueError, match="drops 25% of its patches itself .patch_drop_rate"):
        fastvlp.accelerate(timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.25), drop=0.5)
    with pytest.raises(ValueError, match="patch_dropout"):
        fastvlp.accelerate(models._open_clip("CLIP", patch_dropout=0.5)[0], drop=0.5)
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32,
                                    patch_size=8, encoder_stride=8)  # fmt: skip
    model = transformers.ViTForMaskedImageModeling(config)
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling rebuilds every patch"):
        fastvlp.accelerate(model, drop=0.5)
    fastvlp.accelerate(model, merge=2)
    assert model(models.images().float()).reconstruction.shape == (3, 3, 32, 32)


def test_merging_nothing_is_said():
    model, _, _ = made(models.timm_class)
    with pytest.warns(UserWarning, match=r"merge=0.05 merges nothing .*an image has 17, 1 of them protected"):
        report = fastvlp.accelerate(model, merge=0.05)
    assert str(report).count("merges nothing (asked for 5% of the tokens)") == models.DEPTH and report.flops_saved == 0


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_blocks_that_stand_twice():
    towers = [made(models.timm_class)[0] for _ in range(3)]
    towers[1].blocks = towers[0].blocks
    model, seen = Two(*towers[:2]).train(), []
    report = fastvlp.accelerate(model, drop=0.5)
    model.first.blocks[1].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model(models.images())
    assert seen == [9, 9] and len(report.replaced) == 2 * models.DEPTH
    report.restore()
    towers[2].blocks = nn.Sequential(*[towers[2].blocks[0]] * 3)
    with pytest.raises(ValueError, match=r"blocks.1 is a block that stands elsewhere in the model too|blocks.2 is a block"):
        fastvlp.accelerate(towers[2], merge=2)
    assert not any("_fastvlp_options" in vars(module) for module in towers[2].modules())


def test_a_tower_that_is_left_out_is_said():
    timm = importlib.import_module("timm")
    other = timm.create_model("vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    report = fastvlp.accelerate(Two(made(models.timm_class)[0], other), merge=2)
    assert "left as it is: second (VisionTransformer): blocks.0 has a ParallelThingsBlock" in str(report)


def test_copies_are_restored():
    model, batch, _ = made(models.timm_class)
    want = model(batch)
    report = fastvlp.accelerate(model, merge=3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), nn.parallel.DataParallel(copy.deepcopy(model)).module):
        assert fastvlp.restore(twin) is twin and torch.equal(twin(batch), want)
        assert {type(module) for module in twin.modules()} == {type(module) for module in made(models.timm_class)[0].modules()}
        fastvlp.accelerate(twin, merge=3)
        assert torch.equal(twin(batch), model(batch))
    report.restore()
    assert torch.equal(model(batch), want) and torch.equal(fastvlp.restore(model)(batch), want)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False], ids=["accelerated first", "wrapped first"])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "checkpoint_wrapper"])
def test_wrapped_blocks(one_process, kind, before):
    wrapper = importlib.import_module("torch.distributed.algorithms._checkpoint.checkpoint_wrapper").checkpoint_wrapper
    for build in (models.timm_class, models.siglip2):
        model, batch, tower = made(build)
        plain = value(model(batch))
        report = fastvlp.accelerate(model, merge=2)
        want, grads = gradients(model, batch)
        if not before:
            report.restore()
        holder = tower.blocks if build is models.timm_class else tower.encoder.layers
        for place, block in enumerate(holder):
            if kind == "fsdp2":
                fully_shard(block)
            else:
                device = {"device_id": torch.device("cpu"), "use_orig_params": True}
                holder[place] = wrapper(block) if kind == "checkpoint_wrapper" else FullyShardedDataParallel(block, **device)
        if not before:
            fastvlp.accelerate(model, merge=2)
        output, found = gradients(model, batch)
        torch.testing.assert_close(output, want, rtol=1e-9, atol=1e-9)
        assert len(found) == len(grads)
        torch.testing.assert_close(value(fastvlp.restore(model)(batch)), plain, rtol=1e-9, atol=1e-9)


def test_sizes_of_merged_tokens_are_not_rounded(one_process):
    """FSDP2's mixed precision casts what flows between blocks to bfloat16, in which 257 is 256."""
    model, batch, tower = made(models.timm_class)
    model.float()
    fastvlp.accelerate(model, merge=2)
    for module in (*tower.blocks, model):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    tower.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output.size))
    model(batch.float())
    assert not seen[0].is_floating_point() and seen[0].sum() == 3 * N
