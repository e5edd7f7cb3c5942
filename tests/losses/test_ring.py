"""Ring and grouped compute while they send, and hold what the pairs of one process, or of one node, need, however many there are."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from batches import LOSSES, Batch, averaged, gradients

from fastvlp.losses.across import circulate, group, ring
from fastvlp_kernels._testing import forbid_large_tensors

BLOCKS = ("softmax_block", "softmax_block_backward", "sigmoid_block")


@dataclass
class Clock:
    """Seconds as they would pass in a process where nothing but transfers and blocks takes time."""

    now: float = 0.0


class Delayed(group.Transfer):
    """A transfer that nobody can have before ``delay`` seconds have passed. All do the same, so a peer's starts with one's own."""

    def __init__(self, transfer: group.Transfer, clock: Clock, delay: float) -> None:
        super().__init__(transfer._works, transfer._sent, transfer._received)
        transfer._works = []
        self.clock, self.ready = clock, clock.now + delay * bool(self._works)

    def wait(self):
        self.clock.now = max(self.clock.now, self.ready)
        return super().wait()


@contextlib.contextmanager
def passing(module, blocks, hop, work):
    """A clock on which every hop takes ``hop`` seconds, and every call of these functions of ``module`` ``work`` seconds."""
    clock = Clock()

    def slow(compute):
        def block(*args):
            clock.now += work
            return compute(*args)

        return block

    with pytest.MonkeyPatch.context() as patch:
        start = group.Exchange.start
        patch.setattr(group.Exchange, "start", lambda exchange: Delayed(start(exchange), clock, hop))
        for name in blocks:
            patch.setattr(module, name, slow(getattr(module, name)))
        yield clock


def timed(rank, size, batch, hop, work):
    """Seconds of forward and backward where nothing but hops and blocks takes time."""
    with passing(ring, BLOCKS, hop, work) as clock:
        loss, _ = batch.call(rank)
        forward = clock.now
        loss.backward()
        return forward, clock.now - forward


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("strategy,blocks", [("ring", 4), ("grouped", 3)])
@pytest.mark.parametrize("hop,work", [(3, 3), (3, 1), (1, 3)], ids=["balanced", "slow-hops", "slow-blocks"])
def test_hops_hide_behind_work(processes, loss, strategy, blocks, hop, work):
    """Blocks take at most blocks * max(hop, work), forward, and backward too where it is a trip.

    On two nodes of two, a block is the own pairs', the neighbour's, or the other node's. The sigmoid's one trip ends with the sum of the
    last block's gradients inside the node, which nothing is left to hide behind.
    """
    slowest, bare = max(hop, work), hop * ((loss, strategy) == ("siglip", "grouped"))
    for forward, backward in processes.results(4, timed, Batch(loss, (3, 3, 3, 3), strategy, told=True), hop, work):
        assert (blocks - 1) * slowest < forward <= blocks * slowest + bare
        assert backward <= (blocks * slowest if loss == "clip" else hop)


def largest_tensor(rank, size, batch):
    tensors, module = batch.share(rank), batch.module()
    with forbid_large_tensors(10**9) as seen:
        module(*tensors.values()).backward()
    return seen.largest


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("strategy,node", [("ring", 1), ("grouped", 2)])
def test_no_tensor_is_larger_than_the_features_of_a_node(processes, loss, strategy, node):
    for size in (2, 4):
        batch = Batch(loss, (16,) * size, strategy, width=640)  # more than the 2 KiB by which each process says what it does
        assert max(processes.results(size, largest_tensor, batch)) == 16 * 640 * min(node, size // node)


def saved_bytes(rank, size, batch):
    """What a loss keeps for its backward, without its inputs."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, tensors = batch.call(rank)
    for tensor in tensors.values():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("strategy,shares", [("ring", 1), ("grouped", 2)])
def test_what_is_saved_is_one_block_and_two_numbers_per_column(processes, strategy, shares):
    """And, grouped by nodes of two, on two nodes no more than that: what is handed on next is the own text."""
    for size in (2, 4):
        batch = Batch("clip", (16,) * size, strategy, width=64)
        for found in processes.results(size, saved_bytes, batch):
            assert found <= 4 * (shares * 16 * 64 + 3 * 16 + 2 * 16 * size + 4)


def count_sends(rank, size, batch):
    """How many tensors this process sends inside its node of two, and to the other one."""
    to_node = []
    send = circulate.Exchange.send
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circulate.Exchange, "send", lambda exchange, tensor, to: (to_node.append(to // 2), send(exchange, tensor, to))[1])
        gradients(rank, size, batch)
    return to_node.count(rank // 2), len(to_node) - to_node.count(rank // 2)


@pytest.mark.parametrize(
    "loss,trains,inside,between",
    [
        ("clip", ("image", "scale"), 2 + 1, 1),
        ("siglip", ("image", "scale"), 2, 1),
        ("clip", ("image", "text"), 2 + 1 + 2, 1 + 1),
        ("siglip", ("text",), 2 + 2, 1 + 1),
    ],
)
def test_grouped_sends_a_text_once_to_a_node_and_a_gradient_once_back(processes, loss, trains, inside, between):
    """Two nodes of two: a text goes to the neighbour and to the peer of the other node, who hands it on; its gradient the same way.

    The softmax's way back needs the neighbour's text once more, and begins with the other node's, which is still there.
    """
    for found in processes.results(4, count_sends, Batch(loss, (4, 4, 4, 4), "grouped", trains=trains)):
        assert found == (inside, between)


@pytest.mark.parametrize("loss,trains,blocks", [("clip", ("image", "scale"), 3 + 2), ("siglip", ("image", "scale"), 3)])
def test_a_frozen_text_tower_sends_no_gradients(processes, loss, trains, blocks):
    batch = Batch(loss, (4, 4, 4, 4), "ring", trains=trains)
    for sent in processes.results(4, count_sends, batch):
        assert sum(sent) == blocks


def test_strategies_agree_on_one_group_of_many_blocks(processes):
    for loss in LOSSES:
        ours, *others = [
            averaged(processes.results(4, gradients, Batch(loss, (9, 1, 6, 12), strategy, width=5, dtype=torch.float64)))
            for strategy in ("gather", "ring", "grouped")
        ]
        for other in others:
            for name, found in ours.items():
                torch.testing.assert_close(other[name], found, rtol=1e-12, atol=1e-14)
