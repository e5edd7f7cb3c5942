"""The processes of a run: who takes part, what they agree on, and how a system's parameters lie on them."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import debug as tensor_debug
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastvlp._schema import ConfigError
from fastvlp.systems.system import System
from fastvlp.train.spans import PROCESSES, span

FORWARDS = ("encode", "objective", "after_step", "before_episode", "embed_image", "embed_text", "score", "caption_nll", "caption_hits",
            "generate")
LAUNCHERS = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


@dataclass(frozen=True)
class World:
    """This process among all; alone it is World(0, 1, device)."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
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

    def numbers(self, values: Sequence[int]) -> list[list[int]]:
        """As many integers of every process, by rank; on the CPU, so that no device is waited for."""
        if self.size == 1:
            return [list(values)]
        # The group's CPU backend: on NCCL the same exchange would wait for everything that the device has queued.
        mine = torch.tensor(values, dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine)
        return [row.tolist() for row in gathered]

    def told(self, value: Any = None) -> Any:
        """What the first process says."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sizes(self, batch_size: int) -> list[int]:
        """How many samples of a batch each process holds, by rank (the rule of ``torch.tensor_split``)."""
        return [batch_size // self.size + (rank < batch_size % self.size) for rank in range(self.size)]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means for the process with this number on its machine.

    Raises:
        ConfigError: "cuda" without a usable CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("run.device=cuda, but torch sees no CUDA device here; use run.device=auto, or see fastvlp env")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


@contextmanager
def join(device_name: str, timeout: float = 1800.0) -> Iterator[World]:
    """Take part in the run that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or run alone; leaves the process group at the end.

    Processes on CPUs speak gloo, on CUDA devices NCCL, and gloo about what the host knows. A process group that exists already is used and
    left open. What uses the group (FSDP) has to be out of scope by the end: gloo's threads live as long as anything holds the group, and
    one that lets go of a tensor while Python shuts down aborts the process.

    Raises:
        ConfigError: another launcher started several processes without telling them torchrun's variables, or there is no such device.
    """
    device = pick_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        try:
            yield World(dist.get_rank(), dist.get_world_size(), device)
        finally:
            _let_go_of_groups()
        return
    if "WORLD_SIZE" not in os.environ:
        _refuse_other_launchers()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(0, 1, device)
        return
    # Both: decisions are exchanged on the CPU while the device computes.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their variables use the group
        raise
    finally:
        _let_go_of_groups()
        dist.destroy_process_group()


def _let_go_of_groups() -> None:
    """DTensor's caches (of sharded operators and of redistributions) hold meshes, and meshes their groups; FSDP's state is a cycle.

    The caches are private and there is no other way, so that each is cleared where this torch has it.
    """
    clears = [getattr(tensor_debug, "_clear_sharding_prop_cache", None)]
    for name in ("_redistribute", "_collective_utils"):
        module = sys.modules.get(f"torch.distributed.tensor.{name}")
        for found in (*vars(module).values(), *vars(getattr(module, "MeshTopoInfo", object)).values()) if module else ():
            clears.append(getattr(getattr(found, "__func__", found), "cache_clear", None))
        clears.append(getattr(module, "clear_redistribute_planner_cache", None))
    for clear in clears:
        if callable(clear):
            clear()
    gc.collect()


def _refuse_other_launchers() -> None:
    """Several processes that each believe to be alone would train in the same folder."""
    for size, rank in LAUNCHERS:
        if int(os.environ.get(size) or 1) > 1 and rank in os.environ:
            raise ConfigError(f"{size}={os.environ[size]}: that many processes were started without torchrun's variables (RANK, "
                              "WORLD_SIZE, MASTER_ADDR), so that each would train alone; start one torchrun on each node, as "
                              "docs/cluster.md shows")


def parallelize(system: System, shard: int | str = 1, *, world: World | None = None, compile: bool | str = False,
                checkpointing: str | None = None, offload: bool = False) -> System:
    """Lay a system's parameters on the processes by FSDP2, over a mesh (replicas, shards): one path for all ways.

    Alone, nothing is wrapped. Blocks (the modules of a ``ModuleList``) are gathered one by one, so that only one is whole at a time.

    Args:
        shard: over how many neighbouring processes parameters, gradients and optimizer state are split: 1 replicates (data parallel), a
            divisor of the number of processes shards inside groups and replicates across (hybrid), "world" shards over all.
        compile: each block by torch.compile, or by one of its backends by name.
        checkpointing: "blocks" keeps only the input of each block for backward, "selective" also the results of products and attention.
        offload: parameters and optimizer state live in the CPU's memory.

    Raises:
        ConfigError: ``shard`` does not divide the number of processes, or offload without a sharded run.
    """
    world = world or World(0, 1, next(system.parameters()).device)
    split = world.size if shard == "world" else int(shard)
    if world.size % split:
        number = f"{world.size} process{'es' * (world.size > 1)}"
        raise ConfigError(f"train.shard is {shard} on {number}; it must divide their number, or be world")
    if offload and world.size == 1:
        raise ConfigError("train.offload is for several processes; a run of one has nothing to gather from the CPU")
    blocks = [block for module in system.modules() if isinstance(module, nn.ModuleList) for block in module if _is_block(block)]
    for block in blocks:
        if checkpointing is not None:
            _checkpoint(block, selective=checkpointing == "selective")
        # Block by block: one graph serves all blocks of a tower, and what lies between (packing, losses) stays eager.
        if compile:
            block.compile(dynamic=True, **({} if compile is True else {"backend": compile}))
    if world.size == 1:
        return system
    # Shards are the inner dimension: neighbours by rank share a node and its fast links; replicas average between nodes.
    mesh = init_device_mesh(world.device.type, (world.size // split, split), mesh_dim_names=("replicate", "shard"))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, offload_policy=policy)
        if hasattr(block, "queries_keys_values"):  # asked for on its own where tokens are ranked before the block
            register_fsdp_forward_method(block, "queries_keys_values")
    # The root holds what no block does: embeddings, norms, heads. They are used again at the start of the backward, and so stay.
    fully_shard(system, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    for name in FORWARDS:
        register_fsdp_forward_method(system, name)
    return system


def _is_block(module: nn.Module) -> bool:
    """Whether a module is called as a whole: leaves and containers may be read weight by weight, which gathering would not notice."""
    called = type(module).forward is not nn.Module.forward
    return called and any(True for _ in module.children()) and next(module.parameters(), None) is not None


_KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def _checkpoint(block: nn.Module, selective: bool) -> None:
    """Replace the instance's forward by one that computes itself again in backward; names in the state dict stay as they are."""
    def policy(context: Any, operator: Any, *args: Any, **keywords: Any) -> CheckpointPolicy:
        # Products cost most to compute again and little to keep, beside what norms and activations would.
        kept = operator in _KEPT or "packed_attention" in str(operator)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    how: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if selective else {}
    block.forward = partial(checkpoint, _casting(block.forward) if selective else block.forward, use_reentrant=False, **how)


def _casting(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` that casts its own weights. Autocast keeps a cast for later calls, so that the second call of a block would make fewer
    operations than when it is computed again, where nothing is kept: selective checkpointing compares them one by one.
    """
    def call(*args: Any, **keywords: Any) -> Any:
        kind = next((kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)), None)
        if kind is None:
            return forward(*args, **keywords)
        with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
            return forward(*args, **keywords)

    return call


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor whose parts lie on several processes (a collective call)."""
    if not isinstance(value, DTensor):
        return value
    with span(PROCESSES):
        return value.full_tensor()


def local_tensor(value: Tensor) -> Tensor:
    """The part of a tensor that lies here."""
    return value.to_local() if isinstance(value, DTensor) else value
