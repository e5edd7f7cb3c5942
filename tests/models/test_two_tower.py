"""The towers: packed equals padded equals one image at a time, and files round-trip."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import fastvlp
from fastvlp.data import load_tokenizer, pack_images, pack_texts
from fastvlp.models import ImageConfig, ModelConfig, TextConfig, TwoTower, padded

SIZES = [(32, 48), (64, 64), (16, 16), (64, 32), (48, 48)]


def _config(**text) -> ModelConfig:
    return ModelConfig(embed_dim=24, image=ImageConfig(width=32, depth=2, heads=2, image_size=64, grid=8),
                       text=TextConfig(width=32, depth=2, heads=2, vocab_size=4096, context_length=12, **text))


def _images() -> list[torch.Tensor]:
    return [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in SIZES]


def _texts() -> list[torch.Tensor]:
    return [torch.randint(0, 4096, (n,)) for n in (3, 12, 1, 7, 7)]


@pytest.mark.parametrize("text", [{}, {"causal": True, "pool": "last"}], ids=["bidirectional-mean", "causal-last"])
@pytest.mark.parametrize("activation", ["relu2", "gelu"])
def test_packed_equals_padded_equals_one_by_one(text, activation):
    torch.manual_seed(0)
    config = _config(activation=activation, **text)
    model = TwoTower(dataclasses.replace(config, image=dataclasses.replace(config.image, activation=activation))).double()
    images, texts = pack_images(_images(), 16), pack_texts(_texts())
    packed_image, packed_text = model.image(images), model.text(texts)

    patches, mask = images.to_padded()
    assert images.pos is not None
    pos, _ = images.replace(x=images.pos).to_padded()
    torch.testing.assert_close(padded.encode_image(model.image, patches, pos, mask), packed_image)
    tokens, mask = texts.to_padded()
    torch.testing.assert_close(padded.encode_text(model.text, tokens, mask), packed_text)

    alone = torch.cat([model.text(pack_texts([segment])) for segment in texts.segments()])
    torch.testing.assert_close(alone, packed_text)


def test_packed_gradients_equal_padded_gradients():
    torch.manual_seed(0)
    model = TwoTower(_config()).double()
    images = pack_images(_images(), 16)
    weight = torch.randn(len(SIZES), 24, dtype=torch.float64)
    parameters = list(model.image.parameters())
    packed_grads = torch.autograd.grad((model.image(images) * weight).sum(), parameters)
    patches, mask = images.to_padded()
    assert images.pos is not None
    pos, _ = images.replace(x=images.pos).to_padded()
    padded_grads = torch.autograd.grad((padded.encode_image(model.image, patches, pos, mask) * weight).sum(), parameters)
    for got, expected in zip(packed_grads, padded_grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_image_tower_against_plain_mathematics():
    """One image through a from-scratch transformer with the same weights."""
    torch.manual_seed(0)
    model = TwoTower(_config(), ).double()
    tower = model.image
    picture = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    x = torch.stack([picture[16 * r:16 * r + 16, 16 * c:16 * c + 16].flatten() for r in range(2) for c in range(3)]).double()
    x = (x / 255 - 0.5) / 0.5 @ tower.patch.weight.T + tower.patch.bias
    x = torch.stack([token + tower.rows[i // 3] + tower.columns[i % 3] for i, token in enumerate(x)])

    def norm(module, value):
        value = value - value.mean(-1, keepdim=True)
        return value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias

    x = norm(tower.norm_in, x)
    for block in tower.blocks:
        q, k, v = (norm(block.norm1, x) @ block.qkv.weight.T + block.qkv.bias).view(6, 3, 2, 16).unbind(1)
        mixed = torch.stack([(q[:, h] @ k[:, h].T / 4).softmax(-1) @ v[:, h] for h in range(2)], 1)
        x = x + mixed.reshape(6, 32) @ block.proj.weight.T + block.proj.bias
        hidden = (norm(block.norm2, x) @ block.up.weight.T + block.up.bias).clamp_min(0).square()
        x = x + hidden @ block.down.weight.T + block.down.bias
    expected = norm(tower.norm_out, x).mean(0) @ tower.projection
    torch.testing.assert_close(tower(pack_images([picture], 16))[0], expected)


def test_dropped_patches_keep_their_places():
    model = TwoTower(_config())
    images = pack_images(_images(), 16)
    kept = pack_images(_images(), 16, keep=0.5, generator=torch.Generator().manual_seed(0))
    assert kept.total < images.total
    assert model.encode_image(kept).shape == (len(SIZES), 24)


def test_save_and_load_give_the_same_features(tmp_path):
    torch.manual_seed(0)
    model = TwoTower(dataclasses.replace(_config(), init_bias=-10.0)).eval()
    model.tokenizer = load_tokenizer("mini", 12)
    model.save(tmp_path / "run" / "model")
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        again = fastvlp.load(place)
        assert again.config == model.config
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
    captions = ["red apple", "a flag of France, with a lot of words that do not fit the context of this small model", ""]
    assert torch.equal(model.encode_text(captions), again.encode_text(captions))


def test_encode_image_takes_pil_and_tensors_alike():
    from PIL import Image

    model = TwoTower(_config()).eval()
    picture = torch.randint(0, 256, (64, 48, 3), dtype=torch.uint8)
    as_uint8 = model.encode_image([picture])
    as_pil = model.encode_image([Image.fromarray(picture.numpy())])
    as_float = model.encode_image([picture.permute(2, 0, 1) / 255])
    assert torch.equal(as_uint8, as_pil)
    torch.testing.assert_close(as_uint8, as_float)
    assert torch.allclose(as_uint8.norm(dim=-1), torch.ones(1))


def test_one_training_step_lowers_the_loss():
    torch.manual_seed(0)
    model = TwoTower(_config())
    images, texts = pack_images(_images(), 16), pack_texts(_texts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss():
        out = model(images, texts)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        return F.cross_entropy(logits, torch.arange(len(SIZES)))

    before = loss()
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert loss() < before


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model.json"):
        fastvlp.load(tmp_path)
    with pytest.raises(ValueError, match="multiple of the heads"):
        ImageConfig(width=100, heads=3)
    with pytest.raises(ValueError, match="load_tokenizer"):
        TwoTower(_config()).encode_text(["no tokenizer"])
    with pytest.raises(ValueError, match="grid"):
        ImageConfig(image_size=1024, patch_size=16, grid=32)
    with pytest.raises(TypeError, match="list of strings"):
        model = TwoTower(_config())
        model.tokenizer = load_tokenizer("mini", 12)
        model.encode_text("one string")
