"""Ragged pictures and captions, laid end to end as ``Packed`` tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastvlp_kernels.packed import Packed


def pack_images(images: Sequence[Tensor], patch_size: int, keep: float = 1.0,
                generator: torch.Generator | np.random.Generator | None = None, seeds: Tensor | None = None) -> Packed:
    """Cut pictures into patches and, for training on part of each picture, keep a random subset of them in their order.

    Args:
        images: S tensors [h, w, 3] of one dtype (uint8 usually), h and w multiples of ``patch_size``.
        keep: fraction of each picture's patches to keep, rounded to the nearest number, at least one (patch dropout, NaViT / FLIP).
        generator: source of the random subset; None uses torch's global one.
        seeds: int64 [S], instead of a generator: each picture's subset depends on its own seed alone (``Batch.seeds``).

    Returns:
        Packed on the CPU with x [T, P*P*3] in the images' dtype, each patch row-major (row, column, channel), and pos int32 [T, 3] =
        (0, patch row, patch column).

    Raises:
        ValueError: for a picture whose shape is no multiple of the patch size, or keep outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"pack_images: keep is {keep}; it is a fraction of patches, above 0 and at most 1")
    p = patch_size
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] % p or image.shape[1] % p or not image.numel():
            raise ValueError(f"pack_images: image {i} has shape {tuple(image.shape)}; it must be [h, w, 3] with h and w multiples of {p}")
    grids = [(image.shape[0] // p, image.shape[1] // p) for image in images]
    patches = torch.tensor([rows * columns for rows, columns in grids], dtype=torch.int64)
    lengths = patches if keep == 1 else (patches * keep + 0.5).long().clamp_(min=1)
    cu = _offsets(lengths)
    total = int(lengths.sum())
    x = torch.empty(total, p * p * 3, dtype=images[0].dtype if images else torch.uint8)
    pos = torch.zeros(total, 3, dtype=torch.int32)
    scores = None if keep == 1 else _scores(patches, generator, seeds)
    starts = _offsets(patches)

    for grid in dict.fromkeys(grids):  # pictures of one shape are cut together
        rows, columns = grid
        members = [i for i, other in enumerate(grids) if other == grid]
        n, kept = rows * columns, int(lengths[members[0]])
        pixels = torch.stack([images[i] for i in members]).view(-1, rows, p, columns, p, 3)
        tokens = pixels.permute(0, 1, 3, 2, 4, 5).reshape(len(members), n, -1)
        place = (cu[members, None] + torch.arange(kept)).reshape(-1)
        if scores is None:
            chosen = torch.arange(n).repeat(len(members))
            x[place] = tokens.view(-1, p * p * 3)
        else:
            order = scores[starts[members, None] + torch.arange(n)].argsort(dim=1, stable=True)
            subset = order[:, :kept].sort(dim=1).values
            chosen = subset.reshape(-1)
            x[place] = tokens.view(-1, p * p * 3)[(subset + torch.arange(len(members))[:, None] * n).reshape(-1)]
        pos[place, 1] = (chosen // columns).int()
        pos[place, 2] = (chosen % columns).int()
    return Packed(x=x, cu_seqlens=cu.int(), lengths=lengths, total=total, max_seqlen=int(lengths.max()) if images else 0, pos=pos)


def pack_texts(texts: Sequence[Tensor]) -> Packed:
    """Lay captions (S tensors of token ids, int64 [n]) end to end: x int64 [T], pos int32 [T, 3] = (index in the caption, -1, -1)."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    cu = _offsets(lengths)
    total = int(lengths.sum())
    pos = torch.full((total, 3), -1, dtype=torch.int32)
    pos[:, 0] = (torch.arange(total) - cu[:-1].repeat_interleave(lengths)).int()
    x = torch.cat(list(texts)) if texts else torch.empty(0, dtype=torch.int64)
    return Packed(x=x, cu_seqlens=cu.int(), lengths=lengths, total=total, max_seqlen=int(lengths.max()) if texts else 0, pos=pos)


def _offsets(lengths: Tensor) -> Tensor:
    """Where each segment starts, and where the last one ends: int64 [S+1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _scores(patches: Tensor, generator: torch.Generator | np.random.Generator | None, seeds: Tensor | None) -> Tensor:
    """One random number for every patch of every picture: float64 [sum of patches]."""
    total = int(patches.sum())
    if seeds is not None:
        if seeds.shape != patches.shape:
            raise ValueError(f"pack_images: seeds has shape {tuple(seeds.shape)} for {len(patches)} images; one seed per image is needed")
        index = torch.arange(total) - _offsets(patches)[:-1].repeat_interleave(patches)
        return torch.from_numpy(mix(seeds.repeat_interleave(patches).numpy(), index.numpy()).astype(np.float64))
    if isinstance(generator, np.random.Generator):
        return torch.from_numpy(generator.random(total))
    return torch.rand(total, dtype=torch.float64, generator=generator)


def mix(seeds: np.ndarray, index: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): uint64 random words, a pure function of (seed, index), elementwise."""
    z = seeds.astype(np.uint64) + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
