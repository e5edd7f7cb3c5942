"""Gradients of every system after two optimizer steps, on processes that hold unequal parts of one batch (run by test_gradients)."""

from __future__ import annotations

import dataclasses
import sys

import torch
from torch import distributed as dist
from torch import nn

import fastvlp.losses  # noqa: F401  # before the group: see docs/distributed.md
from fastvlp.data.batch import Batch
from fastvlp.systems.system import Momentum, Scale, System
from fastvlp.train.gradients import gradients
from fastvlp.train.parallel import World, parallelize, whole_tensor
from tests.systems.small import make, whole

RUNS = {"replicated": (1, 1), "replicated, micro-batches": (1, 2), "sharded": (2, 1), "sharded, micro-batches": (2, 2)}
SIZES = (5, 3)
# The systems that the contract was proved with go through every way; of the others the two ends of the scale.
THOROUGH = ("clip", "siglip", "lit", "jina_clip", "filip", "slip", "brivl", "dlip", "coca", "simvlm", "vilt", "mae", "lexlip", "blip2",
            "albef")


def runs_of(name: str) -> list[str]:
    """The ways in which a system is trained by two processes."""
    return list(RUNS) if name in THOROUGH else ["replicated", "sharded, micro-batches"]


def train(system: System, batch: Batch, parts: int, steps: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients of the last of some steps of SGD, and the state afterwards."""
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.1)
    rows = list(torch.arange(len(batch)).flip(0).tensor_split(parts))
    for _ in range(steps):
        optimizer.zero_grad()
        _, out = gradients(system, batch, rows)
        found = {name: whole_tensor(p.grad).clone() for name, p in system.named_parameters() if p.grad is not None}
        optimizer.step()
        follow(system, out, batch)
    return found, {name: whole_tensor(value).clone() for name, value in system.state_dict().items()}


@torch.no_grad()
def follow(system: System, out, batch: Batch) -> None:
    for module in system.modules():
        if isinstance(module, Momentum | Scale):
            module.follow()
    system.after_step(out, batch)


def main(target: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    batch, found = whole(), {}
    first = sum(SIZES[:rank])
    for name in names:
        counts = make(name).counts(batch)
        mine = dataclasses.replace(batch.take(range(first, first + SIZES[rank])), sizes=SIZES, first=first, counts=counts)
        for run in runs_of(name):
            shard, parts = RUNS[run]
            system = parallelize(make(name), shard, world=World(rank, world, torch.device("cpu")))
            found[name, run] = train(system, mine, parts)
    if rank == 0:
        torch.save(found, target)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert issubclass(System, nn.Module)
    main(sys.argv[1], sys.argv[2:])
