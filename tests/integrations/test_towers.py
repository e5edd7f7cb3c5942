"""``fastvlp.accelerate`` on image towers of timm, open_clip and transformers, against a loop over images in float64."""

import copy
import io

import pytest
import torch
from torch import nn

import fastvlp
from fastvlp.integrations import blocks
from tests.integrations import models

PREFIX = {
    models.timm_class: 1, models.deit_distilled: 2, models.timm_registers: 3, models.naflexvit: 4, models.open_clip_clip: 1,
    models.open_clip_coca: 1, models.open_clip_custom_text: 1, models.open_clip_timm: 1, models.clip: 1, models.siglip: 0,
    models.siglip2: 0, models.vit: 1,
}  # fmt: skip
PADDED = (models.naflexvit, models.siglip2)
every_model = pytest.mark.parametrize("build", PREFIX, ids=lambda build: build.__name__)


@pytest.fixture(scope="module", autouse=True)
def installed():
    models.libraries()


def made(build):
    """A model, its batch and its tower, with weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model, batch, tower = build()
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, batch, tower


def value(output):
    return output[0] if isinstance(output, tuple) else output


def gradients(model, batch):
    model.zero_grad()
    output = value(model(batch))
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def merged(metric, r, protected):
    """ToMe's definition for one image: the tokens of each token that is left, in ToMe's order (registers, which it lacks: in place)."""
    n = len(metric)
    unit = metric / metric.norm(dim=1, keepdim=True)
    even, odd = range(0, n, 2), range(1, n, 2)
    free = [j for j in odd if j >= protected]
    best = {i: max(free, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in even if i >= protected and free}
    ranked = sorted(best, key=lambda i: -float(unit[i] @ unit[best[i]]))
    gone = ranked[: int(n * r) if isinstance(r, float) else r]
    stay = [i for i in (ranked if best and protected == 0 else even) if i not in gone]
    order = sorted([*stay, *odd]) if protected > 2 else [*stay, *odd]
    if protected == 2:  # the class and the distillation token first
        order = [0, 1, *(i for i in order if i > 1)]
    return [[i, *(j for j in gone if best[j] == i)] for i in order]


def encoded(x, blocks, schedule, protected):
    """One image [n, C] through blocks that merge; each token gets back the row that it went to."""
    size, at = torch.ones(len(x), dtype=x.dtype), torch.arange(len(x))
    for block, r in zip(blocks, schedule, strict=True):
        qkv, project, mlp = models.parts(block)
        q, k, v = qkv(x)
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5 + size.log()
        x = project(x, torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1))
        if r:
            rows = merged(k.detach().mean(1), r, protected)
            x = torch.stack([(x[row] * size[row, None]).sum(0) / size[row].sum() for row in rows])
            size = torch.stack([size[row].sum() for row in rows])
            where = {token: place for place, row in enumerate(rows) for token in row}
            at = torch.tensor([where[int(token)] for token in at])
        x = mlp(x)
    return x[at]


def by_the_loop(model, tower, real, schedule, protected):
    """Let the last block of ``model`` return the loop's result for what the first one gets."""
    blocks, seen = models.blocks_of(tower), []

    def replace(module, args, output):
        (x,) = seen
        out = torch.zeros_like(x)
        for row in range(len(x)):
            tokens = torch.arange(x.shape[1]) if real is None else real[row].nonzero()[:, 0]
            out = out.index_put((torch.tensor(row), tokens), encoded(x[row, tokens], blocks, schedule, protected))
        return out

    blocks[0].register_forward_pre_hook(lambda module, args: seen.__setitem__(slice(None), [args[0]]))
    blocks[-1].register_forward_hook(replace)


def real_tokens(build, batch):
    if build is models.naflexvit:
        return nn.functional.pad(batch["patch_valid"], (PREFIX[build], 0), value=True)
    return batch["pixel_attention_mask"].bool() if build is models.siglip2 else None


@every_model
def test_nothing_switched_on(build):
    model, batch, _ = made(build)
    expected, grads = gradients(model, batch)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="nothing was asked for.*pass merge=, drop=, attention='packed' or pack=True"):
        fastvlp.accelerate(model)
    report = fastvlp.accelerate(model, merge=0)
    assert report.replaced and report.flops_saved == 0 and list(model.state_dict()) == keys
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    output, found = gradients(model, batch)
    assert torch.equal(output, expected) and found.keys() == grads.keys() and all(torch.equal(found[name], grads[name]) for name in grads)
    with pytest.raises(RuntimeError, match="accelerated already"):
        fastvlp.accelerate(model, merge=1)
    report.restore()
    report.restore()
    assert [type(module) for module in model.modules()] == kinds and torch.equal(value(model(batch)), expected)


@every_model
@pytest.mark.parametrize("merge", [2, 0.25, [0, 3, 1]], ids=str)
def test_merging_equals_the_loop(build, merge):
    model, batch, _ = made(build)
    stock, _, tower = made(build)
    by_the_loop(stock, tower, real_tokens(build, batch), merge if isinstance(merge, list) else [merge] * models.DEPTH, PREFIX[build])
    expected, grads = gradients(stock, batch)
    untouched = value(made(build)[0](batch))
    report = fastvlp.accelerate(model, merge=merge)
    output, found = gradients(model, batch)
    assert (output - untouched).abs().max() > 1e-4, "merging changed nothing"
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert found.keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    assert build is models.naflexvit or 0.02 < report.flops_saved < 0.7
    report.restore()
    assert torch.equal(value(model(batch)), untouched)


@every_model
@pytest.mark.parametrize("switch", [{"attention": "packed"}, {"pack": True}], ids=str)
def test_packing_computes_the_same(build, switch):
    model, batch, _ = made(build)
    expected, grads = gradients(model, batch)
    fastvlp.accelerate(model, **switch)
    output, found = gradients(model, batch)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for name, gradient in grads.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@every_model
def test_training_with_hooks_and_checkpointing(build):
    """Two batches forward before both go backward, recomputed block by block; hooks see the tokens."""
    model, batch, tower = made(build)
    fastvlp.accelerate(model, merge=2)
    model.train()
    other = {name: x.flip(0) for name, x in batch.items()} if isinstance(batch, dict) else batch.flip(0)

    def both():
        model.zero_grad()
        first, second = value(model(batch)), value(model(other))
        (first.square().sum() + second[1:].tanh().sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = both()
    if hasattr(tower, "gradient_checkpointing_enable"):
        tower.gradient_checkpointing_enable()
    else:
        tower.set_grad_checkpointing(True)
    calls = []
    block = models.blocks_of(tower)[1]
    attention = next(module for name, module in block.named_children() if "attn" in name or name == "attention")
    block.register_forward_hook(lambda module, args, output: calls.append(output[0].shape))
    attention.register_forward_hook(lambda module, args, output: calls.append(value(output).shape))
    found = both()
    assert len(calls) >= 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("build", [models.timm_class, models.open_clip_clip, models.clip, models.vit], ids=lambda build: build.__name__)
def test_compiled(build):
    model, batch, _ = made(build)
    fastvlp.accelerate(model, merge=[2, 0, 0.2])
    expected, grads = gradients(model, batch)
    run = model.get_submodule("model") if build in (models.clip, models.vit) else model
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    output = compiled(**batch).pooler_output if run is not model else value(compiled(batch))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("build", [build for build in PREFIX if build not in PADDED], ids=lambda build: build.__name__)
def test_dropped_patches(build):
    """In training the first block gets a third fewer patches, all there were of them before, and the prefix; in eval all."""
    model, batch, tower = made(build)
    stock, _, stock_tower = made(build)
    seen = {}
    models.blocks_of(stock_tower)[0].register_forward_pre_hook(lambda module, args: seen.__setitem__("stock", args[0]))
    models.blocks_of(tower)[1].register_forward_pre_hook(lambda module, args: seen.__setitem__("second", args[0]))
    first = next(module for name, module in models.blocks_of(tower)[0].named_children() if "norm" in name or "ln" in name)
    first.register_forward_pre_hook(lambda module, args: seen.__setitem__("first", args[0]))
    fastvlp.accelerate(model, drop=0.33)
    assert torch.equal(value(model(batch)), value(stock(batch)))
    model.train()
    value(model(batch)).sum().backward()
    prefix, patches = PREFIX[build], 16
    assert seen["first"].shape[1] == prefix + int(patches * 0.67) == seen["second"].shape[1]
    kept = [[before.tolist().index(row) for row in after.tolist()] for before, after in zip(seen["stock"], seen["first"], strict=True)]
    for places in kept:
        assert places[:prefix] == list(range(prefix)) and places == sorted(set(places))
    assert len(set(map(tuple, kept))) > 1, "each image draws its own"


def test_stochastic_depth_drops_whole_images():
    """Also where padding is left out: the last MLP branch, made to give ones, adds 0 or 1 / keep to all tokens of an image."""
    model, batch, _ = made(lambda: models._timm("naflexvit_base_patch16_gap", drop_path_rate=0.5))
    batch, seen = models.naflexvit()[1], []
    fastvlp.accelerate(model, merge=2)
    model.train()
    last = model.blocks[-1]
    last.norm2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last.ls2.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    last.drop_path2.register_forward_hook(lambda module, args, output: seen.append(output))
    last.register_forward_hook(lambda module, args, output: seen.append(output))
    real, factors = nn.functional.pad(batch["patch_valid"], (4, 0), value=True), set()
    for _ in range(6):
        seen.clear()
        model(batch)
        merged_tokens, drawn, out = seen
        assert drawn.shape == (3, 1)
        for row, factor in enumerate(drawn):
            assert torch.cdist(out[row, real[row]] - factor, merged_tokens).amin(1).max() < 1e-6
            factors.add(round(float(factor), 6))
    assert factors == {0.0, 2.0}


def test_a_whole_model_merges_and_computes_its_loss_without_logits():
    """transformers' CLIPModel: the loss of the merged features, hidden states of every patch, and everything restored."""
    transformers = models.importlib.import_module("transformers")
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = common | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    text = common | {"num_hidden_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).double()
    kinds = [type(module) for module in model.modules()]
    batch = {"input_ids": torch.randint(3, 99, (5, 7)), "pixel_values": models.images(5)}
    report = fastvlp.accelerate(model, merge=3)
    assert [part.path for part in report.replaced][:3] == ["", *(f"vision_model.encoder.layers.0{end}" for end in ("", ".self_attn"))]
    assert [saving.tokens for saving in report.expected] == [(17, 14), (14, 11), (11, 8)]
    assert "merges 3 tokens; saves" in str(report) and "CLIPModel" in str(report)
    output = model(**batch, return_loss=True, output_hidden_states=True)
    assert "logits_per_text" not in output.keys()
    logits, pairs = output.logits_per_text, torch.arange(5)
    expected = (nn.functional.cross_entropy(logits, pairs) + nn.functional.cross_entropy(logits.t(), pairs)) / 2
    torch.testing.assert_close(output.loss, expected, check_dtype=False)
    assert [state.shape[1] for state in output.vision_model_output.hidden_states] == [17] * 4
    report.restore()
    assert [type(module) for module in model.modules()] == kinds


def test_copies_and_files():
    model, batch, _ = made(models.timm_class)
    fastvlp.accelerate(model, merge=2)
    expected = model(batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(batch), expected)
        next(other.blocks.parameters()).data.zero_()
        assert torch.equal(model(batch), expected)


@every_model
def test_low_precision(build):
    """bfloat16 weights, and autocast: the tokens merged may differ by rounding, the features stay near those of float64."""
    model, batch, _ = made(build)
    fastvlp.accelerate(model, merge=1)
    expected, named = value(model(batch)), batch if isinstance(batch, dict) else {"x": batch}
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        cast = copy.deepcopy(model).to(dtype).train()
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in named.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = value(cast(inputs if isinstance(batch, dict) else inputs["x"]))
        found.float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in cast.parameters())
        assert torch.nn.functional.cosine_similarity(found.double().flatten(1), expected.flatten(1)).min() > 0.9


def test_a_batch_without_images():
    model, batch, _ = made(models.timm_class)
    report = fastvlp.accelerate(model, merge=[1, 2, 0.2])
    assert model(batch[:0]).shape == (0, 5)
    assert "merges 1 token; saves" in str(report) and "merges 2 tokens; saves" in str(report)


@pytest.mark.parametrize("norm", [False, True])
def test_intermediates_of_merged_tokens_are_refused(norm):
    model, batch, _ = made(models.timm_class)
    fastvlp.accelerate(model, merge=1)
    with pytest.raises(TypeError, match=r"is no tensor \[B, N, C\]; forward_intermediates .* fastvlp.restore"):
        model.forward_intermediates(batch, norm=norm)


@pytest.mark.parametrize("build", [models.clip, models.siglip, models.vit], ids=lambda build: build.__name__)
def test_attention_weights_of_merged_tokens_are_refused(build):
    model, batch, tower = made(build)
    tower.set_attn_implementation("eager")
    report = fastvlp.accelerate(model, merge=1)
    with pytest.raises(ValueError, match="output_attentions=True asks for weights that packed_attention never has"):
        tower(**batch, output_attentions=True)
    tower.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        tower(**batch)
    report.restore()
    assert len(tower(**batch).attentions) == models.DEPTH


def test_refusals():
    model, batch, _ = made(models.timm_class)
    for options, message in (
        ({"merge": -1}, "merge is -1"), ({"merge": 1.5}, "merge is 1.5"), ({"merge": [1, 2]}, "has 2 numbers; this tower has 3"),
        ({"merge": float("nan")}, "merge is nan"), ({"merge": 1, "logits": True}, "group= and logits= are for the loss of"),
        ({"drop": 1.0}, "drop is 1.0"), ({"attention": "flash"}, "'flash' is unknown"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fastvlp.accelerate(model, **options)
    assert type(model.blocks[0]).__name__ == "Block" and not hasattr(model.blocks[0], "_fastvlp_options")
    with pytest.raises(ValueError, match="not for NaFlexVit; give it patch_drop_rate"):
        fastvlp.accelerate(made(models.naflexvit)[0], drop=0.5)
    with pytest.raises(TypeError, match="nothing to replace in Linear"):
        fastvlp.accelerate(nn.Linear(2, 2), merge=1)
    import timm

    other = timm.create_model("vit_relpos_small_patch16_224", depth=1)
    with pytest.raises(TypeError, match="nothing to replace"):
        fastvlp.accelerate(other, merge=1)
    post = timm.create_model("vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    with pytest.raises(TypeError, match="has a ParallelThingsBlock; Block is supported"):
        fastvlp.accelerate(post, merge=1)
    fastvlp.accelerate(model, pack=True)
    hidden = torch.zeros(3, 1, 17, 17, dtype=torch.bool)
    hidden[:, :, 0] = True
    with pytest.raises(ValueError, match="hides more than padding"):
        model.blocks[0](torch.randn(3, 17, 32).double(), attn_mask=~torch.tril(hidden))


@every_model
def test_sums_and_norms_are_one_pass_with_the_same_numbers(build, monkeypatch):
    """To the bit on the CPU, where nothing merges; a norm that somebody watches is called."""
    model, batch, _ = made(build)
    calls, watched, fused = [], [], blocks.residual_norm
    monkeypatch.setattr(blocks, "residual_norm", lambda *args, **options: calls.append(args) or fused(*args, **options))
    fastvlp.accelerate(model, attention="packed")
    with torch.no_grad():
        once, count = value(model(batch)), len(calls)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(lambda module, args: watched.append(module))
        apart = value(model(batch))
    assert torch.equal(once, apart) and count and len(calls) == count and watched
