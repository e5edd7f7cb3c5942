"""NaViT against a loop over images, by the state-dict names of vit-pytorch."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from benchmarks import rivals
from fastvlp.integrations.vit_pytorch import NaViT, _Attention
from fastvlp_kernels import Packed

OPTIONS = {"image_size": 32, "patch_size": 4, "num_classes": 6, "dim": 16, "depth": 2, "heads": 3, "mlp_dim": 24, "dim_head": 8}
SIZES = ((8, 12), (32, 32), (4, 4), (8, 12), (16, 8), (4, 4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = NaViT(**OPTIONS).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def draw(sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, dtype=torch.float64, generator=generator) for size in sizes]


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.gamma"], w[f"{name}.beta"])


def attention(w, name, x, context=None):
    """One image: x [n, dim] to context [m, dim] or itself; per-head RMS norm of q and k, no scale."""
    x = norm(w, f"{name}.norm", x)
    q = (x @ w[f"{name}.to_q.weight"].T).view(len(x), 3, 8)
    k, v = ((x if context is None else context) @ w[f"{name}.to_kv.weight"].T).chunk(2, -1)
    k, v = k.view(-1, 3, 8), v.view(-1, 3, 8)
    q, k = (t / t.norm(dim=-1, keepdim=True) * 8**0.5 * w[f"{name}.{n}_norm.gamma"][:, 0] for t, n in ((q, "q"), (k, "k")))
    out = torch.einsum("hnm,mhd->nhd", torch.einsum("nhd,mhd->hnm", q, k).softmax(-1), v)
    return out.reshape(len(x), 24) @ w[f"{name}.to_out.0.weight"].T


def loop(w, image):
    rows, columns = image.shape[1] // 4, image.shape[2] // 4
    tokens = []
    for i in range(rows):
        for j in range(columns):
            patch = norm(w, "to_patch_embedding.0", image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1))
            token = norm(w, "to_patch_embedding.2", patch @ w["to_patch_embedding.1.weight"].T + w["to_patch_embedding.1.bias"])
            tokens.append(token + w["pos_embed_height"][i] + w["pos_embed_width"][j])
    x = torch.stack(tokens)
    for layer in range(2):
        name = f"transformer.layers.{layer}"
        x = attention(w, f"{name}.0", x) + x
        hidden = F.gelu(norm(w, f"{name}.1.0", x) @ w[f"{name}.1.1.weight"].T + w[f"{name}.1.1.bias"])
        x = hidden @ w[f"{name}.1.4.weight"].T + w[f"{name}.1.4.bias"] + x
    query = w["attn_pool_queries"][None]
    pooled = attention(w, "attn_pool", query, norm(w, "transformer.norm", x)) + query
    return (norm(w, "mlp_head.0", pooled) @ w["mlp_head.1.weight"].T)[0]


def test_equals_a_loop_over_images(model):
    images = draw()
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    assert weights.keys() == model.state_dict().keys()
    found, expected = model(images), torch.stack([loop(weights, image) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(found)
    names = [name for name, _ in model.named_parameters()]
    pairs = (torch.autograd.grad(x, [weights[name] for name in names], upstream) for x in (found, expected))
    for name, one, other in zip(names, *pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)
    grouped = model([images[:2], images[2:3], images[3:]])
    assert torch.equal(grouped, found) and torch.equal(model(images, group_images=True, group_max_seq_len=64), found)


def test_vit_pytorch(model):
    if rivals.version("vit-pytorch") is None:
        pytest.skip("vit-pytorch is not installed")
    rivals.import_torchvision()
    theirs = importlib.import_module("vit_pytorch.na_vit").NaViT(**OPTIONS).double().eval()
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(draw()), theirs([[image] for image in draw()]), rtol=1e-6, atol=1e-6)


def test_dropped_attention_weights():
    """In training, and right on average; vit-pytorch drops them too."""
    torch.manual_seed(0)
    layer = _Attention(12, 2, 6, dropout=0.5).double()
    tokens, context = Packed.of(torch.randn(3, 12).double(), [1, 2]), Packed.of(torch.randn(9, 12).double(), [4, 5])
    layer.to_out = torch.nn.Identity()
    first, second = layer(tokens, context), layer(tokens, context)
    assert not torch.equal(first, second)
    mean = torch.stack([layer.train()(tokens, context) for _ in range(400)]).mean(0)
    assert (mean - layer.eval()(tokens, context)).abs().max() < 0.3


@pytest.mark.parametrize("prob", [0.5, lambda height, width: 0.75 if height > 8 else 0.0], ids=["share", "function"])
def test_token_dropout_in_training_alone(prob):
    torch.manual_seed(0)
    model, images = NaViT(**OPTIONS, token_dropout_prob=prob), [image.float() for image in draw()]
    seen = []
    model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].lengths.tolist()))
    first, second = model(images), model(images)
    model.eval()
    assert torch.equal(model(images), model(images)) and not torch.equal(first, second)
    whole = [6, 64, 1, 6, 8, 1]
    share = [0.5] * 6 if prob == 0.5 else [0, 0.75, 0, 0, 0.75, 0]
    assert sorted(seen[0]) == sorted(max(1, int(n * (1 - s))) for n, s in zip(whole, share, strict=True))
    assert sorted(seen[2]) == sorted(whole)


def test_refusals(model):
    with pytest.raises(ValueError, match="multiples of patch_size=5"):
        NaViT(**{**OPTIONS, "patch_size": 5})
    for image, message in ((torch.zeros(1, 8, 8), "image 0 has shape"), (torch.zeros(3, 9, 8), "multiples of 4"),
                           (torch.zeros(3, 36, 8), "image_size allows 32 x 32")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model([image.double()])
    for image, message in ((torch.zeros(3, 8, 8, dtype=torch.uint8), "image 1 is torch.uint8"), (torch.zeros(3, 8, 8).half(), "convert it"),
                           (torch.zeros(3, 8, 8).numpy(), "image 1 is ndarray"), (object(), "image 1 is object")):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            model([torch.zeros(3, 8, 8).double(), image])
    for share in (1.0, -1, float("nan")):
        with pytest.raises(ValueError, match="token_dropout_prob is"):
            NaViT(**OPTIONS, token_dropout_prob=share)
        with pytest.raises(ValueError, match="token_dropout_prob is"):
            NaViT(**OPTIONS, token_dropout_prob=lambda h, w, share=share: share)([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match="multiples of patch_size=0"):
        NaViT(**{**OPTIONS, "patch_size": 0})
    with pytest.raises(ValueError, match="got no images"):
        model([])
