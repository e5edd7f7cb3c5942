"""How much of the device's matrix rate training uses (MFU, Chowdhery et al. 2022, arXiv:2204.02311)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from time import perf_counter

import torch

from fastvlp.data.batch import Batch
from fastvlp.systems.flops import FlopCount
from fastvlp.systems.system import System
from fastvlp.train.gradients import encoded, random_state, set_random_state, terms
from fastvlp.train.parallel import World

SAMPLES = 8  # of each process, whose operations are counted
FIRST, MOMENT = 0.1, 0.01  # seconds of products, at the start and later
SHARE = 0.005  # of the time that may go to measuring again


def needed_per_cost(system: System, batch: Batch, cost: float, world: World, autocast: AbstractContextManager) -> float:
    """Operations that training on these samples of all processes needs, forward and backward, over their ``cost``; a collective call.

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
        terms(system, encoded(system, batch), batch)
        for buffer, before in buffers:  # running statistics
            buffer.copy_(before)
    set_random_state(generators)
    needed, costs = (sum(column) for column in zip(*world.numbers([int(counted.needed), int(cost)]), strict=True))
    return needed / costs if costs else 0.0


class MatrixRate:
    """The operations per second that products of large square matrices reach on this process's device, or threads.

    ``best`` is that of several short moments: any of them may fall on a time when something else runs on the machine.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.best = device, dtype, 0.0
        # More threads need larger products to be busy, each as long as before.
        self.side = 8192 if device.type == "cuda" else 512 * math.ceil(torch.get_num_threads() ** (1 / 3))
        self._measure(FIRST)
        self._began, self._spent = perf_counter(), 0.0

    def again(self) -> None:
        """Measure once more, as long as that is a small part of the time; waits for the device."""
        began = perf_counter()
        if self._spent <= SHARE * (began - self._began):
            self._measure(MOMENT)
            self._spent += perf_counter() - began

    def _measure(self, seconds: float) -> None:
        own = torch.Generator(self.device).manual_seed(0)  # a run that is continued must find the generators where it left them
        one, other = (torch.randn(self.side, self.side, device=self.device, generator=own).to(self.dtype) for _ in range(2))
        one @ other  # the first one loads libraries, or finds cold caches
        self._finished()
        began = start = perf_counter()
        while start - began < seconds:
            one @ other
            self._finished()
            now = perf_counter()
            self.best, start = max(self.best, 2 * self.side**3 / (now - start)), now

    def _finished(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
