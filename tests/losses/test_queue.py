"""The queue of negatives, momentum encoders, the loss between them, and nearest neighbours."""

import copy

import pytest
import torch
from objectives import dense, differentiated
from torch import nn
from torch.nn import functional as F

from fastvlp.losses import MomentumEncoder, NegativeQueue, contrastive_loss, gather_batch, queue_contrastive_loss
from fastvlp_kernels._testing import assert_no_worse_than, error, forbid_large_tensors

B, WIDTH = 19, 24


def unit(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def filled(size, count, seed, dtype=torch.float64, width=WIDTH):
    queue = NegativeQueue(size, width, dtype=dtype)
    queue.enqueue(unit(count, width, seed=seed, dtype=dtype))
    return queue


def batch(scale, likeness, dtype):
    """Features, keys and scale; keys are like the features of the other tower."""
    common = unit(B, WIDTH, seed=1)
    names = ("image", "text", "image_keys", "text_keys")
    tensors = {}
    for seed, name in enumerate(names, start=2):
        tensors[name] = F.normalize(likeness * common + (1 - likeness) * unit(B, WIDTH, seed=seed), dim=1).to(dtype)
    return tensors | {"scale": torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)}


def dense_queue_loss(tensors, options, dtype):
    """InfoNCE over [own key, queue] or [all keys, queue], products in the dtype of the features."""
    parts = []
    for features, keys, queue in (("image", "text_keys", "text_queue"), ("text", "image_keys", "image_queue")):
        x, k, queue = tensors[features], tensors[keys].detach(), options[queue]
        negatives = queue.features[queue.log_weight == 0].to(x.dtype)
        of_keys, of_queue = (x @ k.T).to(dtype), (x @ negatives.T).to(dtype)
        if options.get("batch_negatives"):
            logits, labels = torch.cat([of_keys, of_queue], 1), torch.arange(B)
        else:
            logits, labels = torch.cat([of_keys.diagonal()[:, None], of_queue], 1), torch.zeros(B, dtype=torch.int64)
        parts.append(F.cross_entropy(tensors["scale"].to(dtype) * logits, labels))
    return (parts[0] + parts[1]) / 2


def ours(tensors, options):
    return queue_contrastive_loss(**tensors, **options)


QUEUES = {"image_queue": filled(70, 41, 8), "text_queue": filled(33, 80, 9)}
SMALL = {False: 0.58, True: 0.61}  # the likeness that brings the loss below 0.01
CASES = [(negatives, *case) for negatives in (False, True) for case in ((7.0, 0.4), (100.0, 0.5), (100.0, SMALL[negatives]))]


@pytest.mark.parametrize("batch_negatives,scale,likeness", CASES)
def test_loss_and_gradients(batch_negatives, scale, likeness):
    tensors, options = batch(scale, likeness, torch.float64), QUEUES | {"batch_negatives": batch_negatives}
    exact, found = differentiated(dense_queue_loss, tensors, options, torch.float64), differentiated(ours, tensors, options)
    assert set(found) == set(exact) == {"loss", "image", "text", "scale"}
    assert likeness != SMALL[batch_negatives] or 1e-4 < exact["loss"] < 0.01
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch_negatives,scale,likeness", CASES)
def test_no_worse_than_eager(batch_negatives, scale, likeness, dtype):
    queues = {name: copy.deepcopy(queue).to(dtype) for name, queue in QUEUES.items()}
    tensors, options = batch(scale, likeness, dtype), queues | {"batch_negatives": batch_negatives}
    exact = differentiated(dense_queue_loss, {name: tensor.double() for name, tensor in tensors.items()}, options, torch.float64)
    eager, found = differentiated(dense_queue_loss, tensors, options, torch.float32), differentiated(ours, tensors, options)
    for name, value in exact.items():
        assert_no_worse_than(found[name], eager[name], value, 4 * torch.finfo(torch.float32).eps * scale, name)


def test_autocast_rounds_operands_only():
    tensors = batch(50.0, 0.5, torch.float32)
    found = differentiated(ours, tensors, QUEUES, autocast=True)
    rounded = {name: tensor.double() if name == "scale" else tensor.bfloat16().double() for name, tensor in tensors.items()}
    queues = {name: copy.deepcopy(queue).bfloat16() for name, queue in QUEUES.items()}
    for name, value in differentiated(dense_queue_loss, rounded, queues, torch.float64).items():
        assert max(error(found[name], value)) < 4 * torch.finfo(torch.float32).eps * 50, name


def test_no_matrix_of_batch_and_queue():
    N, size = 1200, 3600
    image, text = (unit(N, 4, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2))
    queues = [filled(size, size, seed, torch.float32, 4) for seed in (3, 4)]
    with forbid_large_tensors(N * N // 8 * 3):
        queue_contrastive_loss(image, text, text.detach(), image.detach(), *queues, 10.0, batch_negatives=True).backward()
        contrastive_loss(image, queues[1].nearest(text), 10.0).backward()


def test_empty_queues_leave_the_batch():
    tensors = batch(10.0, 0.4, torch.float64)
    empty = {name: NegativeQueue(7, WIDTH, dtype=torch.float64) for name in QUEUES}
    alone = differentiated(ours, tensors, empty)
    assert all(not value.any() for value in alone.values())
    for name, value in differentiated(dense_queue_loss, tensors, empty | {"batch_negatives": True}, torch.float64).items():
        torch.testing.assert_close(differentiated(ours, tensors, empty | {"batch_negatives": True})[name], value)


def test_oldest_features_leave_first():
    queue, expected = NegativeQueue(7, 3), torch.zeros(0, 3)
    for count in (2, 3, 4, 7, 20, 1, 6):
        new = torch.randn(count, 3, requires_grad=True)
        queue.enqueue(new)
        expected = torch.cat([expected, new.detach()])[-7:]
        held = queue.features[queue.log_weight == 0]
        in_order = torch.cat([held[queue.position :], held[: queue.position]]) if len(expected) == 7 else held
        assert torch.equal(in_order, expected) and not queue.features.requires_grad


def test_state_dict_holds_the_queue():
    queue, other = filled(9, 13, 3), NegativeQueue(9, WIDTH, dtype=torch.float64)
    other.load_state_dict(queue.state_dict())
    for held in (queue, other):
        held.enqueue(unit(4, WIDTH, seed=5))
    for (name, kept), (_, loaded) in zip(queue.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(kept, loaded), name
    assert not list(queue.parameters())


def test_enqueueing_before_backward_is_refused_by_autograd():
    tensors, queues = batch(10.0, 0.4, torch.float32), {name: filled(9, 9, 3, torch.float32) for name in QUEUES}
    tensors["image"].requires_grad_()
    loss = queue_contrastive_loss(**tensors, **queues)
    queues["text_queue"].enqueue(tensors["text_keys"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,size,count", [(3, 5, 2), (700, 2100, 1900), (5, 2100, 5000)])
def test_nearest_neighbours(rows, size, count, dtype):
    queue, features = filled(size, count, 6, dtype, 8), unit(rows, 8, seed=7, dtype=dtype).requires_grad_()
    found = queue.nearest(features)
    held = queue.features[queue.log_weight == 0]
    products = features.double() @ held.double().T
    assert found.dtype == dtype and not found.requires_grad
    torch.testing.assert_close((found.double() * features.double()).sum(1), products.amax(1), rtol=1e-6, atol=1e-6)
    assert (found[:, None] == held).all(2).any(1).all() if rows < 10 else True


def test_nearest_in_an_empty_queue_is_the_feature_itself():
    features = unit(4, WIDTH, seed=1).requires_grad_()
    found = NegativeQueue(5, WIDTH, dtype=torch.float64).nearest(features)
    assert torch.equal(found, features) and not found.requires_grad


def test_declip_trains_images_with_neighbours_of_texts():
    tensors, queue = batch(10.0, 0.4, torch.float64), filled(40, 40, 6)
    image, text, scale = tensors["image"].requires_grad_(), tensors["text"].requires_grad_(), tensors["scale"]
    neighbours = queue.features[(text @ queue.features.T).argmax(1)]
    loss = contrastive_loss(image, queue.nearest(text), scale)
    loss.backward()
    torch.testing.assert_close(loss, dense({"image": image, "text": neighbours, "scale": scale}, {}, torch.float64))
    assert image.grad is not None and text.grad is None


def test_momentum_encoder_follows():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    follower = MomentumEncoder(encoder, 0.9)
    start, x = copy.deepcopy(encoder), torch.randn(5, 3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    encoder(x)
    follower.update(encoder)
    for kept, before in zip(follower.module.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(kept, before + 0.1)
        assert not kept.requires_grad
    for kept, own in zip(follower.module.buffers(), encoder.buffers(), strict=True):
        assert torch.equal(kept, own)
    assert not follower(x).requires_grad and len(follower.state_dict()) == len(encoder.state_dict())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_refusals():
    tensors = batch(10.0, 0.4, torch.float64)
    narrow = NegativeQueue(5, 3)
    for change, message in (
        ({"text_queue": narrow}, "text_queue has width 3, the features have 24"),
        ({"image_keys": tensors["image"][:4]}, r"image_keys are torch.float64 \(4, 24\); they must .* like the features, \(19, 24\)"),
        ({"text": tensors["text"][:4]}, "19 images but 4 texts"),
        ({"text_keys": tensors["text_keys"].long()}, "text_keys are torch.int64 .* they must be floating point"),
        ({"image_keys": None}, "image_keys is NoneType; it must be a torch.Tensor"),
        ({"image_queue": tensors["image"]}, "image_queue is Tensor; it must be a NegativeQueue"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            queue_contrastive_loss(**(tensors | QUEUES | change))
    for call in (narrow.enqueue, narrow.nearest):
        with pytest.raises(ValueError, match=r"features have shape \(2, 4\); they must be a matrix \[B, 3\]"):
            call(torch.zeros(2, 4))
        with pytest.raises(TypeError, match="features are torch.int64"):
            call(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="size=0, width=3; both must be ints of at least 1"):
        NegativeQueue(0, 3)
    with pytest.raises(ValueError, match="size=4.5, width=8; both must be ints"):
        NegativeQueue(4.5, 8)
    with pytest.raises(ValueError, match="momentum=1.5"):
        MomentumEncoder(nn.Linear(2, 2), 1.5)
    for encoder in (nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2).bfloat16()):
        with pytest.raises(ValueError, match="whose parameters differ from the copy's in number, shape or dtype"):
            MomentumEncoder(nn.Linear(2, 2)).update(encoder)
    with pytest.raises(ValueError, match="whose buffers differ"):
        MomentumEncoder(nn.LayerNorm(2)).update(nn.BatchNorm1d(2))
    with pytest.raises(TypeError, match="dtype=torch.int32; it must be floating point"):
        NegativeQueue(5, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match="features is ndarray; it must be a torch.Tensor"):
        narrow.enqueue(torch.zeros(2, 3).numpy())


def two_steps(rank, sizes):
    """This process's losses and gradients of two steps, and the queue that they leave."""
    queues, found = [NegativeQueue(30, WIDTH, dtype=torch.float64) for _ in range(2)], []
    for step in range(2):
        start = sum(sizes[:rank])
        rows = [unit(sum(sizes), WIDTH, seed=10 * step + k)[start : start + sizes[rank]].requires_grad_(k < 2) for k in range(4)]
        image, text, *keys = gather_batch(*rows)
        loss = queue_contrastive_loss(image, text, *keys, *queues, 20.0, batch_negatives=True)
        found.append((loss.detach(), *torch.autograd.grad(loss, rows[:2])))
        for queue, key in zip(queues, keys, strict=True):
            queue.enqueue(key)
    return found, queues[1].features


def on_a_process(rank, size, sizes):
    return two_steps(rank, sizes)


def test_a_queue_is_the_same_on_all_processes(processes):
    sizes = (5, 9)
    (first, queue), (second, other) = processes.results(2, on_a_process, sizes)
    expected, alone = two_steps(0, (sum(sizes),))
    assert torch.equal(queue, other) and torch.equal(queue, alone)
    for (loss, *one), (same, *two), (right, *gradients) in zip(first, second, expected, strict=True):
        torch.testing.assert_close((loss + same) / 2, right, rtol=1e-12, atol=0)
        for mine, others, whole in zip(one, two, gradients, strict=True):
            torch.testing.assert_close(torch.cat([mine, others]) / 2, whole, rtol=1e-9, atol=1e-12)
