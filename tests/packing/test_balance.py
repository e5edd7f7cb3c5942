"""Micro-batches of equal work, against all ways to divide a few samples."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.packing import costs, parts, split

numbers = st.lists(st.integers(0, 50), min_size=1, max_size=7)


def _loads(values, groups):
    return [sum(values[row] for row in group) for group in groups]


@given(numbers, st.data())
@settings(max_examples=100, deadline=None)
def test_exactly_k_parts_none_empty_and_within_four_thirds_of_the_best(values, data):
    k = data.draw(st.integers(1, len(values)))
    groups = [rows.tolist() for rows in split(np.array(values, dtype=np.float64), k)]
    assert len(groups) == k and all(groups) and sorted(sum(groups, [])) == list(range(len(values)))
    assert all(group == sorted(group, key=lambda row: (values[row], row)) for group in groups)
    if k**len(values) < 3000:
        best = min(max(np.bincount(ways, values, k)) for ways in itertools.product(range(k), repeat=len(values)))
        assert max(_loads(values, groups)) <= (4 / 3 - 1 / (3 * k)) * best + 1e-9  # Graham's bound


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12), st.integers(9, 40), st.integers(9, 40))
@settings(max_examples=100, deadline=None)
def test_the_fewest_parts_that_fit_every_budget(tokens, images, texts):
    lengths = {"image": np.array([[a, a // 2] for a, _ in tokens]), "text": np.array([[b] for _, b in tokens])}
    work = costs(len(tokens), lengths, {"image": 2, "text": 3})
    budgets = {"image": images + 5, "text": texts}

    def fits(k):
        return all(lengths[name][rows].sum() <= budget for rows in split(work, k) for name, budget in budgets.items())

    assert parts(work, lengths, budgets) == next(k for k in range(1, len(tokens) + 1) if fits(k))


def test_cost_is_that_of_a_transformer_block():
    lengths = {"image": np.array([[3, 5], [0, 1]]), "text": np.array([[4], [2]])}
    expected = [sum(24 * c**2 * n + 4 * c * n**2 for c, n in ((8, 3), (8, 5), (768, 4))),
                sum(24 * c**2 * n + 4 * c * n**2 for c, n in ((8, 0), (8, 1), (768, 2)))]
    assert costs(2, lengths, {"image": 8}).tolist() == expected
    assert costs(3, {}, {}).tolist() == [0, 0, 0]


def test_without_budgets_one_part():
    assert parts(np.ones(5), {}, {}) == 1
    assert [rows.tolist() for rows in split(np.array([3.0, 1.0, 2.0]), 1)] == [[1, 2, 0]]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="3 samples cannot be split into 4 micro-batches; allowed are 1 to 3"):
        split(np.ones(3), 4)
    with pytest.raises(ValueError, match="a sample has 9 tokens in the stream 'text', over the budget of 8"):
        parts(np.ones(2), {"text": np.array([[4, 5], [1, 1]])}, {"text": 8})
    with pytest.raises(ValueError, match="token budget for 'txt', and no such packed stream; there are text"):
        parts(np.ones(2), {"text": np.array([[4], [1]])}, {"txt": 8})
