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
