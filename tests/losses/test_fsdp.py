"""Towers that FSDP2 shards: the parameters get the gradients of one process with the whole batch."""

import pytest
import torch
from batches import ALL, LOSSES, dense, node_size
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

WIDTH = 9


class Towers(nn.Module):
    """Two towers, with scale and bias as parameters of shape [1], since FSDP shards the first dimension."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("image", "text"):
            tower = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 8))
            self.add_module(name, tower.double())
        self.log_scale, self.bias = (nn.Parameter(torch.tensor([value]).double()) for value in (2.0, -1.0))

    def forward(self, pairs):
        features = (F.normalize(tower(part), dim=1) for tower, part in zip((self.image, self.text), pairs, strict=True))
        return *features, self.log_scale.exp(), self.bias


def pairs_of(sizes):
    return torch.randn(2, sum(sizes), WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(sizes, dim=1)


def sharded(rank, size, loss, strategy, sizes):
    model = Towers()
    for tower in (model.image, model.text, model):
        fully_shard(tower, mesh=torch.distributed.init_device_mesh("cpu", (size,)))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    criterion = LOSSES[loss](strategy=strategy, node_size=node_size(size) if strategy == "grouped" else None)
    value = criterion(*model(pairs_of(sizes)[rank]), local_sizes=sizes)
    value.backward()
    return {"loss": value.item()} | {name: parameter.grad.full_tensor().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss,strategy", ALL)
@pytest.mark.parametrize("sizes", [(5, 5), (6, 3)], ids=str)
def test_parameters_under_fsdp2(processes, loss, strategy, sizes):
    model = Towers()
    whole = dense(loss, *model(torch.cat(pairs_of(sizes), dim=1)))
    whole.backward()
    answers = processes.results(2, sharded, loss, strategy, sizes)
    assert sum(answer["loss"] for answer in answers) / 2 == pytest.approx(whole.item(), rel=1e-12)
    for answer in answers:
        for name, parameter in model.named_parameters():
            expected = torch.zeros(1) if (loss, name) == ("clip", "bias") else parameter.grad
            torch.testing.assert_close(torch.as_tensor(answer[name]), expected.double(), rtol=1e-10, atol=1e-14)
