"""Batches: some of their samples, micro-batches, and what they refuse."""

import pytest
import torch

from fastvlp.data import Batch
from fastvlp_kernels.packed import Packed

LENGTHS = [[3, 1], [0, 2], [5, 5], [1, 1], [2, 7]]
FLAT = [length for each in LENGTHS for length in each]


def _batch(**more):
    views = Packed.of(torch.arange(sum(FLAT)), FLAT, pos=torch.arange(3 * sum(FLAT)).view(-1, 3).int())
    text = Packed.of(torch.arange(100, 115), [1, 2, 3, 4, 5])
    return Batch({"views": views, "text": text, "label": torch.arange(5) * 10}, torch.arange(5) + 50, keys=list("abcde"), **more)


def _entries(batch):
    """Of each sample: its views, words, label, id and key."""
    views, each = batch.views.segments(), len(batch.views) // len(batch)
    return [([view.tolist() for view in views[i * each:i * each + each]], batch.text.segments()[i].tolist(), int(batch.label[i]),
             int(batch.ids[i]), batch.keys[i]) for i in range(len(batch))]


@pytest.mark.parametrize("rows", [[0], [4, 1], [2, 2, 0], [0, 1, 2, 3, 4]])
def test_some_of_the_samples(rows):
    batch = _batch(counts={"words": 15})
    part, whole = batch.take(rows), _entries(batch)
    assert _entries(part) == [whole[row] for row in rows]
    assert torch.equal(part.views.pos[:, 0], part.views.x.int() * 3)
    assert (part.total, part.world, part.counts) == (5, 1, {"words": 15})


def test_micro_batches_hold_every_sample_once_within_the_budgets():
    batch, budgets = _batch(), {"views": 12, "text": 7}
    k = batch.microbatches(budgets, {"views": 8, "text": 8})
    parts = [batch.take(rows) for rows in batch.split(k, {"views": 8, "text": 8})]
    assert sorted(entry for part in parts for entry in _entries(part)) == sorted(_entries(batch))
    assert all(part.views.total <= 12 and part.text.total <= 7 and part.total == 5 for part in parts) and k >= 3
    assert [len(rows) for rows in batch.split(5, {})] == [1] * 5
    assert batch.microbatches({}, {}) == 1
    with pytest.raises(ValueError, match="a sample has 10 tokens in the stream 'views', over the budget of 9"):
        batch.microbatches({"views": 9}, {})


def test_a_batch_without_packed_streams():
    batch = Batch({"vector": torch.zeros(4, 3)}, torch.arange(4))
    assert batch.microbatches({}, {}) == 1 and sorted(torch.cat(batch.split(3, {})).tolist()) == [0, 1, 2, 3]


def test_a_stream_that_is_not_there():
    with pytest.raises(AttributeError, match="the batch has no stream 'image'; this recipe's fields are views, text, label"):
        _batch().image  # noqa: B018


def test_sizes_of_processes():
    batch = _batch(sizes=(5, 4), first=0)
    assert (batch.total, batch.world) == (9, 2) and (batch.take([0]).total, batch.take([0]).world) == (9, 2)
    counted = _batch(sizes=(5, 4), counts={"words": 30})
    assert torch.equal(counted.per_token(torch.full((5,), 2.0), "words"), torch.full((5,), 2.0 * 9 / 30))
