"""The padded twins: the same towers and weights over rectangular batches, as everyone else computes them.

They exist to measure what packing gains and to show that packing changes nothing: their tokens and features equal the packed ones.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp.layers import Pool, padded_attend
from fastvlp.towers.text import Text
from fastvlp.towers.vit import Vit
from fastvlp_kernels.packed import Packed


def encode(tower: Vit | Text, x: Tensor, mask: Tensor, pos: Tensor | None = None) -> Tensor:
    """What ``tower`` makes of padded tokens: [B, N, C], normalised; what stands at padding means nothing.

    Args:
        x: patches [B, N, P*P*3] or ids [B, N]. mask: bool [B, N], True: real; the real ones come first.
        pos: of patches, int32 [B, N, 3], 0 at padding.

    Raises:
        ValueError: the tower merges tokens, after which rows have different lengths.
    """
    if any(tower.merge):
        raise ValueError(f"padded.encode: merge is {list(tower.merge)}, so that rows differ in length; use the packed tower itself")
    if pos is None:
        # Places at padding are valid ones, since they are looked up, too; what comes of them is masked.
        pos = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[None, :, None].expand(x.shape[0], -1, 3)
    everything = Packed.from_padded(x).replace(pos=pos.flatten(0, 1))
    tokens = tower.embed(everything).x.unflatten(0, x.shape[:2])
    attend = padded_attend(mask, causal=isinstance(tower, Text) and tower.causal)
    for block in tower.blocks:
        tokens = block(tokens, attend)
    normalised: Tensor = tower.norm_out(tokens)
    return normalised


def features(pool: Pool, tokens: Tensor, mask: Tensor) -> Tensor:
    """What ``pool`` (by the mean, the first or the last) makes of padded tokens [B, N, C]: [B, D] of length 1."""
    if pool.attention is not None:
        raise ValueError("padded.features: mode is 'attention', which has no padded twin; allowed: mean, first and last")
    if pool.mode == "mean":
        # Padding has features as well, since blocks compute them, and must weigh nothing.
        weight = mask.to(tokens.dtype)
        pooled = torch.einsum("bnc,bn->bc", tokens, weight) / weight.sum(1, keepdim=True)
    else:
        place = mask.sum(1) - 1 if pool.mode == "last" else mask.new_zeros(len(mask), dtype=torch.int64)
        pooled = tokens[torch.arange(len(tokens), device=tokens.device), place]
    return F.normalize(pooled @ pool.projection, dim=-1)
