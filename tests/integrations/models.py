"""Small models of timm, open_clip and transformers with random weights in float64, and what a block of each computes for one image."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from benchmarks.rivals import import_open_clip

WIDTH, HEADS, DEPTH, SIDE, PATCH = 32, 4, 3, 32, 8


def libraries():
    try:
        import_open_clip()  # makes torchvision importable, which timm and transformers import
    except ModuleNotFoundError:
        pytest.skip("open_clip_torch is not installed")
    for name, version in (("timm", None), ("transformers", "5.0")):
        pytest.importorskip(name, minversion=version, reason=f"{name} {version or ''} is not installed")


def images(count=3):
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flexible(lengths=((2, 3), (4, 4), (1, 5))):
    """Patches [B, N, P * P * 3] of images of different sizes, which are real, and their numbers of rows and columns."""
    longest = max(h * w for h, w in lengths)
    patches = torch.randn(len(lengths), longest, 3 * PATCH**2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real = torch.stack([torch.arange(longest) < h * w for h, w in lengths])
    return patches, real, torch.tensor(lengths)


def _timm(name, **options):
    timm = importlib.import_module("timm")
    size = {} if name.startswith("naflexvit") else {"img_size": SIDE}
    model = timm.create_model(name, **size, patch_size=PATCH, embed_dim=WIDTH, num_heads=HEADS, depth=DEPTH, num_classes=5, **options)
    return model, images(), model


def timm_class():
    return _timm("vit_tiny_patch16_224", init_values=0.5, qk_norm=True)


def timm_registers():
    return _timm("vit_tiny_patch16_224", reg_tokens=2, global_pool="avg")


def deit_distilled():
    """A class and a distillation token, both of which the head reads."""
    return _timm("deit_tiny_distilled_patch16_224")


def naflexvit():
    model, _, _ = _timm("naflexvit_base_patch16_gap")
    patches, real, sizes = flexible()
    places = torch.zeros(*real.shape, 2, dtype=torch.int64)
    for row, (h, w) in enumerate(sizes.tolist()):
        places[row, : h * w] = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).flatten(0, 1)
    return model, {"patches": patches, "patch_coord": places, "patch_valid": real}, model


def _open_clip(kind, **vision):
    clip = importlib.import_module("open_clip.model")
    image = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH, "image_size": SIDE, **vision}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    if kind == "CoCa":
        coca = importlib.import_module("open_clip.coca_model")
        many = {"context_length": 8, "width": 32, "heads": 2, "layers": 1, "mlp_ratio": 2}
        model = coca.CoCa(16, many, text | {"embed_cls": True, "output_tokens": True}, image | {"output_tokens": True})
    else:
        model = getattr(clip, kind)(16, image, text)
    return _Encoder(model), images(), model.visual


class _Encoder(torch.nn.Module):
    """The image side of a model, so that it has one input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.encode_image(x) if hasattr(self.model, "encode_image") else self.model(**x).pooler_output


def open_clip_clip():
    return _open_clip("CLIP")


def open_clip_coca():
    return _open_clip("CoCa", attentional_pool=True, attn_pooler_heads=2)


def open_clip_custom_text():
    return _open_clip("CustomTextCLIP", scale_heads=True, scale_attn_inner=True, scale_attn=True, qk_norm=True)


def open_clip_timm():
    model, batch, visual = _open_clip("CustomTextCLIP")
    trunk, _, _ = _timm("vit_tiny_patch16_224")
    del visual
    model.model.visual = trunk
    return model, batch, trunk


def _transformers(name, **more):
    transformers = importlib.import_module("transformers")
    vision = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIDE,
              "patch_size": PATCH, **more}  # fmt: skip
    if name == "ViT":
        tower = transformers.ViTModel(transformers.ViTConfig(**vision))
    else:
        tower = getattr(transformers, f"{name}VisionModel")(getattr(transformers, f"{name}VisionConfig")(**vision))
    return _Encoder(tower), {"pixel_values": images()}, tower


def clip():
    return _transformers("CLIP")


def siglip():
    return _transformers("Siglip")


def siglip2():
    model, _, tower = _transformers("Siglip2", num_patches=16)
    patches, real, sizes = flexible()
    return model, {"pixel_values": patches, "pixel_attention_mask": real.long(), "spatial_shapes": sizes}, tower


def vit():
    return _transformers("ViT")


def blocks_of(tower):
    for path in ("blocks", "transformer.resblocks", "encoder.layers", "layers"):
        found = tower
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return list(found)
    raise AssertionError(type(tower))


def parts(block):
    """(q, k, v [n, H, d] of x [n, C]), (x + projection of out [n, C]), (x + MLP of x): what the library's source says, for one image."""

    def heads(x):
        return x.reshape(len(x), HEADS, -1)

    if hasattr(block, "ls1"):  # timm
        a = block.attn

        def qkv(x):
            q, k, v = (heads(part) for part in a.qkv(block.norm1(x)).chunk(3, -1))
            return a.q_norm(q), a.k_norm(k), v

        return qkv, lambda x, out: x + block.ls1(a.proj(out)), lambda x: x + block.ls2(block.mlp(block.norm2(x)))
    if hasattr(block, "ln_1"):  # open_clip
        a, own = block.attn, hasattr(block, "ln_attn")

        def qkv(x):
            q, k, v = (heads(part) for part in F.linear(block.ln_1(x), a.in_proj_weight, a.in_proj_bias).chunk(3, -1))
            return (a.ln_q(q), a.ln_k(k), v) if own else (q, k, v)

        def project(x, out):
            if own:
                out = a.ln_inner((out.reshape(len(x), HEADS, -1) * a.head_scale[:, :, 0]).reshape(len(x), -1))
            return x + block.ls_1(block.ln_attn(a.out_proj(out)) if own else a.out_proj(out))

        return qkv, project, lambda x: x + block.ls_2(block.mlp(block.ln_2(x)))
    if hasattr(block, "self_attn"):
        a, norm1, norm2 = block.self_attn, block.layer_norm1, block.layer_norm2
    else:
        a, norm1, norm2 = block.attention, block.layernorm_before, block.layernorm_after
    last = a.out_proj if hasattr(a, "out_proj") else a.o_proj
    return (
        lambda x: tuple(heads(linear(norm1(x))) for linear in (a.q_proj, a.k_proj, a.v_proj)),
        lambda x, out: x + last(out),
        lambda x: x + block.mlp(norm2(x)),
    )
