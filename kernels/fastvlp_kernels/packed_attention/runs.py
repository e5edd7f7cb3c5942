"""Which segments are computed together: runs of segments with equal numbers of queries and of keys."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS_PER_RUN = 100  # moving this many tokens costs about as much as computing one more run


class Run(NamedTuple):
    """``batch`` segments that lie together, each of ``n`` queries and ``m`` keys: the first query, key and segment of the run."""

    q_start: int
    k_start: int
    segment: int
    batch: int
    n: int
    m: int

    @property
    def queries(self) -> slice:
        return slice(self.q_start, self.q_start + self.batch * self.n)

    @property
    def keys(self) -> slice:
        return slice(self.k_start, self.k_start + self.batch * self.m)


class Order(NamedTuple):
    """Where the queries, keys and segments of the sorted layout come from: int64 on the CPU."""

    q: Tensor
    k: Tensor
    segments: Tensor


@functools.lru_cache(maxsize=256)
def plan(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> tuple[tuple[Run, ...], Order | None]:
    """The runs, and the order of tokens that makes them (None: they lie together already, or moving them would cost more).

    Raises:
        ValueError: different numbers of segments, or a negative length.
    """
    if len(lengths_q) != len(lengths_k):
        raise ValueError(f"packed_attention: {len(lengths_q)} segments of queries, {len(lengths_k)} of keys; every segment needs both")
    pairs = list(zip(lengths_q, lengths_k, strict=True))
    if any(n < 0 or m < 0 for n, m in pairs):
        raise ValueError("packed_attention: a segment has a negative length; cu_seqlens must start at 0 and never decrease")
    runs = _runs(pairs)
    # Sorting segments by length makes the fewest runs, for the price of moving every token there and back.
    if (len(runs) - len(set(pairs))) * TOKENS_PER_RUN <= sum(lengths_q) + sum(lengths_k):
        return runs, None
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    return _runs([pairs[i] for i in order]), Order(_tokens(lengths_q, order), _tokens(lengths_k, order), torch.tensor(order))


def _runs(pairs: list[tuple[int, int]]) -> tuple[Run, ...]:
    runs: list[Run] = []
    q_start = k_start = first = 0
    for last, (n, m) in enumerate(pairs, start=1):
        if last == len(pairs) or pairs[last] != (n, m):
            runs.append(Run(q_start, k_start, first, last - first, n, m))
            q_start, k_start, first = runs[-1].queries.stop, runs[-1].keys.stop, last
    return tuple(runs)


def _tokens(lengths: tuple[int, ...], order: list[int]) -> Tensor:
    counts = torch.tensor(lengths)
    starts = counts.cumsum(0) - counts
    counts, starts = counts[order], starts[order]
    return torch.arange(int(counts.sum())) + (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
