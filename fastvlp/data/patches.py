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
        images: S tensors [h, w, 3] on the CPU, of one dtype (uint8 usually), h and w multiples of ``patch_size``.
        keep: fraction of each picture's patches to keep, rounded to the nearest number, at least one (patch dropout, NaViT / FLIP).
        generator: source of the random subset; None uses torch's global one.
        seeds: int64 [S], instead of a generator: each picture's subset depends on its own seed alone.

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
    if seeds is not None and len(seeds) != len(images):
        raise ValueError(f"pack_images: seeds has shape {tuple(seeds.shape)} for {len(images)} images; one seed per image is needed")
    return pack_pixels([image.numpy() for image in images], p, keep, seeds.numpy() if seeds is not None else generator)


def pack_pixels(images: Sequence[np.ndarray], patch_size: int, keep: float | np.ndarray = 1.0,
                random: np.ndarray | torch.Generator | np.random.Generator | None = None) -> Packed:
    """``pack_images`` of arrays that are known to fit the grid; ``random`` is a generator or the seeds [S], ``keep`` may be shares [S]."""
    p = patch_size
    columns = np.array([image.shape[1] // p for image in images], dtype=np.int64)
    patches = np.array([image.shape[0] // p for image in images], dtype=np.int64) * columns
    starts = np.concatenate([[0], patches.cumsum()])
    x = np.empty((starts[-1], p * p * 3), dtype=images[0].dtype if images else np.uint8)
    for image, start, end in zip(images, starts.tolist(), starts[1:].tolist(), strict=False):
        height, width, _ = image.shape
        grid = image.reshape(height // p, p, width // p, p * 3).transpose(0, 2, 1, 3)
        x[start:end].reshape(height // p, width // p, p, p * 3)[:] = grid
    segment = np.repeat(np.arange(len(images)), patches)
    lengths = patches
    if np.min(keep) < 1:
        lengths = np.maximum(1, (patches * keep + 0.5).astype(np.int64))
        order = (segment + _scores(patches, starts, random)).argsort(kind="stable")  # random order inside each picture
        kept = np.sort(order[np.arange(starts[-1]) - starts[segment] < lengths[segment]])
        x, segment = x.take(kept, axis=0), segment[kept]
    else:
        kept = np.arange(starts[-1])
    inside = kept - starts[segment]
    pos = np.stack([np.zeros_like(inside), inside // columns[segment], inside % columns[segment]], 1).astype(np.int32)
    return Packed.of(torch.from_numpy(x), torch.from_numpy(lengths), pos=torch.from_numpy(pos))


def pack_texts(texts: Sequence[Tensor]) -> Packed:
    """Lay captions (S tensors of token ids, int64 [n]) end to end: x int64 [T], pos int32 [T, 3] = (index in the caption, -1, -1)."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    x = torch.cat(list(texts)) if texts else torch.empty(0, dtype=torch.int64)
    pos = torch.full((len(x), 3), -1, dtype=torch.int32)
    pos[:, 0] = torch.arange(len(x)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return Packed.of(x, lengths, pos=pos)


def kept_and_left(kept: Packed, whole: Packed, columns: int) -> tuple[Tensor, Tensor]:
    """Where the patches of ``kept`` lie among those of ``whole``, and where all others do: int64 [T'] and [T - T'].

    Args:
        kept: some patches of each picture of ``whole``, both in reading order, with ``pos``. columns: no row has more patches.
    """
    keys = [_rising(packed, columns) for packed in (kept, whole)]
    seen = torch.searchsorted(keys[1], keys[0])
    left = torch.ones(whole.total, dtype=torch.bool, device=seen.device).index_fill(0, seen, False)
    return seen, left.nonzero().squeeze(1)


def _rising(packed: Packed, columns: int) -> Tensor:
    """A number of each patch that rises along the batch: of its picture, row and column."""
    numbers, counts = torch.arange(len(packed), device=packed.x.device), packed.cu_seqlens.diff().long()
    owner = numbers.repeat_interleave(counts, output_size=packed.total)
    assert packed.pos is not None  # a tower saw to it
    pos = packed.pos.long()
    return (owner * columns + pos[:, 1]) * columns + pos[:, 2]


def with_row_marks(images: Packed) -> tuple[Tensor, Tensor]:
    """The order of patches with a mark before the first row, one between rows, and one at the end, as SOLO's decoder reads pictures.

    Returns:
        int64 [T'] on the CPU: numbers of patches, 0 to T - 1, and T, T + 1 and T + 2 for the marks; and the new lengths [S].
    """
    assert images.pos is not None  # a tower refuses patches without
    owner, row = torch.arange(len(images)).repeat_interleave(images.lengths), images.pos[:, 1].cpu()
    first = torch.ones(images.total, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    # Where patches were dropped, a row may be missing: a mark stands wherever the row changes, as many as there are rows left.
    begins = first | (row != row.roll(1))
    rows = torch.zeros(len(images), dtype=torch.int64).index_add(0, owner, begins.long())
    lengths = images.lengths + rows + 1
    # Before a patch stand all patches before it, a mark for each row so far, and the last marks of the pictures before its own.
    place = torch.arange(images.total) + begins.long().cumsum(0) + owner
    order = torch.full((int(lengths.sum()),), images.total + 2)
    order[place] = torch.arange(images.total)
    order[place[begins] - 1] = images.total + (~first[begins]).long()
    return order, lengths


def _scores(patches: np.ndarray, starts: np.ndarray, random: np.ndarray | torch.Generator | np.random.Generator | None) -> np.ndarray:
    """One random number in [0, 1) for every patch of every picture: float64 [sum of patches]."""
    total = int(starts[-1])
    if isinstance(random, np.ndarray):
        words = mix(np.repeat(random, patches), np.arange(total) - np.repeat(starts[:-1], patches))
        return (words >> np.uint64(24)).astype(np.float64) / (1 << 40)
    if isinstance(random, np.random.Generator):
        return random.random(total)
    return torch.rand(total, dtype=torch.float64, generator=random).numpy()


def mix(seeds: np.ndarray, index: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): uint64 random words, a pure function of (seed, index), elementwise."""
    z = seeds.astype(np.uint64) + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
