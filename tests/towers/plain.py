"""Towers of one segment in plain mathematics, from their weights, and small batches to feed them."""

import torch
from torch.nn import functional as F

from fastvlp.data import pack_images, pack_texts
from tests.matching import merged_rows

SIZES = [(32, 48), (64, 64), (16, 16), (64, 32), (48, 48)]
SMALL = {"width": 32, "depth": 2, "heads": 2}
TEXT = SMALL | {"vocab_size": 50, "context_length": 12}
IMAGE = SMALL | {"grid": 8}


def images(sizes=SIZES):
    made = torch.Generator().manual_seed(0)
    return pack_images([torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=made) for size in sizes], 16)


def texts(lengths=(3, 12, 1, 7, 7), vocabulary=50):
    made = torch.Generator().manual_seed(1)
    return pack_texts([torch.randint(0, vocabulary, (n,), generator=made) for n in lengths])


def norm(layer, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def patches(vit, x, pos):
    """Pixels [n, P*P*3] and their places -> tokens [n, C] before the first block."""
    x = linear(vit.patch, (x.double() / 255 - 0.5) / 0.5)
    return norm(vit.norm_in, torch.stack([token + vit.rows[r] + vit.columns[c] for token, (_, r, c) in zip(x, pos.tolist(), strict=True)]))


def words(table, ids):
    """Ids [n] of one caption -> tokens [n, C] before the first block."""
    return norm(table.norm_in, torch.stack([table.tokens.weight[i] + table.places[n] for n, i in enumerate(ids.tolist())]))


def attention(heads, q, k, v, seen, size):
    """q [n, C], k and v [m, C], seen bool [n, m], size [m] -> [n, C]; each query by itself."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    rows = []
    for i in range(len(q)):
        weight = torch.exp((k * q[i]).sum(-1) * q.shape[-1] ** -0.5) * (size * seen[i])[:, None]
        rows.append((weight[..., None] * v).sum(0) / weight.sum(0)[:, None])
    return torch.stack(rows).flatten(1)


def block(layer, x, seen, size=None, share=0.0, look=None):
    """Tokens [n, C] of one segment through a block -> tokens and sizes; ``look`` comes between attention and MLP."""
    size = torch.ones(len(x), dtype=x.dtype) if size is None else size
    q, k, v = linear(layer.qkv, norm(layer.norm1, x)).chunk(3, -1)
    x = x + linear(layer.proj, attention(layer.heads, q, k, v, seen, size))
    if share:
        rows = merged_rows(k.detach().unflatten(-1, (layer.heads, -1)).mean(1), share)
        x = torch.stack([(x[row] * size[row, None]).sum(0) / size[row].sum() for row in rows])
        size = torch.stack([size[row].sum() for row in rows])
    if look is not None:
        x = look(x)
    hidden = linear(layer.up, norm(layer.norm2, x))
    hidden = hidden.clamp_min(0).square() if type(layer.activation).__name__ == "SquaredReLU" else F.gelu(hidden)
    return x + linear(layer.down, hidden), size


def cross(layer, x, y):
    """Tokens [n, C] read tokens [m, source] -> [n, C]."""
    k, v = linear(layer.kv, y).chunk(2, -1)
    everything = torch.ones(len(x), len(y), dtype=torch.bool)
    read = attention(layer.heads, linear(layer.q, norm(layer.norm, x)), k, v, everything, torch.ones(len(y), dtype=x.dtype))
    added = linear(layer.proj, read)
    return x + (added if layer.gate is None else torch.tanh(layer.gate) * added)


def all_seen(n):
    return torch.ones(n, n, dtype=torch.bool)


def earlier_seen(n, prefix=0):
    return torch.tensor([[j <= i or j < prefix for j in range(n)] for i in range(n)]).view(n, n)


def tower(module, x, seen):
    """Tokens [n, C] of one segment through all blocks and the norm -> tokens and sizes."""
    size = torch.ones(len(x), dtype=x.dtype)
    for layer, share in zip(module.blocks, getattr(module, "merge", [0.0] * len(module.blocks)), strict=True):
        x, size = block(layer, x, seen(len(x)), size, share)
    return norm(module.norm_out, x), size


def same(found, expected, parameters, rtol=1e-9, atol=1e-11):
    """Values, and gradients of a random direction to the named parameters."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    names, leaves = zip(*parameters, strict=True)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (found, expected))
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
