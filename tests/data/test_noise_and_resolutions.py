"""Wrong captions for the same samples every time, and pictures each of its own size and share of patches."""

import numpy as np
import pytest
import torch

from fastvlp.data.batch import Stage
from fastvlp.data.fields import Caption, Image, Noisy, Resolutions
from fastvlp.data.fields.field import Field


class Words(Field):
    """The first caption's length, and whose it is."""

    def __call__(self, samples, words, stage):
        return torch.tensor([int(sample.captions[0]) for sample in samples])


class Sample:
    def __init__(self, number):
        self.key, self.captions, self.values = f"sample-{number}", [str(number)], {}
        self.other = self if number < 0 else Sample(-1)

    def picture(self, size, patch):
        return np.zeros((size // 2 // patch * patch, size, 3), dtype=np.uint8)


WORDS = np.random.default_rng(0).integers(0, 2**63, 2000, dtype=np.uint64)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_is_wrong_and_always_the_same(share):
    samples, field = [Sample(number) for number in range(2000)], Noisy(Words(), share)
    found = field(samples, WORDS, Stage())
    wrong = found == -1
    assert abs(float(wrong.float().mean()) - share) < 4 * (share * (1 - share) / 2000) ** 0.5 + 1e-9
    assert torch.equal(found[~wrong], torch.arange(2000)[~wrong])
    assert torch.equal(wrong.flip(0), field(samples[::-1], WORDS[::-1].copy(), Stage()) == -1)


def test_every_picture_has_a_size_and_a_share_of_its_own():
    samples, field = [Sample(0)] * 2000, Resolutions(size=64, patch=8, smallest=16, least=0.25)
    batch = field(samples, WORDS, Stage())
    columns = torch.stack([place[:, 2].max() + 1 for place in batch.pos.split(batch.lengths.tolist())])
    assert columns.max() == 8 and len(batch) == 2000
    # Sides of 16, 24, ..., 64 are as likely; half as high as wide, a picture of n columns has n (n // 2) patches.
    whole = Resolutions(size=64, patch=8, smallest=16)(samples, WORDS, Stage())
    sides = torch.stack([place[:, 2].max() + 1 for place in whole.pos.split(whole.lengths.tolist())])
    assert sorted(set(sides.tolist())) == list(range(2, 9))
    assert all(abs(int((sides == side).sum()) - 2000 / 7) < 75 for side in range(2, 9))
    assert torch.equal(whole.lengths, sides.long() * (sides.long() // 2))
    shares = (batch.lengths / whole.lengths)[sides == 8]
    assert 0.2 < shares.min() < 0.35 and 0.9 < shares.max() <= 1 and abs(float(shares.mean()) - 0.625) < 0.06
    half = field(samples, WORDS, Stage(keep=0.5))
    assert ((half.lengths / whole.lengths)[sides == 8] <= 0.54).all() and torch.equal(half.lengths <= batch.lengths, batch.lengths > 0)


def test_evaluation_sees_the_whole_picture():
    picture = [np.zeros((40, 64, 3), dtype=np.uint8)]
    found, plain = Resolutions(size=64, patch=8, least=0.25).prepare(picture), Image(size=64, patch=8).prepare(picture)
    assert torch.equal(found.pos, plain.pos) and torch.equal(found.x, plain.x)


def test_refusals():
    with pytest.raises(ValueError, match="share is 1.5; it is a share of the samples"):
        Noisy(Caption(), 1.5)
    for wrong in ({"smallest": 0}, {"least": 0.0}, {"views": 2}):
        with pytest.raises(ValueError, match="and one view are needed"):
            Resolutions(**wrong)
