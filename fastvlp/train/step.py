"""One training step of any system: a fixed number of samples, whatever the number of processes or micro-batches."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp._schema import ConfigError
from fastvlp.data.batch import Batch, Stage
from fastvlp.recipe import Recipe
from fastvlp.systems.system import Momentum, Outputs, Scale, System
from fastvlp.train import flops, schedule
from fastvlp.train.ema import Ema
from fastvlp.train.gradients import gradients
from fastvlp.train.optim import build_optimizer
from fastvlp.train.parallel import World, parallelize, whole_tensor
from fastvlp.train.spans import COPY, UPDATE, span
from fastvlp_kernels.packed import Packed


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


@dataclasses.dataclass
class Counters:
    """What has happened so far; part of every checkpoint.

    Attributes:
        step: batches consumed. samples: over all processes. positions: samples consumed of each source, which is the place in the data.
        tokens: of each packed stream, over all processes. nonfinite: steps skipped; nonfinite_in_a_row: the present streak.
        seconds: of training, without evaluation and start-up.
    """

    step: int = 0
    samples: int = 0
    positions: list[int] = dataclasses.field(default_factory=list)
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        counts = [self.step, self.samples, *self.positions, *self.tokens.values(), self.nonfinite, self.nonfinite_in_a_row, self.seconds]
        if not all(isinstance(count, int | float) and count >= 0 for count in counts):  # of a checkpoint that strangers wrote
            raise TypeError(f"counters are numbers, not {counts}")


@dataclasses.dataclass
class Pending:
    """A step that was given to the device; ``Trainer.settle`` reads its numbers.

    Attributes:
        numbers: the gradient's norm, whether all is finite, then the loss terms of ``names``, on the device.
        samples, tokens: over all processes. flops: that these samples need, over all processes. rate: operations per second of all of them.
        stop: the largest signal that any process was sent, or 0.
    """

    numbers: Tensor
    names: list[str]
    samples: int
    tokens: dict[str, int]
    flops: float
    rate: float
    stop: int
    lr: float


class Trainer:
    """A system, its optimizer and everything else whose state a checkpoint holds.

    Args:
        system: on ``world.device``, with the same weights on every process; not wrapped yet.
        sources: how many sources the data has.

    Attributes:
        rate: of this process's device, if that is measured.
    """

    def __init__(self, recipe: Recipe, system: System, world: World, sources: int = 1) -> None:
        self.recipe, self.world = recipe, world
        options = recipe.train
        self.widths = {name: getattr(part, "width", 0) for name, part in system.named_children()}
        self.amp_dtype = amp_dtype(options.amp, world.device)
        self.system = parallelize(system, options.shard, world=world, compile=options.compile, checkpointing=options.checkpointing,
                                  offload=options.offload)
        self.optimizer = build_optimizer(self.system, recipe.optim)
        self.ema = Ema(self.system, options.ema) if options.ema is not None else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp_dtype == torch.float16)
        self.counters = Counters(positions=[0] * sources)
        self.rate: flops.MatrixRate | None = None
        self._frozen: tuple[str, ...] = ()
        self._counted: tuple[Stage | None, float] = (None, 0.0)
        self._after_step = type(system).after_step is not System.after_step

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast to the run's dtype; nothing when the run has none."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, self.amp_dtype)

    def step(self, batch: Batch, stop: int = 0) -> Pending:
        """Give one batch to the device; all processes decide together, on the device, whether it counts.

        Args:
            batch: this process's samples. stop: the signal that this process was sent, or 0.
        """
        counters, step = self.counters, self.counters.step
        stage = schedule.stage_at(self.recipe, step)
        self._freeze(stage.frozen)
        batch, parts, stop, tokens, cost, rate = self._agree(batch, stop)
        with span(COPY):
            batch = batch.to(self.world.device, non_blocking=True)
        if self._counted[0] is not stage:
            few = batch.take(range(min(flops.SAMPLES, *batch.sizes)))
            self._counted = stage, flops.needed_per_cost(self.system, few, few.cost(self.widths), self.world, self.autocast())
        losses, out = gradients(self.system, batch, parts, autocast=self.autocast, scale_loss=self.scaler.scale)
        lr = schedule.learning_rate(self.recipe, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        with span(UPDATE):
            self.scaler.unscale_(self.optimizer)
            norm = self._gradient_norm()
        terms = torch.stack([value.float() for value in losses.values()])
        mean = self.world.sum(terms) / self.world.size
        finite = torch.isfinite(norm) & torch.isfinite(mean).all()
        with span(UPDATE):
            self._update(finite)
            if self.ema is not None:
                self.ema.update(finite)
            if not self._after_step or bool(finite):  # a queue must not take features that are no numbers
                with torch.no_grad():
                    self._follow(out, batch)
        counters.step += 1
        counters.samples += batch.total
        for name, count in tokens.items():
            counters.tokens[name] = counters.tokens.get(name, 0) + count
        numbers = torch.cat([torch.stack([norm.float(), finite.float()]), mean])
        return Pending(numbers, list(losses), batch.total, tokens, self._counted[1] * cost, rate, stop, lr)

    def settle(self, pending: Pending) -> dict[str, float]:
        """Read a step's numbers; the first thing that waits for the device.

        Returns:
            loss, each of its terms where there are several, grad_norm and lr.

        Raises:
            TrainingError: too many losses or gradients in a row were not finite.
        """
        norm, finite, *terms = pending.numbers.tolist()
        counters = self.counters
        counters.nonfinite += not finite
        counters.nonfinite_in_a_row = 0 if finite else counters.nonfinite_in_a_row + 1
        if self.ema is not None and not finite:
            self.ema.updates -= 1  # it counted before anybody had read that the step does not
        loss = math.fsum(terms) if all(map(math.isfinite, terms)) else math.nan
        if counters.nonfinite_in_a_row >= self.recipe.train.max_nonfinite:
            raise TrainingError(
                f"the loss or its gradient was not finite for {counters.nonfinite_in_a_row} steps in a row (loss {loss}, gradient norm "
                f"{norm}), up to step {counters.step}; the last checkpoint is from before. Try a lower optim.lr, a longer "
                "schedule.warmup, optim.grad_clip=1 or train.amp=none")
        each = dict(zip(pending.names, terms, strict=True)) if len(terms) > 1 else {}
        return {"loss": loss, **each, "grad_norm": norm, "lr": pending.lr}

    def evaluation_weights(self) -> contextlib.AbstractContextManager:
        """The averaged weights, where there are any, inside this context."""
        return self.ema.applied() if self.ema is not None else contextlib.nullcontext()

    def _agree(self, batch: Batch, stop: int) -> tuple[Batch, list[Tensor], int, dict[str, int], int, int]:
        """What the processes have to know of one another before a step, in one exchange of a few integers between the hosts."""
        counts = self.system.counts(batch)
        packed = {name: stream.total for name, stream in batch.streams.items() if isinstance(stream, Packed)}
        try:
            needed = batch.microbatches(self.recipe.train.tokens, self.widths)
        except ValueError as error:
            raise ConfigError(f"train.tokens: {error}") from error
        everyone = self.world.numbers([len(batch), needed, stop, int(batch.cost(self.widths)), int(self.rate.best) if self.rate else 0,
                                       *counts.values(), *packed.values()])
        sizes, parts, stops, costs, rates, *sums = zip(*everyone, strict=True)
        totals = [sum(column) for column in sums]
        known = dict(zip(counts, totals, strict=False))
        tokens = dict(zip(packed, totals[len(counts):], strict=True))
        batch = dataclasses.replace(batch, sizes=sizes, counts=known)
        # A process with fewer samples than another needs micro-batches would have an empty one: then all make fewer.
        agreed = min(max(parts), min(sizes))
        return batch, batch.split(agreed, self.widths), max(stops), tokens, sum(costs), sum(rates)

    def _gradient_norm(self) -> Tensor:
        """Norm of the whole gradient before clipping, 0-d."""
        parameters = [p for p in self.system.parameters() if p.grad is not None]
        if not parameters:
            return torch.zeros((), device=self.world.device)
        norm = whole_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
        if self.recipe.optim.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.optim.grad_clip, norm, foreach=True)
        return norm

    def _update(self, finite: Tensor) -> None:
        """The optimizer's step, skipped where something is not finite; fused AdamW decides that on the device."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself: every non-finite gradient was found when it was unscaled
            self.scaler.update()
        else:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _follow(self, out: Outputs, batch: Batch) -> None:
        for module in self.system.modules():
            if isinstance(module, Momentum | Scale):
                module.follow()
        self.system.after_step(out, batch)

    def _freeze(self, names: tuple[str, ...]) -> None:
        """Parts that do not train in this stage; those that are frozen for good stay so."""
        if names == self._frozen:
            return
        for name in (*self._frozen, *names):
            for parameter in named_part(self.system, name).parameters():
                if parameter in self._trainable:
                    parameter.requires_grad_(name not in names)
        self._frozen = names

    @property
    def _trainable(self) -> set[nn.Parameter]:
        return {p for group in self.optimizer.param_groups for p in group["params"]}


def named_part(system: System, name: str) -> nn.Module:
    """A part of a system by its dotted name.

    Raises:
        ConfigError: there is no such part.
    """
    try:
        return system.get_submodule(name)
    except AttributeError:
        parts = ", ".join(part for part, _ in system.named_children())
        raise ConfigError(f"{type(system).__name__} has no part {name!r}; its parts are {parts}") from None


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that ``train.amp`` means on a device."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "none"
    dtypes: Mapping[str, Any] = {"none": None, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes[amp]
