"""RWKV-CLIP's towers against their formulas, token by token over one segment at a time, in values and gradients."""

import pytest
import torch

from fastvlp.towers import RwkvImage, RwkvText
from fastvlp_kernels import token_select
from tests.towers import plain
from tests.towers.plain import images, norm, same, texts

SMALL = {"width": 32, "depth": 2, "heads": 2}


def made(cls, **options):
    """With mixtures and decays that depend on the data from the start, and heads whose scales differ."""
    torch.manual_seed(0)
    tower = cls(**SMALL, **options).double()
    for name, parameter in tower.named_parameters():
        if name.endswith(("mix_in", "decay_in")):
            torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith(("mix_out", "decay_out", "norm.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    return tower


def moved(x, around, heads):
    """x [n, C]; the i-th part of each head comes from the token around[t][i], or is 0 without one."""
    size = x.shape[1] // heads
    rows = []
    for t in range(len(x)):
        part = size // len(around[t])
        pieces = [x[o, head * size + i * part:head * size + (i + 1) * part] if o is not None else x.new_zeros(part)
                  for head in range(heads) for i, o in enumerate(around[t])]
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


def wkv(r, k, v, w, u):
    """One head, [n, d] and u [d]: every token reads every other, faded by the decays strictly between the two."""
    fade = torch.exp(-torch.exp(w))
    rows = []
    for t in range(len(r)):
        total = (r[t] * u * k[t]).sum() * v[t]
        for s in range(len(r)):
            if s != t:
                total = total + (r[t] * fade[min(s, t) + 1:max(s, t)].prod(0) * k[s]).sum() * v[s]
        rows.append(total)
    return torch.stack(rows)


def spatial(layer, x, around):
    near = moved(x, around, layer.heads) - x
    low = torch.tanh((x + near * layer.mix[0]) @ layer.mix_in).chunk(5, 1)
    w, k, v, r, g = (x + near * (layer.mix[1 + i] + low[i] @ layer.mix_out[i]) for i in range(5))
    rate = layer.decay + torch.tanh(w @ layer.decay_in) @ layer.decay_out
    r, k, v, g = r @ layer.receptance.weight.T, k @ layer.key.weight.T, v @ layer.value.weight.T, g @ layer.gate.weight.T
    size, heads = x.shape[1] // layer.heads, []
    for head in range(layer.heads):
        a = slice(head * size, (head + 1) * size)
        y = wkv(r[:, a], k[:, a], v[:, a], rate[:, a], layer.own[head])
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + layer.norm.eps).sqrt()
        heads.append(y * layer.norm.weight[a] + layer.norm.bias[a])
    return (torch.cat(heads, 1) * g * torch.sigmoid(g)) @ layer.output.weight.T


def channel(layer, x, around, heads):
    near = moved(x, around, heads)
    k, r = (x * (1 - layer.mix[i]) + near * layer.mix[i] for i in range(2))
    return torch.sigmoid(r @ layer.receptance.weight.T) * ((k @ layer.key.weight.T).clamp_min(0) ** 2 @ layer.value.weight.T)


def tower(module, x, around):
    for layer in module.blocks:
        x = x + spatial(layer.spatial, norm(layer.norm1, x), around)
        x = x + channel(layer.channel, norm(layer.norm2, x), around, module.heads)
    return norm(module.norm_out, x)


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_image(keep):
    vit, batch = made(RwkvImage, grid=8), images([(32, 48), (64, 64), (32, 16)])
    if keep < 1:
        batch = token_select(torch.rand(batch.total), batch.cu_seqlens, keep, lengths=batch.lengths).apply(batch)
    expected = []
    for x, pos in zip(batch.segments(), batch.pos.split(batch.lengths.tolist()), strict=True):
        places = {tuple(place): t for t, place in enumerate(pos[:, 1:].tolist())}
        around = [[places.get(p) for p in ((r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c))] for r, c in pos[:, 1:].tolist()]
        expected.append(tower(vit, plain.patches(vit, x, pos), around))
    same(vit(batch).x, torch.cat(expected), vit.named_parameters())


def test_text():
    text, batch = made(RwkvText, vocab_size=50, context_length=12), texts((3, 12, 1, 7))
    expected = []
    for ids in batch.segments():
        around = [[t - 1 if t else None, t + 1 if t + 1 < len(ids) else None] for t in range(len(ids))]
        expected.append(tower(text, norm(text.norm_in, text.tokens.weight[ids.long()]), around))
    same(text(batch).x, torch.cat(expected), text.named_parameters())


def test_start_is_the_authors():
    """Of the last of three blocks: half of the channels' way to the neighbour, decays from -6 up to -1, own weights with a zigzag."""
    torch.manual_seed(0)
    layer = RwkvImage(width=8, depth=3, heads=2).blocks[2].spatial
    place = [(c / 8) ** (1 / 3) for c in range(8)]
    torch.testing.assert_close(layer.mix[1], torch.tensor([1 - p for p in place]))
    torch.testing.assert_close(layer.mix[3], torch.tensor([1 - p - 0.3 for p in place]))
    torch.testing.assert_close(layer.mix[4], torch.tensor([1 - p**0.5 for p in place]))
    torch.testing.assert_close(layer.decay, torch.tensor([-6 + 5 * (c / 7) ** 2.0 for c in range(8)]))
    zigzag = [0.0, 0.1, -0.1, 0.0, 0.1, -0.1, 0.0, 0.1]
    torch.testing.assert_close(layer.own.flatten(), torch.tensor([1 - c / 7 + z for c, z in enumerate(zigzag)]))


def test_refusals():
    with pytest.raises(ValueError, match="the width a multiple of 4 times the heads"):
        RwkvImage(width=12, depth=1, heads=2)
    text = RwkvText(**SMALL, vocab_size=50, context_length=12)
    with pytest.raises(ValueError, match="token ids go from"):
        text(texts((3, 4), vocabulary=500))
