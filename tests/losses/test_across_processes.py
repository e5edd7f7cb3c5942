"""Losses on several processes give, after DDP's average, the loss and the gradients of the whole batch on one process."""

from dataclasses import replace

import pytest
import torch
from batches import ALL, INPUTS, LOSSES, Batch, averaged, collect, dense, gradients, node_size
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvlp_kernels._testing import assert_no_worse_than

SIZES = [(7,), (5, 5), (6, 3), (4, 4, 4), (1, 9, 4), (3, 3, 3, 3), (2, 7, 1, 5)]


def assert_exact(shares, batch, tol, rounding=0.0):
    """Loss and gradients after DDP's average are within ``tol`` of float64 beyond the error of eager PyTorch.

    Relative to their norm; scalars, which are sums of terms up to 1 that cancel, relative to 1 if that is more. Gradients of features
    may have one rounding more than eager's.
    """
    ours, exact = averaged(shares), batch.whole(torch.float64)
    eager = batch.whole(batch.dtype)
    assert set(ours) == {"loss", *batch.trains}
    for name, found in ours.items():
        if batch.loss == "clip" and name == "bias":
            assert found == 0
        elif found.ndim == 0:
            allowed = abs(eager[name].item() - exact[name].item()) + tol * max(1, abs(exact[name].item()))
            assert abs(found.item() - exact[name].item()) <= allowed, f"{name}: {found} instead of {exact[name]}, eager gives {eager[name]}"
        else:
            assert_no_worse_than(found, eager[name], exact[name], tol + rounding, name)


@pytest.mark.parametrize("loss,strategy", ALL)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_whole_batch(processes, loss, strategy, sizes):
    for told in (False, True) if len(set(sizes)) > 1 else (False,):
        batch = Batch(loss, sizes, strategy, dtype=torch.float64, told=told)
        assert_exact(processes.results(len(sizes), gradients, batch), batch, 1e-12)


@pytest.mark.parametrize("loss,strategy", ALL)
@pytest.mark.parametrize("sizes", SIZES[-2:], ids=str)
def test_equals_the_whole_batch_in_float32(processes, loss, strategy, sizes):
    """To four roundings, whatever the scale: log-sum-exps travel in two numbers."""
    batch = Batch(loss, sizes, strategy, told=len(set(sizes)) > 1, seed=1, exact=True)
    assert_exact(processes.results(len(sizes), gradients, batch), batch, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("loss,strategy", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_no_worse_than_eager_on_one_process(processes, loss, strategy, dtype):
    """Also for confident pairs (a softmax loss of 0.0005), whose gradients are small differences of large terms."""
    for scale, likeness in ((10.0, 0.5), (100.0, 0.45)):
        batch = Batch(loss, (40, 24, 33), strategy, width=48, scale=scale, likeness=likeness, dtype=dtype)
        assert_exact(processes.results(3, gradients, batch), batch, 1e-5, rounding=torch.finfo(dtype).eps / 2)


def under_autocast(rank, size, batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss, tensors = batch.call(rank)
    loss.backward()
    return collect(loss, tensors)


@pytest.mark.parametrize("loss,strategy", ALL)
def test_autocast_takes_float32_features(processes, loss, strategy):
    """Products of bfloat16 operands, everything else in float32: a float64 formula over rounded features is met as well."""
    rounded = Batch(loss, (20, 30), strategy, width=48, dtype=torch.bfloat16)
    shares = processes.results(2, under_autocast, replace(rounded, dtype=torch.float32))
    assert_exact(shares, rounded, 1e-5, rounding=torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("loss,strategy", ALL)
@pytest.mark.parametrize("trains", [("image", "scale", "bias"), ("text",), ("scale",), ("bias",)], ids="+".join)
def test_frozen_inputs(processes, loss, strategy, trains):
    batch = Batch(loss, (4, 6, 3), strategy, trains=trains, dtype=torch.float64)
    assert_exact(processes.results(3, gradients, batch), batch, 1e-12)


def value_alone(rank, size, batch):
    with torch.no_grad():
        loss, tensors = batch.call(rank)
    assert not loss.requires_grad
    return collect(loss, tensors)


@pytest.mark.parametrize("loss,strategy", ALL)
def test_no_grad_gives_the_value_alone(processes, loss, strategy):
    batch = Batch(loss, (4, 6, 3), strategy, dtype=torch.float64)
    shares = processes.results(3, value_alone, batch)
    assert averaged(shares)["loss"].item() == pytest.approx(batch.whole(torch.float64)["loss"].item(), rel=1e-12)


def without_backward(rank, size, batch):
    """Many losses whose backward never runs, whose last exchange nobody waits for, then one that counts."""
    for _ in range(3):
        batch.call(rank)
    return gradients(rank, size, batch)


@pytest.mark.parametrize("loss,strategy", ALL)
def test_a_loss_without_backward_disturbs_nothing(processes, loss, strategy):
    batch = Batch(loss, (4, 6, 3), strategy, dtype=torch.float64)
    assert_exact(processes.results(3, without_backward, batch), batch, 1e-12)


def twice(rank, size, batch):
    loss, tensors = batch.call(rank)
    loss.backward(retain_graph=True)
    loss.backward()
    return collect(loss, tensors)


@pytest.mark.parametrize("loss,strategy", ALL)
def test_backward_twice(processes, loss, strategy):
    batch = Batch(loss, (4, 6), strategy, dtype=torch.float64)
    both, exact = averaged(processes.results(2, twice, batch)), batch.whole(torch.float64)
    for name in INPUTS:
        expected = torch.zeros(()) if (loss, name) == ("clip", "bias") else exact[name]
        torch.testing.assert_close(both[name], 2 * expected.double(), rtol=1e-12, atol=1e-14)


def weighted(rank, size, batch, weights):
    loss, tensors = batch.call(rank)
    (loss * weights[rank]).backward()
    return collect(loss, tensors)


@pytest.mark.parametrize("loss,strategy", ALL)
def test_upstream_gradient(processes, loss, strategy):
    """A common weight passes through; weights of their own are exact, or refused where gradients were summed before."""
    batch = Batch(loss, (4, 6, 3), strategy, dtype=torch.float64)
    plain = averaged(processes.results(3, gradients, batch))
    for name, found in averaged(processes.results(3, weighted, batch, [65536.0] * 3)).items():
        torch.testing.assert_close(found, plain[name] * (1 if name == "loss" else 65536), rtol=1e-12, atol=1e-12)
    weights = [0.5, 2.0, 3.0]
    answers = processes.run(3, weighted, batch, weights)
    if loss == "siglip" and strategy != "gather":
        assert all(answer.kind == "RuntimeError" and "same weight" in str(answer) for answer in answers)
        return
    shares = []
    exact = {name: tensor.requires_grad_() for name, tensor in batch.tensors().items()}
    logits = exact["scale"] * exact["image"] @ exact["text"].T + exact["bias"]
    if loss == "clip":
        both = (torch.logsumexp(logits, 0) - logits.diagonal() + torch.logsumexp(logits, 1) - logits.diagonal()) / 2
    else:
        both = nn.functional.softplus(-(2 * torch.eye(13) - 1) * logits).sum(1)
    for weight, part in zip(weights, both.split(batch.sizes), strict=True):
        shares.append(weight * part.sum() / 13)
    sum(shares).backward()
    ours = averaged(answers)
    for name in INPUTS:
        expected = torch.zeros(()) if (loss, name) == ("clip", "bias") else exact[name].grad
        torch.testing.assert_close(ours[name], expected.double(), rtol=1e-10, atol=1e-14)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(9, 8).double(), nn.Linear(9, 8).double()
        self.log_scale = nn.Parameter(torch.tensor(2.0).double())
        self.bias = nn.Parameter(torch.tensor(-1.0).double())

    def forward(self, pairs):
        features = (nn.functional.normalize(tower(part), dim=1) for tower, part in zip((self.image, self.text), pairs, strict=True))
        return *features, self.log_scale.exp(), self.bias


def pairs_of(sizes):
    return torch.randn(2, sum(sizes), 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(sizes, dim=1)


def trained(rank, size, loss, strategy, sizes, groups):
    members = next(group for group in groups if rank in group)
    made = [dist.new_group(group) for group in groups]
    group = made[groups.index(members)] if len(groups) > 1 else None
    model = DistributedDataParallel(Towers())
    options = {"node_size": node_size(len(members))} if strategy == "grouped" else {}
    criterion = LOSSES[loss](rank=rank, world_size=size, strategy=strategy, group=group, **options)
    value = criterion(*model(pairs_of(sizes)[rank]))
    value.backward()
    return {"loss": value.item()} | {name: parameter.grad.numpy() for name, parameter in model.module.named_parameters()}


@pytest.mark.parametrize("loss,strategy", ALL)
@pytest.mark.parametrize(
    "sizes,groups",
    [
        pytest.param((3, 6, 2), [[0, 1, 2]], id="world"),
        pytest.param((5, 2, 3, 4), [[0, 2], [1, 3]], id="subgroups"),
        pytest.param((2, 3), [[0], [1]], id="groups-of-one"),
    ],
)
def test_parameters_under_ddp(processes, loss, strategy, sizes, groups):
    """DDP gives every parameter the gradient of the mean over groups of the groups' whole-batch losses."""
    model = Towers()
    parts = pairs_of(sizes)
    losses = [dense(loss, *model(torch.cat([parts[rank] for rank in group], dim=1))) for group in groups]
    (sum(losses) / len(losses)).backward()
    answers = processes.results(len(sizes), trained, loss, strategy, sizes, groups)
    for group, value in zip(groups, losses, strict=True):
        assert sum(answers[rank]["loss"] for rank in group) / len(group) == pytest.approx(value.item(), rel=1e-12)
    for answer in answers:
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if (loss, name) == ("clip", "bias") else parameter.grad
            torch.testing.assert_close(torch.as_tensor(answer[name]), expected, rtol=1e-10, atol=1e-14)
