"""One batch of pairs of which every process has a part, and how the processes make sure that all of them call a loss alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels._logsumexp import LogSumExp

from .group import Members

LENGTH = 2048  # bytes in which a call is described: the same on all processes, or the collective itself would not fit


@dataclass(frozen=True)
class SplitBatch:
    """One batch of pairs spread over its members.

    Attributes:
        sizes: pairs of each member. dtype: of products, and of features that travel.
        sums: of statistics and gradients, float32 (float64 for float64). node_size: consecutive members with fast links.
    """

    members: Members
    sizes: tuple[int, ...]
    dtype: torch.dtype
    sums: torch.dtype
    node_size: int = 1

    def start(self, rank: int) -> int:
        """The place of ``rank``'s first pair in the whole batch."""
        return sum(self.sizes[:rank])

    def place(self, columns: Tensor, values: Tensor, owners: Sequence[int]) -> None:
        """Write ``values`` [..., n], of the texts of ``owners``, into ``columns`` [..., N], of those of all members."""
        parts = values.split([self.sizes[owner] for owner in owners], -1)
        for owner, part in zip(owners, parts, strict=True):
            columns.split(self.sizes, -1)[owner].copy_(part)

    def take(self, columns: LogSumExp, owners: Sequence[int]) -> LogSumExp:
        """Those of the texts of ``owners``."""
        parts = [values.split(self.sizes, -1) for values in columns]
        return LogSumExp(*(torch.cat([part[owner] for owner in owners], -1) for part in parts))

    def own(self, columns: LogSumExp) -> LogSumExp:
        """This member's part of log-sum-exps [..., N] of the texts of all members."""
        return LogSumExp(*(values.split(self.sizes, -1)[self.members.rank] for values in columns))

    @property
    def factor(self) -> float:
        """W / N: by it a sum over this process's pairs becomes its share, so that the mean of the shares is the mean over pairs."""
        return self.members.size / sum(self.sizes)

    @property
    def travels(self) -> torch.dtype:
        """Of parts of gradients that are summed where they arrive: that of the products, but not float16, whose range is too small."""
        return self.sums if self.dtype == torch.float16 else self.dtype


def told_sizes(loss: str, local_sizes: Sequence[int], members: Members, pairs: int) -> tuple[int, ...]:
    """``local_sizes`` as the number of pairs of each member.

    Raises:
        TypeError: no sequence. ValueError: not one positive number per member, or not this member's own at its place.
    """
    if not isinstance(local_sizes, Sequence):
        raise TypeError(f"{loss}: local_sizes is {type(local_sizes).__name__}; it must be a list, the number of pairs of each process")
    sizes = tuple(int(size) for size in local_sizes)
    if len(sizes) != members.size:
        raise ValueError(f"{loss}: local_sizes has {len(sizes)} numbers; give one for each process of the group, {members.size}")
    if min(sizes) < 1:
        raise ValueError(f"{loss}: local_sizes is {list(sizes)}; every process needs at least one pair")
    if sizes[members.rank] != pairs:
        raise ValueError(f"{loss}: local_sizes is {list(sizes)}, but rank {members.rank} of the group was called with {pairs} pairs")
    return sizes


def features_alike(image: Tensor, dtype: torch.dtype, trains: Sequence[bool]) -> dict[str, object]:
    """What every loss asks to be the same on all members, for ``agree``."""
    return {
        "width of the features": image.shape[1],
        "dtype of the features, or of autocast": dtype,
        "inputs that need a gradient": [place for place, wants in enumerate(trains) if wants],
    }


def agree(loss: str, members: Members, counts: Sequence[int], alike: Mapping[str, object]) -> list[list[int]]:
    """``counts`` of each member, by one collective of 2 KiB, which also makes sure that all call the loss alike.

    Args:
        counts: as many on all members. alike: what must be equal, by name, as numbers and short texts.

    Raises:
        RuntimeError: another member refused its input. ValueError: the members differ (in what, and who).
    """
    calls = _tell(members, json.dumps([counts, {name: str(value) for name, value in alike.items()}]))
    for rank, call in enumerate(calls):
        if call is None:
            raise RuntimeError(f"{loss}: stopped, because rank {rank} of the group refused its input; that process's own error says why")
    (_, first), *_ = calls
    for rank, (_, others) in enumerate(calls):
        for name in first | others:
            if (mine := first.get(name)) != (theirs := others.get(name)):
                got = f"differ in the {name} ({mine} and {theirs})"
                raise ValueError(f"{loss}: ranks 0 and {rank} of the group {got}; all processes must call the loss alike")
    return [found for found, _ in calls]


def tell_refusal(members: Members) -> None:
    """Take this process's part in ``agree`` when it cannot go on, so that the others stop too instead of waiting."""
    _tell(members, "null")


def _tell(members: Members, text: str) -> list[Any]:
    written = text.encode()
    if len(written) > LENGTH:
        raise ValueError(f"a call of a loss is described in {len(written)} bytes, {LENGTH} at most: fewer or shorter arguments are needed")
    # Bytes in a tensor: object collectives of torch pickle, and take two exchanges.
    told = torch.frombuffer(bytearray(written.ljust(LENGTH)), dtype=torch.uint8).to(members.control_device())
    rows = members.gather(told).cpu()
    # Nearly always all tell the same: one comparison instead of W parses.
    if bool((rows == rows[0]).all()):
        return [json.loads(bytes(rows[0].tolist()))] * len(rows)
    return [json.loads(bytes(row.tolist())) for row in rows]
