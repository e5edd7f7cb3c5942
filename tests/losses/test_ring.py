"""The ring computes while it sends, and holds what one process's pairs need, however many processes there are."""

import time

import pytest
import torch
from batches import LOSSES, Batch, averaged, gradients

from fastvlp.losses import members, ring
from fastvlp_kernels._testing import forbid_large_tensors

BLOCKS = ("softmax_block", "softmax_block_backward", "sigmoid_block")


class Delayed(members.Transfer):
    """A transfer that nobody can have before ``delay`` seconds have passed."""

    def __init__(self, transfer: members.Transfer, delay: float) -> None:
        super().__init__(transfer._works, transfer._sent, transfer._received)
        transfer._works = []
        self.ready = time.perf_counter() + delay * bool(self._works)

    def wait(self):
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return super().wait()


def timed(rank, size, batch, hop, work):
    """Seconds of forward and backward where every hop takes ``hop`` seconds more, and every block ``work`` seconds more."""

    def slow(compute):
        def block(*args):
            time.sleep(work)
            return compute(*args)

        return block

    with pytest.MonkeyPatch.context() as patch:
        shift = members.Members.shift
        patch.setattr(members.Members, "shift", lambda *args: Delayed(shift(*args), hop))
        for name in BLOCKS:
            patch.setattr(ring, name, slow(getattr(ring, name)))
        torch.distributed.barrier()
        start = time.perf_counter()
        loss, _ = batch.call(rank)
        middle = time.perf_counter()
        loss.backward()
        return middle - start, time.perf_counter() - middle


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("hop,work", [(0.3, 0.3), (0.3, 0.1), (0.1, 0.3)], ids=["balanced", "slow-hops", "slow-blocks"])
def test_hops_hide_behind_work(processes, loss, hop, work):
    """W blocks take at most 1.2 * W * max(hop, work), forward, and backward too where it is a trip; load on the machine only adds."""
    allowed = 1.2 * 4 * max(hop, work)
    limits = allowed, allowed if loss == "clip" else 1.2 * hop
    rounds = []
    while len(rounds) < 5 and not any(forward <= limits[0] and backward <= limits[1] for forward, backward in rounds):
        times = processes.results(4, timed, Batch(loss, (3, 3, 3, 3), "ring", told=True), hop, work)
        rounds.append([max(part) for part in zip(*times, strict=True)])
    forward, backward = rounds[-1]
    assert 3 * max(hop, work) < forward <= limits[0] and backward <= limits[1], f"(forward, backward) were {rounds}, allowed {limits}"


def largest_tensor(rank, size, batch):
    tensors, module = batch.share(rank), LOSSES[batch.loss](strategy="ring")
    with forbid_large_tensors(10**9) as seen:
        module(*tensors.values()).backward()
    return seen.largest


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_is_larger_than_the_local_features(processes, loss):
    for size in (2, 4):
        batch = Batch(loss, (16,) * size, "ring", width=64)
        assert max(processes.results(size, largest_tensor, batch)) == 16 * 64


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


def test_what_is_saved_is_one_block_and_one_number_per_column(processes):
    for size in (2, 4):
        batch = Batch("clip", (16,) * size, "ring", width=64)
        for found in processes.results(size, saved_bytes, batch):
            assert found <= 4 * (16 * 64 + 16 + 16 * size + 4)


def count_hops(rank, size, batch):
    rows = []
    shift = members.Members.shift
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            members.Members,
            "shift",
            lambda self, direction, sent, counts: (rows.append(len(sent)), shift(self, direction, sent, counts))[1],
        )
        gradients(rank, size, batch)
    return rows


@pytest.mark.parametrize("loss,trains,blocks", [("clip", ("image", "scale"), 3 + 2), ("siglip", ("image", "scale"), 3)])
def test_a_frozen_text_tower_sends_no_gradients(processes, loss, trains, blocks):
    batch = Batch(loss, (4, 4, 4, 4), "ring", trains=trains)
    for sent in processes.results(4, count_hops, batch):
        assert sum(sent) == blocks


def test_ring_and_gather_agree_on_one_group_of_many_blocks(processes):
    for loss in LOSSES:
        ours = [
            averaged(processes.results(4, gradients, Batch(loss, (9, 1, 6, 12), strategy, width=5, dtype=torch.float64)))
            for strategy in ("ring", "gather")
        ]
        for name, found in ours[0].items():
            torch.testing.assert_close(found, ours[1][name], rtol=1e-12, atol=1e-14)
