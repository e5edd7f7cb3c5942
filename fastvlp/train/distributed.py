"""The processes of a run: torchrun's environment, the device of this one, and the few numbers they agree on."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all; alone it is World(0, 1, device)."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over all processes, the same on each; overwrites ``values``."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list:
        """``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        gathered: list = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def sizes(self, batch_size: int) -> list[int]:
        """How many pairs of a batch each process holds, by rank (the rule of ``torch.tensor_split``)."""
        return [batch_size // self.size + (rank < batch_size % self.size) for rank in range(self.size)]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means for the process with this number on its machine.

    Raises:
        RuntimeError: "cuda" without a usable CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RuntimeError("run.device=cuda, but torch sees no CUDA device here; use run.device=auto, or see fastvlp env")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


@contextmanager
def join(device_name: str) -> Iterator[World]:
    """Take part in the run that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or run alone; leaves the process group at the end.

    Processes on CPUs speak gloo, on CUDA devices NCCL. A process group that exists already is used and left open. What uses the
    group (DDP) has to be out of scope by the end: gloo's threads live as long as anything holds the group, and one that lets go of
    a tensor while Python shuts down aborts the process.
    """
    device = pick_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), device)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their variables use the group
        raise
    finally:
        gc.collect()  # DDP is a cycle
        dist.destroy_process_group()
