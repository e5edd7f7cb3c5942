"""What ``fastvlp plan`` predicts of contrastive losses is what processes send and allocate."""

import ctypes
import time

import pytest
import torch
from batches import LOSSES, Batch
from torch import distributed as dist

from benchmarks.peak import growth
from fastvlp.commands.strategies import MERGING, Cluster, predict
from fastvlp.losses.across import gather, group, ring
from fastvlp_kernels._logsumexp import LogSumExp

LAYOUTS = [("gather", 2, 2), ("gather", 4, 2), ("ring", 3, 3), ("ring", 4, 2), ("grouped", 2, 2), ("grouped", 3, 3), ("grouped", 4, 2)]
MMAP_THRESHOLD = -3  # of glibc's malloc.h
WORK = 0.03  # seconds of a block, in which what travels arrives
SMALL = 64  # bytes that a step may send more: the weights of the processes' losses
AGREEMENT = 2048  # bytes by which a process describes the first call of a kind


def predicted(loss, strategy, size, node, pairs, width):
    found = predict(loss, pairs * size, width, Cluster(size, node), "float32")
    return next(one for one in found if one.strategy == strategy)


def step(module, batch, tensors):
    bias = () if batch.loss == "clip" else (tensors["bias"],)
    module(tensors["image"], tensors["text"], tensors["scale"], *bias, local_sizes=list(batch.sizes)).backward()
    for tensor in tensors.values():
        tensor.grad = None


def bytes_sent(rank, size, batch, node):
    """Bytes to this process's node and to others, of a first and of a second step. Rings of collectives leave a node once, which counts as
    its processes' equal parts."""
    inside = between = 0.0

    def add(count, slow):
        nonlocal inside, between
        inside, between = inside + count * (1 - slow), between + count * slow

    ringed = 1 / node if size > node else 0.0
    gather, reduce, scatter, send = group.Members.gather, dist.all_reduce, dist.all_to_all_single, group.Exchange.send

    def counted_gather(member, tensor):
        add((size - 1) * tensor.nbytes, ringed)
        return gather(member, tensor)

    def counted_reduce(tensor, *args, **options):
        add(2 * (size - 1) / size * tensor.nbytes, ringed)
        return reduce(tensor, *args, **options)

    def counted_scatter(output, rows, output_sizes, input_sizes, **options):
        for other, part in enumerate(rows.split(input_sizes)):
            if other != rank:
                add(part.nbytes, other // node != rank // node)
        return scatter(output, rows, output_sizes, input_sizes, **options)

    def counted_send(exchange, tensor, other):
        add(tensor.nbytes, other // node != rank // node)
        return send(exchange, tensor, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group.Members, "gather", counted_gather)
        patch.setattr(dist, "all_reduce", counted_reduce)
        patch.setattr(dist, "all_to_all_single", counted_scatter)
        patch.setattr(group.Exchange, "send", counted_send)
        module, tensors = batch.module(), batch.share(rank)
        step(module, batch, tensors)
        first, inside, between = (inside, between), 0.0, 0.0
        step(module, batch, tensors)
    return first, (inside, between)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("strategy,size,node", LAYOUTS)
def test_bytes_are_those_that_are_sent(processes, loss, strategy, size, node):
    """To the byte, but for a few numbers that do not grow. In a plain ring, what crosses slow links is sent by the ends of a node."""
    batch = Batch(loss, (6,) * size, strategy, width=20, told=True, node_size=node if strategy == "grouped" else None)
    one = predicted(loss, strategy, size, node, 6, 20)
    steps = processes.results(size, bytes_sent, batch, node)
    for (first_inside, first_between), (inside, between) in steps:
        assert first_inside + first_between == inside + between + (size - 1) * AGREEMENT
    found = [second for _, second in steps]
    statistics = one.intra_bytes / (node - 1) * node if strategy == "ring" and size > node and loss == "clip" else 0.0
    for inside, between in found:
        assert one.intra_bytes + one.inter_bytes <= inside + between <= one.intra_bytes + one.inter_bytes + SMALL
        if not (strategy == "ring" and size > node):
            assert one.inter_bytes <= between <= one.inter_bytes + SMALL
    if strategy == "ring" and size > node:
        hops = sum(between for _, between in found[:node]) - statistics
        assert one.inter_bytes - statistics / node <= hops <= one.inter_bytes - statistics / node + SMALL


def softmax_results(image, text, scale, offset):
    time.sleep(WORK)
    row, column = (LogSumExp(side.new_ones(len(side)), side.new_ones(len(side))) for side in (image, text))
    return row, column, image.new_ones(0 if offset is None else len(image))


def softmax_gradients(image, text, *rest):
    time.sleep(WORK)
    return torch.ones_like(image), torch.ones_like(text), torch.ones_like(rest[0])


def sigmoid_results(image, text, scale, bias, offset, wants):
    time.sleep(WORK)
    return image.new_ones(()), torch.ones_like(image), torch.ones_like(text), torch.ones_like(scale), torch.ones_like(bias)


def allocated(rank, size, batch):
    """Bytes by which a step of the loss grows the process, with operators that only allocate their results."""
    tensors, module = batch.share(rank), batch.module()

    def call():
        step(module, batch, tensors)

    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)  # what is freed leaves the process at once
    stand_ins = {"softmax_block": softmax_results, "softmax_block_backward": softmax_gradients, "sigmoid_block": sigmoid_results}
    with pytest.MonkeyPatch.context() as patch:
        for module_of_blocks in (gather, ring):
            for name, stand_in in stand_ins.items():
                patch.setattr(module_of_blocks, name, stand_in)
        for _ in range(2):  # gloo's own buffers
            call()
        grown = []
        for _ in range(8):
            dist.barrier()
            grown.append(growth(call, torch.device("cpu")))
    return min(grown)  # gloo's threads let go of an old tensor when they get to it


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("strategy,size,node", [("gather", 2, 2), ("gather", 4, 2), ("ring", 4, 2), ("grouped", 4, 2), ("grouped", 2, 2)])
def test_memory_is_what_is_allocated(processes, loss, strategy, size, node):
    """To within the features of one tower, of which a step holds 6 to 15: which tensors are released a moment later is chance."""
    pairs, width = 1024, 1024
    batch = Batch(loss, (pairs,) * size, strategy, width=width, told=True, node_size=node if strategy == "grouped" else None)
    one, features = predicted(loss, strategy, size, node, pairs, width), 4 * pairs * width
    for found in processes.results(size, allocated, batch):
        assert abs(found - one.memory_bytes) < 1.1 * features, f"{found / features:.2f} instead of {one.memory_bytes / features:.2f}"


def merging(rank, size, columns):
    pair, members = LogSumExp(torch.randn(columns), torch.rand(columns)), group.Members(None, rank, size)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)
    calls = [growth(lambda: members.logsumexp(pair), torch.device("cpu")) for _ in range(4)]
    return min(calls[2:]) + 8 * columns  # the pair was there before


def test_memory_of_merging_columns(processes):
    columns = 1 << 21
    for found in processes.results(2, merging, columns):
        assert abs(found / columns - MERGING) < 2, found / columns


def test_a_million_pairs_on_256_devices():
    """By hand: 2^12 pairs of 1024 bfloat16 features are 8 MiB. 32 nodes of 8."""
    share, hops = 2**12 * 1024 * 2, 31
    statistics = 2 * 255 / 256 * 2**20 * (4 + 8)  # a maximum in float32 and a sum in float64
    found = {one.strategy: one for one in predict("clip", 2**20, 1024, Cluster(256))}
    assert next(iter(found)) == "grouped"
    assert found["ring"].inter_bytes == 255 * share + 254 * share + 255 * 2 * share + statistics / 8
    assert found["grouped"].inter_bytes == hops * share + (hops - 2) * share + hops * 2 * share + statistics / 8
    assert found["gather"].inter_bytes == 255 * share / 8 + 248 * share + statistics / 8
    for one in found.values():
        assert one.compute_seconds == pytest.approx(4 * 2 * 2**12 * 2**20 * 1024 / 400e12)
        assert max(one.compute_seconds, one.communication_seconds) <= one.seconds <= one.compute_seconds + one.communication_seconds
    assert found["ring"].memory_bytes < found["grouped"].memory_bytes < found["gather"].memory_bytes


@pytest.mark.parametrize("loss", LOSSES)
def test_slower_links_never_make_a_step_faster(loss):
    for slower in ({"inter": 4.0}, {"intra": 30.0}, {"latency": 500.0}, {"tflops": 40.0}):
        before, after = ({one.strategy: one for one in predict(loss, 2**17, 512, Cluster(32, **links))} for links in ({}, slower))
        assert all(after[name].seconds >= before[name].seconds for name in before)
        assert any(after[name].seconds > before[name].seconds for name in before)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="12 devices are no whole number of nodes of 8"):
        Cluster(12)
    with pytest.raises(ValueError, match="^devices=0, inter=-1: devices, per_node, intra, inter and tflops are positive"):
        Cluster(0, inter=-1)
    with pytest.raises(ValueError, match="a batch of 4 for 8 devices; each needs at least one pair"):
        predict("clip", 4, 16, Cluster(8))
    with pytest.raises(ValueError, match="allowed: clip, siglip; float32, bfloat16, float16"):
        predict("coca", 64, 16, Cluster(8))
