"""Packing under a token budget: every item once, no bin too full, little waste, little time."""

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.packing import Packer, microbatches, pack

streams = st.integers(1, 300).flatmap(
    lambda budget: st.tuples(st.just(budget), st.lists(st.integers(1, budget), max_size=80), st.integers(1, 40))
)


def waste(lengths: list[int], bins: list[list[int]], budget: int) -> float:
    return 1 - sum(lengths) / (len(bins) * budget)


def images(count: int, sides: tuple[int, int], patch: int, seed: int = 0) -> list[int]:
    """Token counts of pictures with a uniform size and a log-uniform aspect ratio between 1:2 and 2:1."""
    rng = random.Random(seed)
    counts = []
    for _ in range(count):
        side, aspect = rng.uniform(*sides), 2 ** rng.uniform(-0.5, 0.5)
        counts.append(max(1, int(side * aspect / patch)) * max(1, int(side / aspect / patch)))
    return counts


@given(streams)
@settings(max_examples=100, deadline=None)
def test_every_index_once_and_no_bin_over_budget(stream):
    budget, lengths, open_bins = stream
    for bins in (pack(lengths, budget, open_bins), microbatches(lengths, budget)):
        assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
        assert all(indices and sum(lengths[i] for i in indices) <= budget for indices in bins)


@given(streams)
@settings(max_examples=100, deadline=None)
def test_microbatches_are_sorted_by_length_and_ties_by_index(stream):
    budget, lengths, _ = stream
    for indices in microbatches(lengths, budget):
        assert indices == sorted(indices, key=lambda i: (lengths[i], i))


@given(streams)
@settings(max_examples=100, deadline=None)
def test_never_more_than_twice_the_fewest_bins(stream):
    budget, lengths, _ = stream
    bins = pack(lengths, budget, open_bins=max(1, len(lengths)))
    assert len(bins) <= max(1, 2 * -(-sum(lengths) // budget)) or not lengths


def test_what_fits_into_one_bin_is_one_bin():
    assert microbatches([4, 3, 4], 12) == [[1, 0, 2]]
    assert microbatches(torch.tensor([2, 2, 1]), 5) == [[2, 0, 1]]
    assert pack([], 12) == []


def test_bins_are_carried_over_the_stream():
    packer = Packer(10, open_bins=2)
    assert packer.add(6) is None
    assert packer.add(7) is None
    assert packer.add(4) == [0, 2]  # fills the first bin although a later one is open
    assert packer.add(10) == [3]
    assert packer.add(8) is None
    assert packer.add(9) == [4]  # a third bin: the fullest goes
    assert sorted(map(sorted, packer.flush())) == [[1], [5]]
    assert packer.add(10) == [6]
    assert packer.flush() == []


@pytest.mark.parametrize(
    ("name", "lengths", "most"),
    [
        ("patch 16, sides 64-256", images(20000, (64, 256), 16), 0.005),
        ("patch 14, sides 224-896", images(20000, (224, 896), 14), 0.005),
        ("uniform 64-256", [random.Random(i).randint(64, 256) for i in range(20000)], 0.005),
        ("captions", [min(24, 3 + int(random.Random(i).expovariate(0.18))) for i in range(20000)], 0.005),
        ("NaFlex, 225-256", [random.Random(i).randint(225, 256) for i in range(20000)], 0.025),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_waste_at_sixteen_times_the_mean(name, lengths, most):
    budget = 16 * sum(lengths) // len(lengths)
    assert waste(lengths, pack(lengths, budget), budget) <= most


def test_cost_is_about_a_microsecond_per_image():
    lengths = images(20000, (64, 256), 16)
    budget = 16 * sum(lengths) // len(lengths)
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        pack(lengths, budget)
        best = min(best, time.thread_time() - start)
    assert best / len(lengths) < 4e-6  # generous: a machine may be slow; the aim is 1e-6


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 0], "item 1 has length 0"), ([-2], "item 0 has length -2"), ([3, 11], "item 1 has 11 tokens, over the budget of 10")],
)
def test_lengths_that_cannot_be_packed_are_refused(lengths, message):
    for function in (pack, microbatches):
        with pytest.raises(ValueError, match=message):
            function(lengths, 10)


def test_a_refused_item_takes_no_number():
    packer = Packer(10)
    with pytest.raises(ValueError, match="raise it to at least 11"):
        packer.add(11)
    assert packer.add(10) == [0]


@pytest.mark.parametrize(("budget", "open_bins"), [(0, 32), (10, 0)])
def test_a_packer_needs_a_budget_and_a_bin(budget, open_bins):
    with pytest.raises(ValueError, match="must both be at least 1"):
        Packer(budget, open_bins)
