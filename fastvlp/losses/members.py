"""The processes whose pairs form one batch, and what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Members:
    """The processes of one contrastive batch as one of them sees them; alone it is Members(None, 0, 1)."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, loss: str, group: dist.ProcessGroup | None) -> Members:
        """The members of ``group``; without one, those of the default process group, or this process alone where there is none.

        Raises:
            ValueError: this process is not in ``group``.
            RuntimeError: a group was given, but torch.distributed is not running.
        """
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

        A reduce-scatter as one all-to-all and a sum in ``dtype`` on arrival: it moves the same bytes, takes unequal sizes on every
        backend, and rounds low-precision rows once where a reduction in transit would round them at every hop.
        """
        own = sizes[self.rank]
        arrived = rows.new_empty(self.size * own, rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), [own] * self.size, list(sizes), group=self.group)
        return arrived.view(self.size, own, -1).sum(0, dtype=dtype)

    def logsumexp(self, partial: Tensor) -> Tensor:
        """The elementwise logsumexp over members of ``partial``: two reductions, a maximum and a sum. NaN stays NaN."""
        largest = partial.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        total = torch.exp(partial - largest)
        dist.all_reduce(total, group=self.group)
        return largest + total.log()

    def shift(self, direction: int, sent: Sequence[Tensor], rows: Sequence[int]) -> Transfer:
        """Start to send matrices to the neighbour at ``rank + direction`` and to receive as many from the one at ``rank - direction``.

        Args:
            direction: 1 or -1.
            sent: contiguous matrices [., D], unchanged until the transfer is waited for.
            rows: how many rows each matrix to receive has; its width and dtype are those of the matrix sent in its place.
        """
        received = [tensor.new_empty(count, tensor.shape[1]) for tensor, count in zip(sent, rows, strict=True)]
        there, back = (self._global_rank(self.rank + step) for step in (direction, -direction))
        operations = [dist.P2POp(dist.isend, tensor, there, self.group, tag) for tag, tensor in enumerate(sent)]
        operations += [dist.P2POp(dist.irecv, tensor, back, self.group, tag) for tag, tensor in enumerate(received)]
        return Transfer(dist.batch_isend_irecv(operations) if operations else [], list(sent), received)

    def _global_rank(self, rank: int) -> int:
        rank %= self.size
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class Transfer:
    """Matrices on their way between neighbours. One that is dropped is waited for: a receive that ends early leaves its sender waiting."""

    def __init__(self, works: list[dist.Work], sent: list[Tensor], received: list[Tensor]) -> None:
        self._works = works
        self._sent = sent
        self._received = received

    def wait(self) -> list[Tensor]:
        """What was received, once it is here and what was sent may change again; a second call returns it at once.

        Raises:
            RuntimeError: a neighbour died, or did not answer within the process group's timeout.
        """
        works, self._works = self._works, []
        for work in works:
            work.wait()
        self._sent = []
        return self._received

    def __del__(self) -> None:
        self.wait()
