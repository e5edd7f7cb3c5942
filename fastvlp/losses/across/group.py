"""The processes whose pairs form one batch, and what they exchange."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastvlp_kernels._logsumexp import LogSumExp, from_sums

if dist.is_available():
    # Default arguments in it are the group that exists when it is imported, and keep that one connected beyond its destruction, so that
    # others wait for a process that has given up. The first custom operator imports it: here that is before there is a group.
    import torch.distributed.nn  # noqa: F401


@dataclass(frozen=True)
class Members:
    """The processes of one contrastive batch as one of them sees them; alone it is Members(None, 0, 1)."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, loss: str, group: Group) -> Members:
        """The members of ``group``; None: those of the default process group, or this process alone where there is none.

        Raises:
            ValueError: this process is not in ``group``.
            RuntimeError: a group was given, but torch.distributed is not running.
        """
        if isinstance(group, Members):
            return group
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise RuntimeError(f"{loss}: a group was given, but torch.distributed is not initialised; call init_process_group first")
            return cls(None, 0, 1)
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(
                f"{loss}: this process, rank {dist.get_rank()}, is not in the loss's group; give it the one that it belongs to"
            )
        return cls(group, rank, dist.get_world_size(group))

    def node_size(self, loss: str, told: int | None) -> int:
        """How many consecutive members make a node: ``told``, or as many as torchrun started on one machine (LOCAL_WORLD_SIZE).

        Raises:
            ValueError: it is not known, or the nodes would not have equally many members.
        """
        if self.size == 1:
            return 1
        if told is not None:
            if self.size % told:
                raise ValueError(
                    f"{loss}: node_size={told}, and the group has {self.size} processes; all nodes must have equally many of them"
                )
            return told
        local = os.environ.get("LOCAL_WORLD_SIZE")
        if local is None:
            raise ValueError(
                f"{loss}: strategy='grouped' does not know how many processes share a machine, since LOCAL_WORLD_SIZE is not set (torchrun"
                " sets it); pass node_size"
            )
        nodes = [self.global_rank(rank) // int(local) for rank in range(self.size)]
        runs = [len(list(run)) for _, run in itertools.groupby(nodes)]
        if len(set(runs)) > 1:
            raise ValueError(
                f"{loss}: the processes of the group lie on machines as {runs}; strategy='grouped' needs equally many on each, in the order"
                " of ranks: pass a node_size that divides their number, or use strategy='ring'"
            )
        return runs[0]

    def control_device(self) -> torch.device:
        """Where the few integers that processes agree on live: on the CPU if the backend can, which spares the device a wait."""
        if "cpu:" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def gather(self, tensor: Tensor) -> Tensor:
        """``tensor`` of every member: [W, *shape]; the shape is the same everywhere."""
        result = tensor.new_empty(self.size, *tensor.shape)
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        all_gather(result.view(-1), tensor.reshape(-1), group=self.group)
        return result

    def gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all members, [sum(sizes), D], from [sizes[rank], D] of each; unequal sizes travel padded to the largest."""
        largest = max(sizes)
        if min(sizes) == largest:
            return self.gather(rows).flatten(0, 1)
        padded = rows.new_zeros(largest, rows.shape[1])
        padded[: len(rows)] = rows
        return torch.cat([block[:size] for block, size in zip(self.gather(padded), sizes, strict=True)])

    def scatter_sum(self, rows: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """This member's rows [sizes[rank], D] of the sum over members of ``rows`` [sum(sizes), D].

        One all-to-all and a sum in ``dtype`` on arrival: unequal sizes on every backend, and 16-bit rows are rounded once, not at every
        hop.
        """
        own = sizes[self.rank]
        arrived = rows.new_empty(self.size * own, rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), [own] * self.size, list(sizes), group=self.group)
        return arrived.view(self.size, own, -1).sum(0, dtype=dtype)

    def sum(self, partial: Tensor) -> Tensor:
        """The elementwise sum over members of ``partial``."""
        if self.size == 1:
            return partial
        # all_reduce writes in place, and the caller still needs its part.
        total = partial.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def logsumexp(self, partial: LogSumExp) -> LogSumExp:
        """The elementwise log-sum-exp over members: two reductions, a maximum and a sum in float64. NaN stays NaN."""
        return self.merge(partial)[0]

    def merge(self, partial: LogSumExp) -> tuple[LogSumExp, Tensor]:
        """The log-sum-exp over members, and the share that this member's ``partial`` has in it: exp(partial - logsumexp), 0 of nothing."""
        largest = partial.reference.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        # Nothing was summed anywhere: -inf minus -inf would be NaN.
        largest.masked_fill_(largest == -torch.inf, 0.0)
        part = ((partial.reference.double() - largest.double()) + partial.log.double()).exp()
        total = self.sum(part)
        share = part / total.masked_fill(total == 0, 1.0)
        return from_sums(largest, total, largest.dtype), share.to(largest.dtype)

    def global_rank(self, rank: int) -> int:
        """The rank among all processes of the member ``rank``."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


ALONE = Members(None, 0, 1)
Group = dist.ProcessGroup | Members | None  # the processes that share a batch; None: all; ALONE: this process, whatever others do


class Exchange:
    """Tensors between this member and others that travel together; every send meets a receive, in the same order for any two members."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._operations: list[dist.P2POp] = []
        self._sent: list[Tensor] = []
        self._received: list[Tensor] = []
        self._counts: Counter[tuple[bool, int]] = Counter()

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a contiguous tensor, unchanged until the transfer is waited for."""
        self._sent.append(tensor)
        self._add(dist.isend, tensor, rank)

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """Fill a contiguous tensor, by the time that the transfer has been waited for; returns it."""
        self._received.append(tensor)
        self._add(dist.irecv, tensor, rank)
        return tensor

    def start(self) -> Transfer:
        """Everything on its way."""
        works = dist.batch_isend_irecv(self._operations) if self._operations else []
        return Transfer(works, self._sent, self._received)

    def _add(self, operation: Callable[..., Any], tensor: Tensor, rank: int) -> None:
        there = self._members.global_rank(rank)
        tag = self._counts[operation is dist.isend, rank]
        self._counts[operation is dist.isend, rank] += 1
        self._operations.append(dist.P2POp(operation, tensor, there, self._members.group, tag))


class Transfer:
    """Tensors on their way between members. One that is dropped is waited for: a receive that ends early leaves its sender waiting."""

    def __init__(self, works: list[dist.Work], sent: list[Tensor], received: list[Tensor]) -> None:
        self._works = works
        self._sent = sent
        self._received = received

    def wait(self) -> list[Tensor]:
        """What was received, once it is here and what was sent may change again; a second call returns it at once.

        Raises:
            RuntimeError: another member died, or did not answer within the process group's timeout.
        """
        works, self._works = self._works, []
        try:
            while works:
                works.pop(0).wait()
        finally:
            works.clear()  # after an error others may still arrive: not in tensors that go before what fills them
        self._sent = []
        return self._received

    def __del__(self) -> None:
        self.wait()
