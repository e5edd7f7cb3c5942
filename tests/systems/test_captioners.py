"""Captioners by the chain rule, word by word and picture by picture; and what they write."""

from types import SimpleNamespace

import pytest
import torch

from fastvlp.data.fields import Caption
from fastvlp.systems.captioner import Captioner, write
from tests.systems.small import MAKERS, make, whole

NAMES = ("simvlm", "coca", "blip2", "unified_vlp", "solo", "pyramid_drop", "ep_alm", "adem_vl", "pix2struct",
         "llama_fusion")


def batch():
    return whole().take([4, 1, 6])


def one(packed, row, first=None):
    picked = packed.take([row])
    return picked if first is None else picked.first(first)


def test_all_captioners_are_tested():
    assert {name for name in MAKERS if isinstance(make(name), Captioner)} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_likelihood_is_the_product_over_words(name):
    """Each word's logits from the words before it alone: what comes later, and other captions, change nothing."""
    system, given = make(name), batch()
    with torch.no_grad():
        expected = []
        for row, words in enumerate(given.text.segments()):
            logits = [system.next_words(one(given.image, row), one(given.text, row, n))[0] for n in range(1, len(words))]
            chances = [each.exp() / each.exp().sum() for each in logits]
            expected.append(-sum(chance[word].log() for chance, word in zip(chances, words[1:].tolist(), strict=True)))
        found = system.caption_nll(given.image, given.text)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, system.caption_nll(given.image.take([1, 2, 0]), given.text), rtol=1e-6), "the picture does not matter"


@pytest.mark.parametrize("name", ["coca", "unified_vlp"])
def test_the_likeliest_words_are_written(name):
    system, given, end = make(name), batch(), 9
    found = system.generate(given.image, start=[3, 1], end=end, most=5)
    for row, caption in enumerate(found):
        words = [3, 1]
        for _ in range(5):
            place = torch.stack([torch.arange(len(words)), *[torch.full((len(words),), -1)] * 2], 1).int()
            so_far = given.text.take([0]).of(torch.tensor(words), [len(words)], pos=place)
            words.append(int(system.next_words(one(given.image, row), so_far).argmax()))
            if words[-1] == end:
                break
        assert caption == [word for word in words[2:] if word != end]


def test_each_caption_ends_on_its_own_and_is_asked_no_more():
    plans, asked = {0: [5, 6, 0], 1: [0], 2: [7, 7, 7, 7, 7]}, []

    def follow(rows, texts):
        asked.append(list(rows))
        done = [len(texts.segments()[place]) - 1 for place in range(len(rows))]
        return torch.nn.functional.one_hot(torch.tensor([plans[row][n] for row, n in zip(rows, done, strict=True)]), 8).float()

    assert write(follow, 3, start=[1], end=0, most=4) == [[5, 6], [], [7, 7, 7, 7]]
    assert asked == [[0, 1, 2], [0, 2], [0, 2], [2]]


def test_top_p_draws_among_the_likeliest_in_their_proportion():
    """Chances 0.4, 0.3, 0.2, 0.1: the fewest with at least 0.6 together are the first two, and of 0.75 the first three."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0]).log()
    for top_p, allowed in ((0.6, {1: 4 / 7, 3: 3 / 7}), (0.75, {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}), (0.3, {1: 1.0})):
        drawn = write(lambda rows, texts: logits.repeat(len(rows), 1), 4000, start=[0], end=4, most=1, top_p=top_p,
                      generator=torch.Generator().manual_seed(0))
        counts = torch.tensor([word for (word,) in drawn]).bincount(minlength=5) / 4000
        assert {word for word, share in enumerate(counts.tolist()) if share} == set(allowed)
        assert all(abs(counts[word] - share) < 0.04 for word, share in allowed.items())  # five standard deviations


def test_the_field_or_the_tokenizer_says_where_captions_start_and_end():
    system = make("coca")
    with pytest.raises(ValueError, match="neither tokenizer nor field says"):
        system.generate(batch().image)
    expected = system.generate(batch().image, start=[3], end=4, most=3)
    system.fields = {"text": Caption(ends=(3, 4))}
    assert system.generate(batch().image, most=3) == expected != system.generate(batch().image, start=[5], most=3)
    system.fields = {}
    system.tokenizer = SimpleNamespace(start=[3], end=[4])
    assert system.generate(batch().image, most=3) == expected


@pytest.mark.parametrize("options", [{"start": []}, {"most": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}])
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(ValueError, match="start holds an id"):
        write(lambda rows, texts: torch.zeros(1, 4), 1, **{"start": [1], "end": 0, **options})
