"""The padded twin: the same towers and weights over rectangular batches, as everyone else computes them.

It exists to measure what packing gains and to show that packing changes nothing: its features equal the packed ones.
"""

import torch
from torch import Tensor

from fastvlp.layers import Attend, padded_attend
from fastvlp.models.towers import ImageTower, TextTower


def encode_image(tower: ImageTower, patches: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
    """patches [B, N, P*P*3], pos [B, N, 3], mask [B, N] (True: real) -> features [B, embed_dim], not normalised."""
    x = _encode(tower, tower.embed(patches, pos.clamp_min(0)), padded_attend(mask, causal=False))
    return _mean(x, mask) @ tower.projection


def encode_text(tower: TextTower, tokens: Tensor, mask: Tensor) -> Tensor:
    """tokens [B, N], mask [B, N] (True: real; the real ones come first) -> features [B, embed_dim], not normalised."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    x = _encode(tower, tower.embed(tokens, place), padded_attend(mask, tower.config.causal))
    if tower.config.pool == "mean":
        return _mean(x, mask) @ tower.projection
    last = mask.sum(1) - 1
    return x[torch.arange(len(x), device=x.device), last] @ tower.projection


def _encode(tower: ImageTower | TextTower, x: Tensor, attend: Attend) -> Tensor:
    """Tokens [B, N, C] -> tokens [B, N, C], normalised."""
    if any(tower.config.merged):
        raise ValueError(f"merge is {list(tower.config.merge)}: merging leaves rows of different lengths; use the packed tower itself")
    for block in tower.blocks:
        x = block(x, attend)
    return tower.norm_out(x)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(x.dtype)
    return torch.einsum("bnc,bn->bc", x, weight) / weight.sum(1, keepdim=True)
