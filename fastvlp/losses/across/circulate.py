"""The way of the texts round the processes of a batch: between nodes in rings, and to everyone inside a node.

A node is ``node_size`` consecutive members. Members of the same place in all nodes form a ring, so that each text crosses the slow links
once per node, over as many links as a node has members; inside a node pieces go to everyone. Gradients go the opposite way, summed inside
each node. All of it happens while another block is computed. Nodes of one member make the plain ring; a single node gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .group import Exchange, Transfer
from .split_batch import SplitBatch

Visit = Callable[[Tensor, list[int]], Tensor | None]


@dataclass(frozen=True)
class Circulated:
    """Where a round ended.

    Attributes:
        own: [b, D] the gradient of this member's texts so far, in the dtype of sums, or None. home: brings the rest.
        held: what a round back begins with: the last block, and the text that this member had to hand on before.
    """

    own: Tensor | None
    home: Transfer
    held: tuple[Tensor, ...]

    def gradient(self) -> Tensor | None:
        """[b, D]: the whole gradient of this member's texts."""
        return None if self.own is None else summed([self.own, *self.home.wait()], self.own.dtype)


class Ring:
    """Who is where: nodes by their distance from this member's, against the direction in which the texts move."""

    def __init__(self, batch: SplitBatch, direction: int) -> None:
        self.width = batch.node_size
        self.nodes = batch.members.size // self.width
        self.node, self.place = divmod(batch.members.rank, self.width)
        self._direction = direction
        self._sizes = batch.sizes

    def rank(self, distance: int, place: int) -> int:
        """The member at a place of the node ``distance`` hops before this one; -1 is the next one."""
        return (self.node - self._direction * distance) % self.nodes * self.width + place

    def rows(self, distance: int) -> int:
        """How many texts the member of this place has."""
        return self._sizes[self.rank(distance, self.place)]

    def others(self, distance: int) -> list[int]:
        """Everyone of a node but this member."""
        return [rank for rank in (self.rank(distance, place) for place in range(self.width)) if rank != self.rank(0, self.place)]

    def split(self, distance: int, block: Tensor) -> dict[int, Tensor]:
        """The rows of a block of ``others(distance)``, by their place in the node."""
        owners = self.others(distance)
        return dict(zip((rank % self.width for rank in owners), block.split([self._sizes[rank] for rank in owners]), strict=True))

    def empty(self, distance: int, like: Tensor) -> Tensor:
        """Space for the texts of ``others(distance)``."""
        return like.new_empty(sum(self._sizes[rank] for rank in self.others(distance)), like.shape[1])


def circulate(batch: SplitBatch, text: Tensor, direction: int, visit: Visit, held: Sequence[Tensor] = ()) -> Circulated:
    """Call ``visit(block, owners)`` for all texts of the batch, each block while the next is on its way.

    Outward: the own texts, the others of this node, then node by node. Back, with ``held``, the reverse, so that work covers the last hop.

    Args:
        text: [b, D] this member's, contiguous, in the dtype that travels. direction: 1 or -1, between nodes.
        visit: gives this member's part of the block's gradient, or always None.

    Raises:
        RuntimeError: a member died, or did not answer in time.
    """
    ring, members = Ring(batch, direction), batch.members
    width, nodes = ring.width, ring.nodes
    lag = int(width > 1)  # a node hands a text round one turn after it has come, and sums a gradient one turn before it leaves
    home = nodes + 2 * lag
    back = bool(held)
    peers = [place for place in range(width) if place != ring.place]
    there, behind = ring.rank(-1, ring.place), ring.rank(1, ring.place)
    block, shard = (held[0], held[-1]) if back else (text, text)
    before, own, part, carried = text, None, None, None

    # Each turn: start what travels, compute the block that is here, wait, sum up what came.
    for turn in range(1 + lag if back else 0, home + 1):
        exchange = Exchange(members)
        if turn == nodes:
            shard = text  # the last node on the way back is the own one
        following, hopped, gradients = None, None, []
        if lag and turn < nodes + back:
            following = ring.empty(turn, shard)
            pieces = ring.split(turn, following)
            if ring.place in pieces:
                # What came from the ring is part of the node's block like what the peers hand over.
                pieces[ring.place].copy_(shard)
            for place in peers:
                exchange.send(shard, ring.rank(0, place))
                exchange.receive(pieces[place], ring.rank(0, place))
        if turn + 1 < nodes:
            exchange.send(shard, there)
            hopped = exchange.receive(shard.new_empty(ring.rows(turn + 1), shard.shape[1]), behind)
        if part is not None:
            pieces = ring.split(turn - 2, part)
            gradients += [pieces[ring.place]] if ring.place in pieces else []
            for place in peers:
                exchange.send(pieces[place], ring.rank(0, place))
                gradients.append(exchange.receive(part.new_empty(ring.rows(turn - 2), part.shape[1]), ring.rank(0, place)))
        if carried is not None:
            exchange.send(carried, there)
            gradients.append(exchange.receive(carried.new_empty(ring.rows(turn - 2 * lag), carried.shape[1]), behind))
        # All of a turn's messages start as one group: NCCL would block on the first of two that wait for each other.
        transfer = exchange.start()

        made = None
        # The own texts need nobody: they cover the first hop outward and the last one home.
        if turn == (home if back else 0):
            own = visit(text, [members.rank])
        elif turn - lag < nodes + back:
            owners = ring.others(turn - lag)
            made = visit(block, owners) if owners else None
        if turn == home:
            break
        transfer.wait()

        if lag:
            # Inside a node gradients travel as features do; the sum over members is made on arrival, in float32.
            part = None if made is None else made.to(batch.travels)
        elif made is not None:
            gradients.append(made)
        total = summed(gradients, batch.sums) if gradients else None
        if total is not None and own is not None and turn == 2 * lag:
            own, total = own + total, None
        carried = total
        if hopped is not None:
            before, shard = shard if lag else text, hopped
        arrived = following if lag else hopped
        if arrived is not None:
            block = arrived
    return Circulated(own, transfer, (block, before) if lag else (block,))


def summed(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of at least one tensor in ``dtype``, which may be that of the first one."""
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total = total + part
    return total
