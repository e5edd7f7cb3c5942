"""Wrong inputs are refused in words, on all processes; a process that dies or stalls stops the others within the timeout."""

import os
import time
import weakref

import pytest
import torch
from batches import ALL, LOSSES, Batch, node_size
from processes import Failed
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from fastvlp.losses import ALONE, ClipLoss, SigLipLoss, contrastive_loss, gather_batch
from fastvlp.losses.across import gather, ring
from fastvlp.losses.across.group import Members, Transfer

# Every strategy and every loss, for what happens before any arithmetic or instead of it.
EACH = [("clip", "gather"), ("siglip", "ring"), ("clip", "grouped")]
GOOD = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
REFUSED = {
    "width": ((GOOD, GOOD[:, :7], 10.0), ValueError, "8 features and texts 7; project both towers to one width"),
    "batch": ((GOOD, GOOD[:3], 10.0), ValueError, "4 images but 3 texts"),
    "integers": ((GOOD.long(), GOOD, 10.0), TypeError, "image_features is torch.int64; features must be float32"),
    "dtypes": ((GOOD, GOOD.half(), 10.0), TypeError, "torch.float32, text_features torch.float16; cast one of them"),
    "device": ((GOOD, GOOD.to("meta"), 10.0), ValueError, "image_features is on cpu but text_features is on meta"),
    "no tensor": ((GOOD.numpy(), GOOD, 10.0), TypeError, "image_features is ndarray; it must be a tensor"),
    "vector": ((GOOD[0], GOOD, 10.0), ValueError, "shape (8,); it must be a matrix"),
    "empty": ((GOOD[:0], GOOD[:0], 10.0), ValueError, "the batch is empty; every process needs at least one pair"),
    "scale": ((GOOD, GOOD, torch.ones(2)), ValueError, "logit_scale has shape (2,)"),
    "bias": ((GOOD, GOOD, 10.0, torch.tensor(3)), TypeError, "logit_bias is a torch.int64 tensor"),
    "sizes": ((GOOD, GOOD, 10.0), ValueError, "local_sizes is [5]"),
}


@pytest.mark.parametrize("module", LOSSES.values())
@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_one_process(module, case):
    arguments, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        module()(*arguments, local_sizes=[5] if case == "sizes" else None)
    assert words in str(caught.value) and str(caught.value).startswith(module.__name__)


def test_one_size_is_no_list_of_them():
    with pytest.raises(TypeError, match="local_sizes is int; it must be a list"):
        ClipLoss()(GOOD, GOOD, 10.0, local_sizes=4)


def test_refused_constructors():
    with pytest.raises(ValueError, match="strategy='tree' is not one of this loss; allowed: gather, ring, grouped"):
        ClipLoss(strategy="tree")
    with pytest.raises(ValueError, match="dist_impl='tree' is unknown; allowed: None, bidir, shift, reduce, gather"):
        SigLipLoss(dist_impl="tree")
    for strategy, node in (("ring", 2), ("grouped", 0)):
        with pytest.raises(ValueError, match=f"node_size={node} with strategy='{strategy}'; it is at least 1, and for 'grouped' alone"):
            ClipLoss(strategy=strategy, node_size=node)
    with pytest.raises(ValueError, match="use_horovod=True is not supported; start the processes with torchrun"):
        ClipLoss(use_horovod=True)
    with pytest.raises(RuntimeError, match="world_size=2, but torch.distributed is not running"):
        ClipLoss(world_size=2)(GOOD, GOOD, 10.0)


def a_dtensor(rank, size):
    mesh = init_device_mesh("cpu", (1,))
    sharded = DTensor.from_local(GOOD, mesh, [Replicate()])
    refused = []
    for arguments in ((sharded, GOOD, 10.0), (GOOD, sharded, 10.0)):
        with pytest.raises(TypeError) as caught:
            ClipLoss()(*arguments)
        refused.append(str(caught.value))
    return refused


def test_dtensors_are_refused_by_name(processes):
    for message in processes.results(1, a_dtensor)[0]:
        assert "is a DTensor" in message and ".to_local()" in message


def call_with(rank, size, loss, options, arguments, trains=False):
    image, text, *rest = arguments[rank]
    return LOSSES[loss](**options[rank])(image.clone().requires_grad_(trains), text, *rest).item()


@pytest.mark.parametrize("loss,strategy", EACH)
@pytest.mark.parametrize("case", ["width", "integers", "empty", "scale"])
def test_a_refusal_stops_all_processes(processes, loss, strategy, case):
    arguments, error, words = REFUSED[case]
    good = (GOOD, GOOD, 10.0)
    options = [{"strategy": strategy} | ({"node_size": node_size(3)} if strategy == "grouped" else {})] * 3
    first, wrong, last = processes.run(3, call_with, loss, options, [good, arguments, good])
    assert wrong.kind == error.__name__ and words in wrong.message
    for other in (first, last):
        assert other.kind == "RuntimeError" and "rank 1 of the group refused its input" in other.message


def told_and_unlike(rank, size, what):
    image = {"width": torch.randn(6, 12 if rank else 8), "dtype": torch.randn(6, 8).to(torch.bfloat16 if rank else torch.float32),
             "bias": torch.randn(6, 8)}[what]  # fmt: skip
    ClipLoss()(image, image, 10.0, 1.0 if what == "bias" and rank else None, local_sizes=[6, 6])


@pytest.mark.parametrize("what", ["width", "dtype", "bias"])
def test_processes_that_were_told_the_sizes_still_compare_what_they_do(processes, what):
    for answer in processes.run(2, told_and_unlike, what):
        words = f"differ in the {'presence of logit_bias' if what == 'bias' else what}"
        assert answer.kind == "ValueError" and words in answer.message, answer


def compared(rank, size):
    """How many collectives of ``agree`` three calls with sizes and two without make."""
    gather, calls = Members.gather, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Members, "gather", lambda self, tensor: (calls.append(tensor.dtype), gather(self, tensor))[1])
        loss = ClipLoss()
        with torch.no_grad():
            for sizes in ([4, 4], [4, 4], None, None):
                loss(GOOD, GOOD, 10.0, local_sizes=sizes)
            loss(GOOD[: 4 - rank], GOOD[: 4 - rank], 10.0, local_sizes=[4, 3])
    return calls.count(torch.uint8)


def test_what_was_agreed_is_not_asked_again(processes):
    assert processes.results(2, compared) == [3, 3]


def unlike_arguments(rank, size, options):
    made = {name: value(rank) for name, value in ARGUMENTS[options].items()}
    contrastive_loss(GOOD, GOOD, 10.0, **{name: value for name, value in made.items() if value is not None})


ARGUMENTS = {
    "presence of weights": {"weights": lambda rank: torch.ones(4) if rank else None},
    "label_smoothing": {"label_smoothing": lambda rank: 0.1 * rank},
    "tau_plus": {"tau_plus": lambda rank: 0.1 * (1 + rank)},
    "prefix_weights": {"prefixes": lambda rank: (4, 8), "prefix_weights": lambda rank: (1.0, 1.0 + rank)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_change_what_is_computed_are_agreed(processes, name):
    for answer in processes.run(2, unlike_arguments, name):
        assert answer.kind == "ValueError" and f"differ in the {name} (" in answer.message, answer


def without_a_group(rank, size):
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(k)), dim=1) for k in (1, 2))
    share = [side[3 * rank : 3 * rank + 3] for side in (image, text)]
    kinds = [lambda *pairs, **group: ClipLoss(**group)(*pairs, 10.0), lambda *pairs, **group: contrastive_loss(*pairs, 10.0, **group)]
    found = [(kind(*share).item(), kind(*share, group=ALONE).item()) for kind in kinds]
    gathered = [len(gather_batch(share[0], group=group)[0]) for group in (None, ALONE)]
    return found, [kind(image, text, group=ALONE).item() for kind in kinds], gathered


def test_no_group_means_all_processes_in_every_loss(processes):
    first, other = processes.results(2, without_a_group)
    for kind in range(2):
        assert (first[0][kind][0] + other[0][kind][0]) / 2 == pytest.approx(first[1][kind], rel=1e-5)
        assert first[0][kind][1] != pytest.approx(first[0][kind][0], rel=1e-3)
    assert first[2] == [6, 3]


def frozen_on_one(rank, size):
    image = GOOD.clone().requires_grad_(rank == 0)
    return ClipLoss()(image, GOOD, 10.0).item()


def wrong_calls(rank, size):
    messages = []
    for options, sizes in (({"world_size": 3}, None), ({"rank": 1 - rank, "world_size": 2}, None), ({}, [4]), ({}, [9, 9]), ({}, [4, 0])):
        try:
            SigLipLoss(**options)(GOOD if rank == 0 else GOOD[:3], GOOD if rank == 0 else GOOD[:3], 10.0, local_sizes=sizes)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_processes_that_disagree_are_told(processes):
    arguments = [(GOOD, GOOD, 10.0), (GOOD[:, :5], GOOD[:, :5], 10.0)]
    for answer in processes.run(2, call_with, "clip", [{}, {}], arguments):
        assert answer.kind == "ValueError" and "ranks 0 and 1 of the group differ in the width" in answer.message, answer
    options = [{"strategy": "gather"}, {"strategy": "ring"}]
    for answer in processes.run(2, call_with, "clip", options, [(GOOD, GOOD, 10.0)] * 2):
        assert answer.kind == "ValueError" and "differ in the loss or strategy" in answer.message, answer
    options = [{"strategy": "grouped", "node_size": nodes} for nodes in (1, 2)]
    for answer in processes.run(2, call_with, "clip", options, [(GOOD, GOOD, 10.0)] * 2):
        assert answer.kind == "ValueError" and "differ in the number of processes of a node" in answer.message, answer
    for answer in processes.run(2, frozen_on_one):
        assert answer.kind == "ValueError" and "differ in the inputs that need a gradient" in answer.message, answer
    for rank, (size, place, count, own, empty) in enumerate(processes.results(2, wrong_calls)):
        assert "world_size=3, but this process is rank" in size
        assert f"rank={1 - rank}, world_size=2" in place
        assert "has 1 numbers; give one for each process of the group, 2" in count
        assert f"was called with {4 - rank} pairs" in own
        assert "every process needs at least one pair" in empty


def on_machines(rank, size, groups, local, told):
    made = [torch.distributed.new_group(group) for group in groups]
    mine = next(place for place, group in enumerate(groups) if rank in group)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if local is not None:
            patch.setenv("LOCAL_WORLD_SIZE", str(local))
        return Members.of("ClipLoss", made[mine]).node_size("ClipLoss", told)


@pytest.mark.parametrize(
    "groups,local,told,nodes",
    [
        ([[0, 1, 2, 3]], 2, None, [2] * 4),
        ([[0, 1, 2, 3]], 4, 1, [1] * 4),
        ([[0, 2], [1, 3]], 2, None, [1] * 4),
        ([[0, 1, 2], [3]], 4, None, [3, 3, 3, 1]),
    ],
)
def test_nodes_are_machines_unless_told(processes, groups, local, told, nodes):
    assert processes.results(4, on_machines, groups, local, told) == nodes


@pytest.mark.parametrize(
    "groups,local,told,words",
    [
        ([[0, 1, 2]], None, None, "LOCAL_WORLD_SIZE is not set (torchrun sets it); pass node_size"),
        ([[0, 1, 2]], 2, None, r"lie on machines as [2, 1]; strategy='grouped' needs equally many on each"),
        ([[0, 1, 2]], 2, 2, "node_size=2, and the group has 3 processes"),
    ],
)
def test_nodes_that_are_not_alike_are_refused(processes, groups, local, told, words):
    for answer in processes.run(3, on_machines, groups, local, told):
        assert answer.kind == "ValueError" and words in answer.message, answer


def with_nan(rank, size, batch, name):
    tensors = batch.share(rank)
    if rank == size - 1:
        with torch.no_grad():
            tensors[name].view(-1)[0] = torch.nan
    loss = batch.module()(*tensors.values())
    loss.backward()
    return loss.item(), {key: tensor.grad.isnan().any().item() for key, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize("loss,strategy", ALL)
@pytest.mark.parametrize("name", ["image", "text", "scale"])
def test_nan_is_passed_on(processes, loss, strategy, name):
    """The mean over processes of the loss is NaN, and so are gradients that the NaN touches in the formula."""
    answers = processes.results(2, with_nan, Batch(loss, (3, 3), strategy), name)
    assert torch.tensor([value for value, _ in answers]).isnan().any()
    assert answers[1][1]["image"] and answers[1][1]["text"] and answers[1][1]["scale"]


def interrupted(rank, size, batch, how, timeout):
    """The last process dies, or stalls for longer than the timeout, while it computes a block; the others' seconds until their error."""
    loss, _ = batch.call(rank)
    loss.backward()
    torch.distributed.barrier()
    start = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        if rank == size - 1:
            for module in (gather, ring):
                for name in ("softmax_block", "sigmoid_block"):
                    patch.setattr(module, name, lambda *args: os._exit(1) if how == "dies" else time.sleep(timeout + 2))
        try:
            loss, _ = batch.call(rank)
            loss.backward()
        except RuntimeError:
            return time.perf_counter() - start
        except TypeError:
            return None
    raise AssertionError("the loss was computed without one of its processes")


@pytest.mark.parametrize("loss,strategy", EACH)
def test_a_process_that_dies_stops_the_others_at_once(processes, loss, strategy):
    batch = Batch(loss, (4, 4, 4), strategy, told=True)
    *others, dead = processes.run(3, interrupted, batch, "dies", 60, timeout=60)
    assert dead is None
    assert max(others) < 30


@pytest.mark.parametrize("loss,strategy", EACH)
def test_a_process_that_stalls_stops_the_others_after_the_timeout(processes, loss, strategy):
    batch = Batch(loss, (4, 4, 4), strategy, told=True)
    *others, _ = processes.run(3, interrupted, batch, "stalls", 3, timeout=3)
    assert not any(isinstance(other, Failed) for other in others), others
    assert 0 < max(others) < 3 + 3


class Lost:
    """A transfer's work, whose peer died."""

    def wait(self):
        raise RuntimeError("connection closed by peer")


def test_what_may_still_write_to_tensors_goes_before_them():
    """The error's traceback holds the frames, and they the tensors, in an order that nobody chooses."""
    works = [Lost(), Lost()]
    pending = weakref.ref(works[1])
    transfer = Transfer(works, [], [torch.zeros(3)])
    del works
    with pytest.raises(RuntimeError, match="closed by peer") as caught:
        transfer.wait()
    assert caught.tb is not None and pending() is None
    assert transfer.wait()[0].shape == (3,)
