"""``fastvlp plan``: what a step of any recipe costs on a cluster, and whether it fits, before anything runs.

Sizes and operations are those of the system itself, run on shapes without values, with square pictures and the longest captions. Nothing is
measured: seconds are those of ideal links and products at the rates given, a lower bound; memory leaves out what allocators lose.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastvlp._schema import ConfigError
from fastvlp.commands import dry_run, strategies
from fastvlp.commands.strategies import Cluster, Prediction
from fastvlp.commands.train import from_arguments
from fastvlp.data.batch import Stage
from fastvlp.recipe import NO_DATA, Recipe
from fastvlp.systems.system import System
from fastvlp.train.parallel import World
from fastvlp.train.progress import clock
from fastvlp.train.start import counted
from fastvlp.train.step import amp_dtype, named_part

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters, gradients, optimizer, averages: what lies here of the model (float32, Adam's two moments, ``train.ema``).
        activations: of one micro-batch. features: what ``encode`` gave for this device's samples, with its gradients, and what the loss
            holds. workspace: gathered parameters of sharded runs, and weights in 16 bits.
    """

    parameters: float
    gradients: float
    optimizer: float
    averages: float
    activations: float
    features: float
    workspace: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Price:
    """One stage of a recipe, on one device.

    Attributes:
        until: where the stage ends, as a fraction of all steps. tokens: of the longest sample, by stream.
        forward, backward: operations a sample, frozen parts forward only. computed: of all samples of a step here, with what GradCache and
            checkpointing compute again.
        samples: of this device. micro: of one micro-batch. parts: micro-batches.
        intra_bytes, inter_bytes: of parameters and gradients, sent over fast and slow links. memory: bytes.
        fitting: samples of the largest micro-batch that fits, 0 where none does.
        losses: each contrastive loss by its strategies, the fastest first.
        compute_seconds: of the products. travel_seconds: of parameters and gradients. seconds: at least, of a step.
    """

    until: float
    tokens: dict[str, float]
    forward: float
    backward: float
    computed: float
    samples: int
    micro: int
    parts: int
    intra_bytes: float
    inter_bytes: float
    memory: Memory
    fitting: int
    losses: list[list[Prediction]]
    compute_seconds: float
    travel_seconds: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster.

    Attributes:
        parameters: of the system. trained: of them. dtype: of products. compares, features: whether samples meet those of other devices,
            and the bytes a sample that ``encode`` gives for that. stages: in order. seconds: of the whole run, at least.
    """

    system: str
    parameters: int
    trained: int
    dtype: str
    compares: bool
    features: float
    stages: list[Price]
    seconds: float


def command(options: argparse.Namespace) -> int:
    """Print the plan of a recipe."""
    recipe = from_arguments(options.arguments)
    if recipe.schedule.epochs is not None and recipe.data.train == NO_DATA:
        raise ConfigError(f"schedule.epochs is {recipe.schedule.epochs:g} of data that is not named; give samples=N, or data=SHARDS to "
                          "count")
    recipe = counted(recipe, World(0, 1, torch.device("cpu")))
    cluster = Cluster(options.devices, options.per_node, options.intra, options.inter, options.tflops, options.latency)
    if not options.memory > 0:
        raise ValueError(f"--memory is {options.memory:g}; it is a positive number of GB")
    found = plan(recipe, cluster, options.memory * GB)
    print(json.dumps(as_json(found, cluster)) if options.json else table(found, recipe, cluster, options.memory * GB))
    return 0


def plan(recipe: Recipe, cluster: Cluster, memory: float = 80 * GB) -> Plan:
    """Price every stage of a recipe.

    Args:
        memory: bytes of a device.

    Raises:
        ConfigError: fewer samples than devices, a shard that does not divide them, or a system that cannot be run on shapes.
    """
    if recipe.data.batch_size < cluster.devices:
        raise ConfigError(f"data.batch_size is {recipe.data.batch_size} for {cluster.devices} devices; each needs at least one sample")
    shard = cluster.devices if recipe.train.shard == "world" else recipe.train.shard
    if cluster.devices % shard:
        raise ConfigError(f"train.shard is {shard} on {cluster.devices} devices; it must divide their number, or be world")
    system = dry_run.build(recipe)
    # Priced for a GPU, whatever this machine has.
    dtype = amp_dtype(recipe.train.amp, torch.device("cuda"))
    stages, features = [], 0.0
    for stage in recipe.schedule.stages:
        # Only those that this stage freezes: what the recipe froze for good must not thaw after it.
        frozen = {p for name in stage.frozen for p in named_part(system, name).parameters() if p.requires_grad}
        for parameter in frozen:
            parameter.requires_grad_(False)
        sizes, once = dry_run.per_sample(system, recipe, stage, dtype)
        stages.append(_price(recipe, system, cluster, memory, stage, shard, dtype, sizes, once))
        features = max(features, sizes.outputs)
        for parameter in frozen:
            parameter.requires_grad_(True)
    every, trained = _count(system, False), _count(system, True)
    begins = [0.0, *(stage.until for stage in stages)]
    seconds = recipe.steps * sum((one.until - begin) * one.seconds for one, begin in zip(stages, begins, strict=False))
    name = str(dtype or torch.float32).removeprefix("torch.")
    return Plan(type(system).__name__, every, trained, name, system.compares, features, stages, seconds)


def _price(recipe: Recipe, system: System, cluster: Cluster, most: float, stage: Stage, shard: int, dtype: torch.dtype | None,
           sizes: dry_run.Sizes, once: float) -> Price:
    options, devices = recipe.train, cluster.devices
    # The fullest device sets the pace, where the batch does not divide.
    samples = -(-recipe.data.batch_size // devices)
    parts = max([1, *(math.ceil(samples * sizes.tokens[name] / budget) for name, budget in options.tokens.items() if name in sizes.tokens)])
    # A micro-batch has at least one sample, even one that is longer than the budget.
    parts = min(parts, samples)
    micro = -(-samples // parts)
    cached = parts > 1 and system.compares
    losses = [strategies.predict(kind, recipe.data.batch_size, width, cluster, str(dtype or torch.float32).removeprefix("torch."))
              for kind, width in sizes.losses]
    again = (sizes.again if options.checkpointing == "blocks" else 0.0) + (sizes.forward if cached else 0.0)
    computed = samples * (sizes.forward + sizes.backward + again)

    # Four bytes each: weights and their gradients are float32, whatever autocast makes of them.
    every, trained, block = 4 * _count(system, False), 4 * _count(system, True), 4 * _largest_block(system)
    held = 0.0 if options.offload and devices > 1 else 1 / shard
    lost = max((found[0].memory_bytes for found in losses), default=0.0)
    # Two blocks at once, one computed while the next arrives, and what lies outside of blocks, which is gathered as a whole.
    gathered = 0.0 if shard == 1 else 2 * block + every - 4 * sum(_sizes_of_blocks(system))
    used = Memory(every * held, trained / shard, 2 * trained * held, trained / shard if options.ema else 0.0,
                  sizes.saved[options.checkpointing] * micro, sizes.outputs * samples * (2 if cached else 1) + lost, once + gathered)
    room = (most - used.total + used.activations) / max(1.0, sizes.saved[options.checkpointing])

    intra = inter = 0.0
    if shard > 1:  # gathered by every forward and backward, block by block, and gradients scattered once
        moved = (shard - 1) / shard * (every * parts * (3 if cached else 2) + trained)
        intra, inter = (moved, 0.0) if shard <= cluster.width else (moved - moved / cluster.width, moved / cluster.width)
    replicas = devices // shard
    if replicas > 1:
        # A ring sends every byte twice, once to sum it and once to spread the sum.
        moved = 2 * (replicas - 1) / replicas * trained / shard
        # A ring crosses each link between nodes once for all devices that share it.
        slow = 0.0 if cluster.nodes == 1 else moved / max(1, cluster.width // shard)
        intra, inter = intra + moved - slow, inter + slow
    compute = computed / (cluster.tflops * 1e12)
    # Both kinds of links work at the same time.
    travel = max(intra / cluster.intra, inter / cluster.inter) / GB
    # Parameters and gradients travel while blocks are computed; what the loss sends is in its own time.
    seconds = max(compute, travel) + sum(found[0].seconds for found in losses)
    return Price(stage.until, sizes.tokens, sizes.forward, sizes.backward, computed, samples, micro, parts, intra, inter, used,
                 max(0, int(room)), losses, compute, travel, seconds)


def _count(system: nn.Module, trained: bool) -> int:
    return sum(p.numel() for p in system.parameters() if p.requires_grad or not trained)


def _sizes_of_blocks(system: nn.Module) -> list[int]:
    lists = [module for module in system.modules() if isinstance(module, nn.ModuleList)]
    return [_count(block, False) for module in lists for block in module]


def _largest_block(system: nn.Module) -> int:
    return max(_sizes_of_blocks(system), default=0)


def as_json(found: Plan, cluster: Cluster) -> dict[str, Any]:
    """Everything as plain values."""
    values = asdict(found)
    for stage, price in zip(values["stages"], found.stages, strict=True):
        stage["memory"]["total"] = price.memory.total
    return {"cluster": asdict(cluster), **values}


def table(found: Plan, recipe: Recipe, cluster: Cluster, memory: float) -> str:
    """The plan as text: what a step costs in each stage, whether it fits, what crosses devices, and how long the run takes."""
    share = "" if found.trained == found.parameters else f" ({found.trained / 1e6:.1f}M of them trained)"
    lines = [f"{recipe.run.name}: {found.system}, {found.parameters / 1e6:.1f}M parameters{share}, {recipe.data.batch_size} samples a step "
             f"on {cluster.nodes} x {cluster.width} devices, {found.dtype}"]
    for number, price in enumerate(found.stages):
        lines += ["", *_stage(number, price, memory)]
    last = found.stages[-1]
    lines.append("")
    for losses in last.losses:
        lines += strategies.table(losses)
    if not last.losses and found.compares:
        whole = recipe.data.batch_size - last.samples
        lines.append(f"the objective compares samples of all devices: up to {_size(found.features * whole)} of features reach each one "
                     f"({found.features / 1e3:.1f} kB a sample), and as much of their gradients comes back")
    if not found.compares:
        lines.append("no sample is compared with another: parameters and gradients alone cross devices")
    hours = found.seconds / 3600 * cluster.devices
    lines.append(f"{recipe.steps:,} steps: at least {clock(found.seconds)}, {hours:,.{0 if hours >= 100 else 2}f} device hours")
    return "\n".join(lines)


def _stage(number: int, price: Price, memory: float) -> list[str]:
    tokens = ", ".join(f"{name} {count:.0f}" for name, count in price.tokens.items())
    budget = max(price.tokens, key=lambda name: price.tokens[name], default=None)
    used = ", ".join(f"{name} {size / GB:.2f}" for name, size in asdict(price.memory).items())
    if price.memory.total <= memory:
        fits = "fits"
    elif price.fitting and budget is not None:
        tokens_of_one = int(price.fitting * price.tokens[budget])
        fits = f"does not fit; micro-batches of {price.fitting} samples would: train.tokens={{{budget}: {tokens_of_one}}}"
    else:
        fits = "does not fit, however small the micro-batches; try train.shard=world, or train.checkpointing=blocks"
    return [
        f"stage {number}, up to {price.until:.0%} of the steps; the longest sample: {tokens} tokens, "
        f"{price.forward / GB:.1f} GFLOP forward, {price.backward / GB:.1f} backward",
        f"a device: {price.samples} samples in {price.parts} micro-batch{'es' if price.parts > 1 else ''} of {price.micro}, "
        f"{price.computed / 1e12:.1f} TFLOP, {1e3 * price.compute_seconds:.1f} ms; parameters and gradients: "
        f"{_size(price.intra_bytes)} over fast links, "
        f"{_size(price.inter_bytes)} over slow ones, {1e3 * price.travel_seconds:.1f} ms",
        f"memory in GB: {used}: {price.memory.total / GB:.1f} of {memory / GB:.0f}: {fits}",
        f"a step: at least {1e3 * price.seconds:.1f} ms",
    ]


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
