"""Gradients of every system after two optimizer steps, on processes that hold unequal parts of one batch (run by test_gradients)."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

import fastvlp.losses  # noqa: F401  # before the group: see docs/distributed.md
from fastvlp.data.batch import Batch
from fastvlp.systems.system import Momentum, Scale, System
from fastvlp.train.gradients import gradients
from fastvlp.train.parallel import World, join, parallelize, whole_tensor
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
    with join("cpu") as world:
        found = trained(world, names)
        if world.rank == 0:
            torch.save(found, target)
        world.wait()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), f"something keeps a destroyed group alive: {threads}"


def trained(world: World, names: list[str]) -> dict[tuple[str, str], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """What each system ends with, by its name and way."""
    batch, found = whole(), {}
    first = sum(SIZES[:world.rank])
    for name in names:
        counts = make(name).counts(batch)
        mine = dataclasses.replace(batch.take(range(first, first + SIZES[world.rank])), sizes=SIZES, first=first, counts=counts)
        for run in runs_of(name):
            shard, parts = RUNS[run]
            found[name, run] = train(parallelize(make(name), shard, world=world), mine, parts)
    return found


if __name__ == "__main__":
    assert issubclass(System, nn.Module)
    main(sys.argv[1], sys.argv[2:])
