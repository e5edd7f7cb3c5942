"""Towers of open_clip, timm and transformers: their tokens are the hidden states of the library's own model, picture by picture.

Models are small and random, in float64; nothing is downloaded.
"""

import copy
import importlib

import pytest
import torch
from torch import nn

from benchmarks.rivals import import_open_clip
from fastvlp.data import pack_images, pack_texts
from fastvlp.towers.pretrained import open_clip_tower, timm_tower, transformers_tower
from fastvlp_kernels.packed import Packed

SIDE, PATCH, WIDTH = 32, 8, 32
CAPTIONS = [[3, 5, 7, 1], [9, 2], [4], [8, 8, 3, 2, 6, 1, 1, 5]]


@pytest.fixture(autouse=True, scope="module")
def libraries():
    for name in ("timm", "transformers", "open_clip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    import_open_clip()  # makes torchvision importable, which timm and transformers import


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def pictures(count=3, sizes=None):
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in (sizes or [(SIDE, SIDE)] * count)]


def normalised(tower, pixels):
    """[B, 3, h, w] as the library's model takes it."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (tower.mean, tower.std))
    return torch.stack([(picture.permute(2, 0, 1) / 255 - mean) / std for picture in pixels])


def near(found, expected):
    assert found.lengths.tolist() == [len(x) for x in expected]
    torch.testing.assert_close(found.x, torch.cat(list(expected)), rtol=1e-9, atol=1e-10)


def check_images(tower, reference, ragged=True):
    """``reference``: pictures [B, 3, h, w] -> tokens [B, N, C] of the untouched model."""
    tower.eval()
    pixels = pictures()
    batch = pack_images(pixels, tower.patch_size)
    expected = reference(normalised(tower, pixels))
    found = tower(batch)
    near(found, expected)
    leading = expected.shape[1] - batch.max_seqlen
    rows = found.pos.split(found.lengths.tolist())
    assert all(row[:leading].tolist() == [[i, -1, -1] for i in range(leading)] for row in rows)
    assert torch.equal(torch.cat([row[leading:] for row in rows]), batch.pos)
    assert tower.width == expected.shape[2] and tower.patch_size * tower.grid == tower.image_size
    assert tower(batch.take([])).x.shape == (0, tower.width)
    found.x.square().sum().backward()
    assert all(p.grad is not None for p in tower.parameters()), [name for name, p in tower.named_parameters() if p.grad is None]
    if ragged:  # alone or among others, and in another order, an image has the same tokens
        mixed = pack_images(pictures(sizes=[(16, 32), (32, 32), (8, 24)]), PATCH, keep=0.6, generator=torch.Generator().manual_seed(0))
        together, alone = tower(mixed), [tower(mixed.take([row])) for row in range(3)]
        torch.testing.assert_close(together.x, torch.cat([one.x for one in alone]), rtol=1e-9, atol=1e-10)
        doubled = tower(copy.deepcopy(mixed).take([2, 0])).x
        torch.testing.assert_close(doubled, torch.cat([alone[2].x, alone[0].x]), rtol=1e-9, atol=1e-10)


def check_texts(tower, reference):
    """``reference``: ids [1, n] -> tokens [1, n, C] of the untouched model."""
    tower.eval()
    batch = pack_texts([torch.tensor(ids) for ids in CAPTIONS])
    found = tower(batch)
    near(found, [reference(torch.tensor([ids]))[0] for ids in CAPTIONS])
    assert tower.width == found.x.shape[1] and tower.vocab_size >= 50 and tower.context_length >= 8
    assert tower(batch.take([])).x.shape == (0, tower.width)
    found.x.square().sum().backward()
    assert all(p.grad is not None for p in tower.parameters()), [name for name, p in tower.named_parameters() if p.grad is None]


def timm_model(name, **options):
    size = {"img_size": SIDE} if name.startswith("vit") else {}
    return importlib.import_module("timm").create_model(
        name, **size, patch_size=PATCH, embed_dim=WIDTH, num_heads=4, depth=2, num_classes=0, **options
    ).eval()


@pytest.mark.parametrize("options", [
    {"init_values": 0.5, "qk_norm": True}, {"reg_tokens": 2, "global_pool": "avg"}, {"class_token": False, "global_pool": "map"},
    {"no_embed_class": True, "reg_tokens": 1, "pre_norm": True}], ids=["class", "registers", "map", "deit3"])  # fmt: skip
def test_timm_vit(options):
    model = timm_model("vit_tiny_patch16_224", **options)
    check_images(timm_tower(copy.deepcopy(model)), model.forward_features)


def test_timm_naflexvit():
    model = timm_model("naflexvit_base_patch16_gap", reg_tokens=1, class_token=True)
    tower = timm_tower(copy.deepcopy(model), image_size=SIDE)
    check_images(tower, model.forward_features)
    sizes = [(16, 32), (40, 24), (8, 8)]
    pixels = pictures(sizes=sizes)
    near(tower(pack_images(pixels, PATCH)), [model.forward_features(normalised(tower, [picture]))[0] for picture in pixels])
    pixels = pictures(sizes=[(16, 24)])
    whole = pack_images(pixels, PATCH)
    kept = Packed.of(whole.x[[0, 2, 4, 5]], [4], pos=whole.pos[[0, 2, 4, 5]])
    embedded = []
    tower.blocks = lambda x, segments: embedded.append(x) or x
    tower(whole), tower(kept)
    torch.testing.assert_close(embedded[1][0, 2:], embedded[0][0, [2, 4, 6, 7]])  # dropping leaves the others their places


@pytest.mark.parametrize("name", ["convnext", "swin", "eva"])
def test_timm_padded(name):
    timm = importlib.import_module("timm")
    if name == "convnext":
        model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), num_classes=0).eval()
        tower = timm_tower(copy.deepcopy(model), image_size=64)
        reference = model.forward_features
    elif name == "swin":
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1),
                                  num_classes=0).eval()  # fmt: skip
        tower = timm_tower(copy.deepcopy(model))
        reference = lambda x: model.forward_features(x).permute(0, 3, 1, 2)  # noqa: E731
    else:
        model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=24, num_heads=2, num_classes=0).eval()
        tower = timm_tower(copy.deepcopy(model))
        reference = model.forward_features
    tower.eval()
    assert (tower.image_size, tower.patch_size) == {"convnext": (64, 32), "swin": (64, 8), "eva": (28, 14)}[name]
    side = tower.image_size
    whole = pictures(sizes=[(side, side)] * 2)
    maps = reference(normalised(tower, whole))
    expected = maps.flatten(2).transpose(1, 2) if maps.ndim == 4 else maps
    found = tower(pack_images(whole, tower.patch_size))
    near(found, expected)
    # A smaller picture is the corner of one of mean colour.
    small = pictures(sizes=[(tower.patch_size, side)])
    canvas = torch.zeros(1, 3, side, side)
    canvas[:, :, : tower.patch_size] = normalised(tower, small)
    maps = reference(canvas)
    expected = maps.flatten(2).transpose(1, 2) if maps.ndim == 4 else maps
    leading = expected.shape[1] - tower.grid**2
    near(tower(pack_images(small, tower.patch_size)), expected[:, : leading + tower.grid])
    found.x.square().sum().backward()
    assert tower(pack_images(small, tower.patch_size).take([])).x.shape == (0, tower.width)


def open_clip_model(kind="CLIP", vision=(), text=()):
    clip = importlib.import_module("open_clip.model")
    image = {"layers": 2, "width": WIDTH, "head_width": 8, "patch_size": PATCH, "image_size": SIDE} | dict(vision)
    words = {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 2, "layers": 2} | dict(text)
    return getattr(clip, kind)(16, image, words).eval()


@pytest.mark.parametrize(("kind", "vision"), [
    ("CLIP", {}), ("CLIP", {"ls_init_value": 0.3, "pool_type": "avg"}),
    ("CustomTextCLIP", {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "qk_norm": True}),
    ("CustomTextCLIP", {"attentional_pool": True, "attn_pooler_heads": 2}),
], ids=["clip", "scaled layers", "own blocks", "attentional pool"])  # fmt: skip
def test_open_clip_vit(kind, vision):
    model = open_clip_model(kind, vision)
    visual = copy.deepcopy(model.visual)

    def reference(x):
        tokens = visual.transformer(visual._embeds(x))
        return tokens if vision.get("attentional_pool") else visual.ln_post(tokens)

    check_images(open_clip_tower(model, "image"), reference)


@pytest.mark.parametrize("options", [{}, {"no_causal_mask": True}, {"ls_init_value": 0.2}], ids=["causal", "bidirectional", "scaled"])
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_open_clip_text(kind, options):
    model = open_clip_model(kind, text=options)
    text = copy.deepcopy(model.text if kind == "CustomTextCLIP" else model)
    mask = text.attn_mask

    def reference(ids):
        n = ids.shape[1]
        x = text.token_embedding(ids) + text.positional_embedding[:n]
        return text.ln_final(text.transformer(x, attn_mask=None if mask is None else mask[:n, :n]))

    check_texts(open_clip_tower(model, "text"), reference)


def test_open_clip_resnet_and_what_it_has_of_others():
    model = open_clip_model(vision={"layers": (1, 1, 1, 1), "width": 8, "head_width": 32, "image_size": 64})
    visual = copy.deepcopy(model.visual)
    visual.attnpool = nn.Identity()
    tower, pixels = open_clip_tower(model, "image").eval(), pictures(sizes=[(64, 64)] * 2)
    assert tower.patch_size == 32
    near(tower(pack_images(pixels, 32)), visual(normalised(tower, pixels)).flatten(2).transpose(1, 2))
    model = open_clip_model("CustomTextCLIP")
    model.visual = nn.Module()
    model.visual.trunk = timm_model("vit_tiny_patch16_224")
    trunk = copy.deepcopy(model.visual.trunk)
    tower = open_clip_tower(model, "image")
    assert tower.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    check_images(tower, trunk.forward_features)


def test_open_clip_by_name_and_from_a_file(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    factory = importlib.import_module("open_clip")
    monkeypatch.setitem(factory.factory._MODEL_CONFIGS, "fastvlp-test", {
        "embed_dim": 8, "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}})  # fmt: skip
    model = factory.create_model("fastvlp-test")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = open_clip_tower("fastvlp-test", "text", str(tmp_path / "weights.pt"))
    assert torch.equal(tower.tokens.weight, model.token_embedding.weight)
    assert open_clip_tower("fastvlp-test", "image", image_size=32).grid == 4


def vision(name, **more):
    transformers = importlib.import_module("transformers")
    config = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
              "patch_size": PATCH, **more}  # fmt: skip
    return getattr(transformers, f"{name}Config")(**config)


def of_config(config):
    return getattr(importlib.import_module("transformers"), type(config).__name__.replace("Config", "Model"))(config).eval()


@pytest.mark.parametrize("name", ["CLIPVision", "SiglipVision", "ViT"])
def test_transformers_vit(name):
    model = of_config(vision(name))

    def reference(x):
        states = model(pixel_values=x).last_hidden_state
        return model.post_layernorm(states) if name == "CLIPVision" else states

    check_images(transformers_tower(copy.deepcopy(model)), reference)


def test_transformers_siglip2():
    model = of_config(vision("Siglip2Vision", num_patches=16))
    tower = transformers_tower(copy.deepcopy(model)).eval()
    sizes = [(16, 32), (40, 24), (8, 8), (32, 32), (8, 56)]
    batch = pack_images(pictures(sizes=sizes), PATCH)
    patches, mask = batch.replace(x=(batch.x / 255 - 0.5) / 0.5).to_padded()
    shapes = torch.tensor([(h // PATCH, w // PATCH) for h, w in sizes])
    expected = model(pixel_values=patches, pixel_attention_mask=mask.long(), spatial_shapes=shapes).last_hidden_state
    found = tower(batch)
    assert found.lengths.tolist() == batch.lengths.tolist()
    torch.testing.assert_close(found.x, expected[mask], rtol=1e-6, atol=1e-6)  # theirs resizes the table in float32
    found.x.square().sum().backward()
    assert all(p.grad is not None for p in tower.parameters())


@pytest.mark.parametrize("name", ["ConvNext", "Dinov2"])
def test_transformers_padded_images(name):
    library = importlib.import_module("transformers")
    small = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 64}
    model = of_config(library.ConvNextConfig(**small) if name == "ConvNext" else vision(name))
    tower = transformers_tower(copy.deepcopy(model)).eval()
    assert tower.patch_size == {"ConvNext": 32, "Dinov2": PATCH}[name]
    pixels = pictures(sizes=[(tower.image_size,) * 2] * 2)
    states = model(pixel_values=normalised(tower, pixels)).last_hidden_state
    near(tower(pack_images(pixels, tower.patch_size)), states.flatten(2).transpose(1, 2) if states.ndim == 4 else states)


COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 24}
TEXTS = {
    "CLIPText": COMMON | {"eos_token_id": 1}, "SiglipText": COMMON, "Siglip2Text": COMMON, "Bert": COMMON,
    "Roberta": COMMON | {"max_position_embeddings": 40}, "ModernBert": COMMON, "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "Llama": COMMON | {"num_key_value_heads": 2}, "Qwen2": COMMON | {"num_key_value_heads": 2},
    "DistilBert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}  # fmt: skip


def text_model(name, **options):
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 2, "sep_token_id": 1}
    config = getattr(importlib.import_module("transformers"), f"{name}Config")
    return of_config(config(**{"vocab_size": 60} | special | TEXTS[name] | options))


@pytest.mark.parametrize(("name", "packed"), [(name, True) for name in TEXTS] + [("Bert", False), ("GPT2", False), ("Roberta", False)])
def test_transformers_text(name, packed):
    model = text_model(name)
    tower = transformers_tower(copy.deepcopy(model), packed=packed)
    assert ("Padded" in type(tower).__name__) == (name == "T5" or not packed)
    encoder = model.get_encoder() if name == "T5" else model
    check_texts(tower, lambda ids: encoder(input_ids=ids).last_hidden_state)


def test_transformers_from_a_folder_and_a_configuration(tmp_path):
    library = importlib.import_module("transformers")
    model = library.CLIPModel(library.CLIPConfig(vision_config=vision("CLIPVision").to_dict(),
                                                 text_config=text_model("CLIPText").config.to_dict())).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    check_texts(transformers_tower(tmp_path, "text"), lambda ids: model.text_model(input_ids=ids).last_hidden_state)
    image = transformers_tower(str(tmp_path), "image").eval()
    pixels = pictures()
    states = model.vision_model(pixel_values=normalised(image, pixels)).last_hidden_state
    near(image(pack_images(pixels, PATCH)), model.vision_model.post_layernorm(states))
    torch.manual_seed(0)
    made = transformers_tower(model.config, "text", num_hidden_layers=1, attention_dropout=0.5).train()
    assert len(made.model.encoder.layers) == 1 and model.config.text_config.num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"drops attention weights in training \(p=0.5\)"):
        made(pack_texts([torch.tensor([1, 2])]))
    with pytest.raises(ValueError, match="pass side='image' or side='text'"):
        transformers_tower(model)
    with pytest.raises(ValueError, match="has no 'depth'"):
        transformers_tower(model.config, "text", depth=3)


def test_timm_from_a_file(tmp_path):
    torch.set_default_dtype(torch.float32)
    model = importlib.import_module("timm").create_model("test_vit", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = timm_tower("test_vit", tmp_path / "weights.pt")
    assert torch.equal(tower.model.cls_token, model.cls_token)
    assert (timm_tower("test_vit", image_size=64).grid, tower.grid) == (4, 10)
    batch = pack_images(pictures(sizes=[(16, 32)]), 16)
    twice = timm_tower(copy.deepcopy(model).double().eval())(batch).x  # a model's dtype is the tower's, whatever the default
    assert twice.dtype == torch.float64
    torch.testing.assert_close(tower.eval()(batch).x.double(), twice, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = tower(batch).x
    assert (near.double() - twice).norm() < 0.03 * twice.norm()


def test_checkpointing_and_copies_keep_the_right_segments():
    """Two calls before one backward, each block computed again in it: what a block is told of its segments is an argument."""
    tower = transformers_tower(of_config(vision("ViT")))
    one, two = (pack_images(pictures(sizes=sizes), PATCH) for sizes in ([(16, 16), (32, 8)], [(8, 32), (24, 24), (8, 8)]))
    values = []
    for again in (False, True):
        if again:
            tower = copy.deepcopy(tower)
            tower.model.gradient_checkpointing_enable()
            tower.train()
        tower.zero_grad()
        (tower(one).x.square().sum() + tower(two).x.cos().sum()).backward()
        values.append([p.grad for p in tower.parameters()])
    for first, second in zip(*values, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: open_clip_tower(open_clip_model(), "both"), "side is 'both'; allowed: image and text"),
    (lambda: open_clip_tower(open_clip_model("CustomTextCLIP", text={"embed_cls": True}), "text"), "class token behind its padding"),
    (lambda: open_clip_tower(open_clip_model("CustomTextCLIP", {"scaled_cosine_attn": True})), "scaled cosine"),
    (lambda: open_clip_tower(open_clip_model())(pack_images(pictures(sizes=[(40, 8)]), PATCH)), "go from 0 to 4; this tower has 0 to 3"),
    (lambda: open_clip_tower(open_clip_model())(pack_images(pictures(), 16)), r"this layer was made for \[T, 192\]"),
    (lambda: open_clip_tower(open_clip_model(), "text")(pack_texts([torch.tensor([60])])), "token ids go from 60 to 60"),
    (lambda: transformers_tower(text_model("Bert"), "image"), "BertModel is a text model, and side is 'image'"),
    (lambda: transformers_tower(text_model("Bert"), "both"), "allowed: image, text, and None"),
    (lambda: transformers_tower(text_model("ModernBert", local_attention=8))(pack_texts([torch.arange(9)])), "sees 5 tokens at a time"),
    (lambda: transformers_tower(text_model("Bert"))(pack_texts([torch.arange(25)])), "places in the caption go from 0 to 24"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_model_inside_says_that_it_is_a_towers():
    tower = transformers_tower(text_model("Bert"))
    with pytest.raises(RuntimeError, match="call the tower, or use model.set_attn_implementation"):
        tower.model(input_ids=torch.tensor([[1, 2]]))
