"""How much of the device's matrix rate training uses (MFU, Chowdhery et al. 2022, arXiv:2204.02311)."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from fastvlp.data.batch import Batch
from fastvlp.systems.flops import FlopCount
from fastvlp.systems.system import System
from fastvlp.train.gradients import random_state, set_random_state
from fastvlp.train.parallel import World

SAMPLES = 8  # of each process, whose operations are counted
SECONDS = 0.1  # of measuring the rate


def needed_per_cost(system: System, batch: Batch, cost: float, world: World, autocast: AbstractContextManager) -> float:
    """Operations that training on these samples needs, forward and backward, over ``cost``; a collective call.

    What is computed twice to save memory counts once, frozen parts count forward only. Of the loss between samples, which grows with the
    square of the batch, only that of these few is in it.

    Args:
        batch: some samples of this process, as many on each. cost: what ``Batch.cost`` says of them.
    """
    samples = len(batch)
    batch = replace(batch, sizes=(samples,) * world.size, first=samples * world.rank)
    generators, buffers = random_state(), [(buffer, buffer.clone()) for buffer in system.buffers()]
    # Compiled blocks would hide their operators.
    with torch.no_grad(), autocast, torch.compiler.set_stance("force_eager"), FlopCount() as counted:
        system.objective(system.encode(batch), batch)
        for buffer, before in buffers:  # running statistics
            buffer.copy_(before)
    set_random_state(generators)
    return counted.needed / cost if cost else 0.0


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that products of large square matrices reach here: the best of those that fit into a tenth of a second."""
    side = 8192 if device.type == "cuda" else 512
    own = torch.Generator(device).manual_seed(0)  # a run that is continued must find the generators where it left them
    one, other = (torch.randn(side, side, device=device, dtype=torch.float32, generator=own).to(dtype) for _ in range(2))
    best, began = 0.0, time.perf_counter()
    for number in range(1000):
        start = time.perf_counter()
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if number:  # the first one loads libraries
            best = max(best, 2 * side**3 / (now - start))
        if number and now - began > SECONDS:
            break
    return best
