"""pack_images and pack_texts against loops over pixels."""

import numpy as np
import pytest
import torch

from fastvlp.data import pack_images, pack_texts
from fastvlp.data.patches import mix


def _images(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


SIZES = [(8, 4), (4, 4), (12, 8), (8, 4), (4, 16)]


def test_all_patches_are_there_in_order():
    images = _images(SIZES)
    packed = pack_images(images, 4)
    rows, places = [], []
    for image in images:
        for r in range(image.shape[0] // 4):
            for c in range(image.shape[1] // 4):
                rows.append([image[4 * r + i, 4 * c + j, k].item() for i in range(4) for j in range(4) for k in range(3)])
                places.append([0, r, c])
    assert packed.x.dtype == torch.uint8 and packed.x.tolist() == rows
    assert packed.pos.dtype == torch.int32 and packed.pos.tolist() == places
    assert packed.lengths.tolist() == [2, 1, 6, 2, 4] and packed.lengths.dtype == torch.int64
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 9, 11, 15] and packed.cu_seqlens.dtype == torch.int32
    assert (packed.total, packed.max_seqlen) == (15, 6)


@pytest.mark.parametrize("source", ["torch", "numpy", "seeds"])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.99])
def test_kept_patches_are_a_subset_in_order(keep, source):
    images = _images(SIZES)
    options = {"torch": {"generator": torch.Generator().manual_seed(3)}, "numpy": {"generator": np.random.default_rng(3)},
               "seeds": {"seeds": torch.arange(5) + 7}}[source]
    packed = pack_images(images, 4, keep, **options)
    assert packed.lengths.tolist() == [max(1, int(n * keep + 0.5)) for n in (2, 1, 6, 2, 4)]
    lengths = packed.lengths.tolist()
    for image, tokens, places in zip(images, packed.x.split(lengths), packed.pos.split(lengths), strict=True):
        flat = [r * (image.shape[1] // 4) + c for _, r, c in places.tolist()]
        assert flat == sorted(set(flat))
        for token, (_, r, c) in zip(tokens, places.tolist(), strict=True):
            assert torch.equal(token.view(4, 4, 3), image[4 * r:4 * r + 4, 4 * c:4 * c + 4])


def test_subset_depends_on_the_seed_of_the_picture_alone():
    images, seeds = _images(SIZES), torch.tensor([5, 1 << 62, 0, 17, 9])
    whole = pack_images(images, 4, 0.5, seeds=seeds)
    for group in ([0], [3, 1], [4, 2, 0]):
        part = pack_images([images[i] for i in group], 4, 0.5, seeds=seeds[group])
        expected = [whole.pos[whole.cu_seqlens[i]:whole.cu_seqlens[i + 1]] for i in group]
        assert torch.equal(part.pos, torch.cat(expected))


def test_every_patch_is_equally_likely():
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    packed = pack_images([image] * 4000, 4, 0.25, seeds=torch.arange(4000))
    hits = torch.bincount(packed.pos[:, 1].long() * 4 + packed.pos[:, 2], minlength=16)
    assert ((hits - 1000).abs() < 5 * (4000 * 0.25 * 0.75) ** 0.5).all()  # five standard deviations of a binomial


def test_mix_is_splitmix64():
    state, expected = 1234567, []  # the recurrence in Python integers
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        expected.append(z ^ (z >> 31))
    assert mix(np.full(5, 1234567), np.arange(5)).tolist() == expected
    assert expected[0] == 6457827717110365317  # published first output for this seed


def test_nothing_and_wrong_pictures():
    empty = pack_images([], 4)
    assert empty.total == 0 and empty.max_seqlen == 0 and empty.cu_seqlens.tolist() == [0] and empty.x.shape == (0, 48)
    with pytest.raises(ValueError, match=r"image 1 has shape \(6, 4, 3\).*multiples of 4"):
        pack_images([torch.zeros(4, 4, 3), torch.zeros(6, 4, 3)], 4)
    with pytest.raises(ValueError, match="keep is 0"):
        pack_images(_images([(4, 4)]), 4, keep=0)
    with pytest.raises(ValueError, match="one seed per image"):
        pack_images(_images([(4, 4)]), 4, keep=0.5, seeds=torch.arange(2))


def test_float_pictures_keep_their_type():
    image = torch.rand(4, 8, 3)
    packed = pack_images([image], 4)
    assert packed.x.dtype == torch.float32 and torch.equal(packed.x[1].view(4, 4, 3), image[:, 4:])


def test_texts_end_to_end():
    texts = [torch.tensor([5, 6, 7]), torch.tensor([], dtype=torch.int64), torch.tensor([9])]
    packed = pack_texts(texts)
    assert packed.x.tolist() == [5, 6, 7, 9] and packed.x.dtype == torch.int64
    assert packed.pos.tolist() == [[0, -1, -1], [1, -1, -1], [2, -1, -1], [0, -1, -1]]
    assert packed.lengths.tolist() == [3, 0, 1] and packed.cu_seqlens.tolist() == [0, 3, 3, 4] and packed.max_seqlen == 3
    assert pack_texts([]).total == 0
