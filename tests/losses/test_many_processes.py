"""More processes than a test can start, as threads that pass tensors to one another: any layout of nodes gives the whole batch's result."""

import queue
import threading
from collections import Counter, defaultdict

import pytest
import torch
from batches import LOSSES, Batch, averaged, collect

from fastvlp.losses import drop_in
from fastvlp.losses.across import circulate, group
from fastvlp_kernels._logsumexp import LogSumExp, merge

SECONDS = 60


class Threads(group.Members):
    """One of several members that are threads of this process."""

    @classmethod
    def among(cls, rank, size, desk):
        member = cls(None, rank, size)
        object.__setattr__(member, "desk", desk)
        return member

    def gather(self, tensor):
        self.desk.table[self.rank] = tensor.clone()
        self.desk.barrier.wait(SECONDS)
        result = torch.stack([self.desk.table[rank] for rank in range(self.size)])
        self.desk.barrier.wait(SECONDS)
        return result

    def logsumexp(self, partial):
        return merge(*(LogSumExp(*pair) for pair in self.gather(torch.stack(partial))))

    def control_device(self):
        return torch.device("cpu")


class Desk:
    """Where threads leave tensors for one another."""

    def __init__(self, size):
        self.table, self.barrier, self.boxes = {}, threading.Barrier(size), defaultdict(queue.Queue)
        self.numbers = Counter()


class Posted:
    """An exchange over the desk; a tensor is copied when it is waited for, and what is sent must not have changed by then."""

    def __init__(self, member):
        self.member, self.received, self.sent = member, [], []

    def send(self, tensor, rank):
        assert tensor.is_contiguous() and rank != self.member.rank
        self.sent.append((tensor, tensor.clone()))
        self.member.desk.boxes[self.member.rank, rank].put(tensor.clone())
        self.member.desk.numbers[self.member.rank, rank] += tensor.numel()

    def receive(self, tensor, rank):
        tensor.fill_(torch.nan)  # nobody may look before the tensor is here
        self.received.append((tensor, rank))
        return tensor

    def start(self):
        return self

    def wait(self):
        for tensor, copy in self.sent:
            assert torch.equal(tensor, copy)
        for tensor, rank in self.received:
            arrived = self.member.desk.boxes[rank, self.member.rank].get(timeout=SECONDS)
            assert arrived.shape == tensor.shape
            tensor.copy_(arrived)
        received, self.sent, self.received = [tensor for tensor, _ in self.received], [], []
        return received


def in_threads(batch, monkeypatch):
    """The shares of all members of a batch, and what was sent between any two of them."""
    size = len(batch.sizes)
    desk, shares = Desk(size), [None] * size
    own = threading.local()
    monkeypatch.setattr(circulate, "Exchange", Posted)
    monkeypatch.setattr(drop_in.Members, "of", lambda loss, group: own.member)

    def work(rank):
        own.member = Threads.among(rank, size, desk)
        try:
            loss, tensors = batch.call(rank)
            loss.backward()
            shares[rank] = collect(loss, tensors)
        except BaseException:  # whatever it is, the others must not wait for it
            desk.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return shares, desk


LAYOUTS = [(size, node) for size in (1, 2, 3, 4, 6, 8, 9, 12) for node in (1, 2, 3, 4, 6, 12) if size % node == 0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size,node", LAYOUTS)
def test_every_layout_of_nodes(monkeypatch, loss, size, node):
    sizes = tuple(1 + (5 * rank + 3) % 4 for rank in range(size))
    batch = Batch(loss, sizes, "grouped", node_size=node, dtype=torch.float64)
    shares, desk = in_threads(batch, monkeypatch)
    exact = batch.whole(torch.float64)
    for name, found in averaged(shares).items():
        expected = torch.zeros(()) if (loss, name) == ("clip", "bias") else exact[name]
        torch.testing.assert_close(found, expected.double(), rtol=1e-10, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
    assert all(box.empty() for box in desk.boxes.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size,node", [(8, 2), (12, 3), (12, 4)])
def test_slow_links_carry_a_text_once_to_each_node(monkeypatch, loss, size, node):
    """Numbers over a link between nodes: the texts of a member in all other nodes, and back the gradients; the way back saves two hops."""
    pairs, nodes = 5, size // node
    batch = Batch(loss, (pairs,) * size, "grouped", node_size=node, told=True)
    _, desk = in_threads(batch, monkeypatch)
    between = Counter()
    for (sender, receiver), numbers in desk.numbers.items():
        if sender // node != receiver // node:
            assert sender % node == receiver % node
            between[sender] += numbers
    hops = (nodes - 1) + (nodes - 1) + (max(0, nodes - 3) if loss == "clip" else 0)
    assert set(between.values()) == {hops * pairs * batch.width} and len(between) == size
