"""DistillClipLoss by ring and grouped: what one process gets from the whole batch, block after block, and never all features at once."""

import numpy as np
import pytest
import torch
from test_ring import passing
from torch import distributed as dist
from torch.nn import functional as F

from fastvlp.losses import DistillClipLoss
from fastvlp.losses.across import distill_ring
from fastvlp.losses.across.group import Exchange
from fastvlp_kernels._testing import assert_no_worse_than, forbid_large_tensors

TRAINED = ("image", "text", "scale")
WEIGHTS = (0.75, 2.0)
STRATEGIES = ("ring", "grouped")


def whole(pairs, dtype=torch.float64, width=12, teacher=20, scale=10.0):
    """Features in ``dtype`` of a student and of a wider teacher, and their scales; texts are like their images."""
    generator = torch.Generator().manual_seed(pairs)

    def both(width):
        image, noise = (torch.randn(pairs, width, generator=generator, dtype=torch.float64) for _ in range(2))
        return (F.normalize(part, dim=1).to(dtype) for part in (image, image + noise))

    scalars = torch.float64 if dtype == torch.float64 else torch.float32
    names = ("image", "text", "teacher_image", "teacher_text")
    scales = {"scale": torch.tensor(scale, dtype=scalars), "teacher_scale": torch.tensor(30.0, dtype=scalars)}
    return dict(zip(names, (*both(width), *both(teacher)), strict=True)) | scales


def by_pairs(tensors):
    """Both losses of each pair by their formulas, as its image's and its text's halves, [N] each."""
    S = tensors["scale"] * tensors["image"] @ tensors["text"].T
    T = tensors["teacher_scale"] * tensors["teacher_image"] @ tensors["teacher_text"].T
    log_p, log_q = S.log_softmax(1), S.log_softmax(0)
    return -(log_p + log_q).diagonal() / 2, -((T.softmax(1) * log_p).sum(1) + (T.softmax(0) * log_q).sum(0)) / 2


def differentiated(losses, tensors, weights=WEIGHTS):
    """Both losses, and the gradients of a weighted sum of them."""
    sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
    found = {f"loss {place}": loss.detach() for place, loss in enumerate(losses)}
    return found | {name: tensors[name].grad for name in TRAINED if tensors[name].grad is not None}


def leaves(tensors, trains=TRAINED):
    return {name: tensor.detach().clone().requires_grad_(name in trains) for name, tensor in tensors.items()}


def dense(tensors, trains=TRAINED):
    """On one process, in the dtype of ``tensors``."""
    tensors = leaves(tensors, trains)
    return differentiated([loss.mean() for loss in by_pairs(tensors)], tensors)


def share_of(rank, sizes, dtype, trains=TRAINED, **options):
    start = sum(sizes[:rank])
    tensors = whole(sum(sizes), dtype, **options)
    return leaves({name: t[start : start + sizes[rank]] if t.ndim else t for name, t in tensors.items()}, trains)


def call(module, tensors, **options):
    teacher = tensors["teacher_image"], tensors["teacher_text"], tensors["teacher_scale"]
    return module(tensors["image"], tensors["text"], tensors["scale"], *teacher, **options)


def made(strategy, size, **options):
    return DistillClipLoss(strategy=strategy, node_size=(2 - size % 2) if strategy == "grouped" else None, **options)


def share(rank, size, strategy, sizes, dtype, told, trains, weights, node_size=None):
    """What one process gets; ``weights``: of its own losses."""
    tensors = share_of(rank, sizes, dtype, trains)
    module = made(strategy, size) if node_size is None else DistillClipLoss(strategy=strategy, node_size=node_size)
    found = differentiated(call(module, tensors, local_sizes=list(sizes) if told else None), tensors, weights[rank])
    return {name: value.double().numpy() for name, value in found.items()}


def averaged(shares):
    """After DDP's average."""
    arrays = {name: [part[name] for part in shares] for name in shares[0]}
    means = {name: np.concatenate(a) / len(a) if name in ("image", "text") else np.mean(a, 0) for name, a in arrays.items()}
    return {name: torch.as_tensor(array) for name, array in means.items()}


def assert_same(found, exact):
    """In float64: values to 1e-12, gradients to 1e-10."""
    assert set(found) == set(exact)
    for name, value in exact.items():
        tol = 1e-12 if name.startswith("loss") else 1e-10
        torch.testing.assert_close(found[name], value, rtol=tol, atol=tol / 100, msg=name)


def results(processes, strategy, sizes, dtype=torch.float64, told=True, trains=TRAINED, weights=None, node_size=None):
    weights = [WEIGHTS] * len(sizes) if weights is None else weights
    return averaged(processes.results(len(sizes), share, strategy, sizes, dtype, told, trains, weights, node_size))


LAYOUTS = [("ring", (6, 3), None), ("ring", (1, 7, 4), None), ("ring", (2, 5, 1, 4), None),
           ("grouped", (6, 3), 2), ("grouped", (2, 5, 1, 4), 2), ("grouped", (1, 7, 4), 1), ("grouped", (1, 7, 4), 3)]  # fmt: skip


@pytest.mark.parametrize("strategy,sizes,node_size", LAYOUTS)
def test_equals_the_whole_batch(processes, strategy, sizes, node_size):
    assert_same(results(processes, strategy, sizes, told=False, node_size=node_size), dense(whole(sum(sizes))))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager_on_one_process(processes, strategy, dtype):
    """Beyond four roundings of a log-sum-exp, which is as large as the teacher's scale, and one of the gradient."""
    sizes = (40, 24, 33)
    found, tensors = results(processes, strategy, sizes, dtype), whole(sum(sizes), dtype)
    exact, eager = dense({name: tensor.double() for name, tensor in tensors.items()}), dense(tensors)
    for name, value in exact.items():
        tol = 4 * torch.finfo(torch.float32).eps * 30 + (torch.finfo(dtype).eps / 2 if value.ndim else 0)
        assert_no_worse_than(found[name], eager[name], value, tol, name)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("trains", [("image", "scale"), ("text",), ("scale",)], ids="+".join)
def test_frozen_inputs(processes, strategy, trains):
    assert_same(results(processes, strategy, (4, 6, 3), trains=trains), dense(whole(13), trains))


@pytest.mark.parametrize("strategy", ("gather", *STRATEGIES))
def test_each_process_weighs_its_own_pairs(processes, strategy):
    """A process's share is that of its own images and its own texts: other upstream gradients are exact too, and differ by loss."""
    sizes, weights = (4, 6, 3), [(0.5, 1.0), (2.0, 0.0), (3.0, 0.25)]
    tensors = leaves(whole(13))
    shares = [[part.sum() * 3 / 13 for part in parts] for parts in zip(*(loss.split(sizes) for loss in by_pairs(tensors)), strict=True)]
    differentiated([part for parts in shares for part in parts], tensors, [weight / 3 for parts in weights for weight in parts])
    exact = {f"loss {place}": sum(parts[place] for parts in shares).detach() / 3 for place in range(2)}
    found = results(processes, strategy, sizes, weights=weights)
    assert_same(found, exact | {name: tensors[name].grad for name in TRAINED})


def value_alone(rank, size, strategy, sizes):
    with torch.no_grad():
        return [loss.item() for loss in call(made(strategy, size), share_of(rank, sizes, torch.float64))]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_grad_gives_the_values_alone(processes, strategy):
    found = np.mean(processes.results(3, value_alone, strategy, (4, 6, 3)), 0)
    assert found == pytest.approx([loss.mean().item() for loss in by_pairs(whole(13))], rel=1e-12)


def in_groups(rank, size, strategy, sizes, groups):
    group = next(place for place, group in enumerate(groups) if rank in group)
    module = made(strategy, len(groups[group]), group=[dist.new_group(group) for group in groups][group])
    tensors = share_of(groups[group].index(rank), [sizes[member] for member in groups[group]], torch.float64)
    found = differentiated(call(module, tensors), tensors)
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sub_groups_are_batches_of_their_own(processes, strategy):
    sizes, groups = (5, 2, 3, 4), [[0, 2], [1, 3]]
    answers = processes.results(4, in_groups, strategy, sizes, groups)
    for group in groups:
        found = averaged([answers[rank] for rank in group])
        assert_same(found, dense(whole(sum(sizes[rank] for rank in group))))


def other_teacher(rank, size, strategy):
    call(made(strategy, size), share_of(rank, (3,) * size, torch.float64, teacher=20 + 4 * (rank == 1)))


@pytest.mark.parametrize("strategy", ("gather", *STRATEGIES))
def test_teachers_of_other_widths_stop_all(processes, strategy):
    for answer in processes.run(2, other_teacher, strategy):
        assert answer.kind == "ValueError" and "differ in the width of the teacher's features" in answer.message


def memory(rank, size, strategy):
    """Elements of the largest tensor, and bytes kept for the backward, without the inputs."""
    tensors, kept = share_of(rank, (16,) * size, torch.float32, width=64, teacher=96), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with forbid_large_tensors(10**9) as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = call(made(strategy, size), tensors)
        sum(losses).backward()
    return seen.largest, sum(kept.values())


@pytest.mark.parametrize("strategy,node", [("ring", 1), ("grouped", 2)])
def test_memory_is_that_of_a_node(processes, strategy, node):
    """Also kept: images and texts as they travel, a block of others', the texts' mean, and four numbers per column. What processes agree on
    takes 2 KiB of each."""
    for size in (2, 4):
        for largest, kept in processes.results(size, memory, strategy):
            assert largest <= max(16 * (64 + 96) * min(node, size // node), 2048 * size)
            assert kept <= 4 * 16 * ((64 + 96) * (2 + node) + 64 + 5 + 4 * size) + 64


def sends(rank, size, strategy):
    """The widths and the rows of what this process sends."""
    sent, send = [], Exchange.send
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "send", lambda exchange, tensor, to: (sent.append(tuple(tensor.shape)), send(exchange, tensor, to)))
        losses = call(made(strategy, size), share_of(rank, (3,) * size, torch.float32))
        forward = len(sent)
        sum(losses).backward()
    return sent[:forward], sent[forward:]


def test_a_text_travels_with_its_teacher_and_its_gradient_alone(processes):
    """As often as CLIP's: a ring of three takes two hops there, and two back, of which one needs no text."""
    for forward, backward in processes.results(3, sends, "ring"):
        assert forward == [(3, 12 + 20)] * 2 and sorted(backward) == [(3, 12)] * 2 + [(3, 12 + 20)]


def timed(rank, size, strategy, hop, work):
    """Seconds of forward and backward where nothing but hops and blocks takes time."""
    tensors = share_of(rank, (3,) * size, torch.float32)
    with passing(distill_ring, ("distill_block", "distill_block_backward"), hop, work) as clock:
        losses = call(made(strategy, size), tensors, local_sizes=[3] * size)
        forward = clock.now
        sum(losses).backward()
        return forward, clock.now - forward


@pytest.mark.parametrize("strategy,blocks", [("ring", 4), ("grouped", 3)])
def test_hops_hide_behind_work(processes, strategy, blocks):
    """Blocks take at most blocks * max(hop, work), forward and backward."""
    for times in processes.results(4, timed, strategy, 3, 3):
        assert (blocks - 1) * 3 < min(times) and max(times) <= blocks * 3
