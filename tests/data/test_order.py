"""The global order of samples, against a plain permutation and on a large set."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from fastvlp.data.order import Order


class Counted(SimpleNamespace):
    """An index that knows the counts and remembers which it was asked for."""

    def __init__(self, counts):
        super().__init__(paths=[str(i) for i in range(len(counts))], counts=counts, asked=set())

    def count(self, number):
        self.asked.add(number)
        return self.counts[number]


COUNTS = [5, 0, 7, 1, 12, 3]


def _places(picks):
    return list(zip(picks.shard.tolist(), picks.member.tolist(), strict=True))


@pytest.mark.parametrize("shuffle", [1, 8, 1000])
def test_each_epoch_is_a_permutation(shuffle):
    places = _places(Order(Counted(COUNTS), 3, shuffle).take(0, 28 * 5))
    every = sorted((shard, member) for shard, count in enumerate(COUNTS) for member in range(count))
    epochs = [places[28 * e:28 * e + 28] for e in range(5)]
    assert all(sorted(epoch) == every for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert places != _places(Order(Counted(COUNTS), 4, shuffle).take(0, 28 * 5))


@pytest.mark.parametrize("shuffle", [1, 8, 1000])
def test_any_slice_from_any_place(shuffle):
    whole = Order(Counted(COUNTS), 3, shuffle).take(0, 200)
    order = Order(Counted(COUNTS), 3, shuffle)
    for first, n in [(150, 50), (0, 1), (27, 2), (3, 90), (0, 0), (199, 1), (60, 7)]:  # back and forth
        part = order.take(first, n) if n else order.take(first, 1)
        n = max(n, 1)
        assert _places(part) == _places(whole)[first:first + n]
        assert np.array_equal(part.seeds, whole.seeds[first:first + n])


@pytest.mark.parametrize("shuffle", [1, 8, 1000])
def test_another_sample_of_the_window(shuffle):
    picks = Order(Counted(COUNTS), 3, shuffle).take(0, 28 * 200)
    own, other = _places(picks), [tuple(place) for place in picks.other.tolist()]
    assert all(a != b or a == (3, 0) for a, b in zip(own, other, strict=True))  # shard 3 holds one sample, and may be a window of its own
    assert shuffle > 1 or all(a[0] == b[0] for a, b in zip(own, other, strict=True))
    if shuffle == 1000:  # each of the 27 others is as likely
        hits = np.bincount([sum(COUNTS[:shard]) + member for shard, member in other], minlength=28)
        assert hits.min() > 200 - 6 * 200**0.5 and hits.max() < 200 + 6 * 200**0.5


def test_a_set_smaller_than_a_batch():
    Order(Counted(COUNTS), 3, 8).require(28)
    with pytest.raises(ValueError, match="a batch of 29 is larger than its data: 0 and 5 others hold 28 usable samples"):
        Order(Counted(COUNTS), 3, 8).require(29)
    index = Counted([1000] * 1000)
    Order(index, 3, 8).require(4096)
    assert len(index.asked) == 5  # and no more headers are read


def test_one_window_mixes_all_shards_evenly():
    """Where a sample lands is uniform over the epoch: mean and spread of the place of one sample over many epochs."""
    n, epochs = 28, 3000
    places = _places(Order(Counted(COUNTS), 0, 1000).take(0, n * epochs))
    landed = np.array([place % n for place, sample in enumerate(places) if sample == (2, 0)])
    assert len(landed) == epochs
    assert abs(landed.mean() - (n - 1) / 2) < 5 * np.sqrt((n**2 - 1) / 12 / epochs)
    assert np.bincount(landed, minlength=n).min() > epochs / n - 6 * np.sqrt(epochs / n)


def test_seeds_do_not_repeat():
    seeds = Order(Counted([1000]), 0, 10).take(0, 20_000).seeds
    assert len(set(seeds.tolist())) == 20_000


def test_a_million_samples_start_at_once():
    index = Counted([1000] * 1000)
    began = time.process_time()
    order = Order(index, 0, 1 << 15)
    order.take(0, 4096)
    assert len(index.asked) == 33  # the shards of the first window
    order.take(700_000, 4096)  # a restart counts the shards before its place, and builds no window but its own
    assert len(index.asked) < 760
    assert time.process_time() - began < 2


def test_nothing_to_read():
    with pytest.raises(RuntimeError, match="none of the 3 shards holds a usable sample"):
        Order(Counted([0, 0, 0]), 0, 10).take(0, 1)
