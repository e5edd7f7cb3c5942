"""Samples into micro-batches of equal work; all streams of a sample stay together."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapreplace

import numpy as np

WIDTH = 768  # of a tower whose width nobody says


def costs(samples: int, lengths: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> np.ndarray:
    """Operations of a transformer block over the segments of each sample, 24 C^2 n + 4 C n^2, summed over streams: float64 [samples].

    Args:
        lengths: by stream, the tokens of each segment [samples, segments of a sample]. widths: C by stream; 768 where it is not said.
    """
    total = np.zeros(samples)
    for name, each in lengths.items():
        width, tokens = float(widths.get(name, WIDTH)), each.astype(np.float64)
        total += (24 * width**2 * tokens + 4 * width * tokens**2).sum(1)
    return total


def split(costs: np.ndarray, k: int) -> list[np.ndarray]:
    """The rows of k parts, none empty, of nearly equal cost: the costliest first, each to the part with the least (LPT, Graham 1969).

    Inside a part, rows are sorted by cost, so that segments of equal length lie together.

    Raises:
        ValueError: k is not between 1 and the number of samples.
    """
    if not 1 <= k <= len(costs):
        raise ValueError(f"{len(costs)} samples cannot be split into {k} micro-batches; allowed are 1 to {len(costs)}: raise the token "
                         "budgets")
    part = _longest_first(costs, k)
    order = np.lexsort((costs, part))
    return np.split(order, np.bincount(part, minlength=k).cumsum()[:-1])


def parts(costs: np.ndarray, lengths: Mapping[str, np.ndarray], budgets: Mapping[str, int]) -> int:
    """The smallest k for which ``split(costs, k)`` keeps each part within the token budget of every stream.

    Args:
        lengths: by stream, tokens of each sample [n] or [n, segments]. budgets: most tokens of a part, for some of the streams.

    Raises:
        ValueError: a budget for a stream that there is not, or one that a single sample exceeds.
    """
    limits = []
    for name, budget in budgets.items():
        if name not in lengths:
            raise ValueError(f"there is a token budget for {name!r}, and no such packed stream; there are {', '.join(lengths)}")
        tokens = lengths[name].reshape(len(costs), -1).sum(1)
        if len(tokens) and tokens.max() > budget:
            raise ValueError(f"a sample has {tokens.max()} tokens in the stream {name!r}, over the budget of {budget}; raise it to at "
                             f"least {tokens.max()}")
        limits.append((tokens, budget))
    # No fewer parts can hold all tokens; how samples fall may take some more.
    k = max([1, *(-(-int(tokens.sum()) // budget) for tokens, budget in limits)])
    while k < len(costs):
        part = _longest_first(costs, k)
        if all(np.bincount(part, tokens, k).max() <= budget for tokens, budget in limits):
            break
        k += 1
    return k


def _longest_first(costs: np.ndarray, k: int) -> np.ndarray:
    """The part of each sample: int64 [n]."""
    if k == 1:
        return np.zeros(len(costs), dtype=np.int64)
    order = np.argsort(-costs, kind="stable")
    # The number of samples stands between load and part, so that samples without cost do not leave a part empty.
    heap = [(0.0, 0, part) for part in range(k)]
    chosen = []
    for cost in costs[order].tolist():
        load, count, part = heap[0]
        heapreplace(heap, (load + cost, count + 1, part))
        chosen.append(part)
    part_of = np.empty(len(costs), dtype=np.int64)
    part_of[order] = chosen
    return part_of
