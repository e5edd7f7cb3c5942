"""One training step: a fixed number of pairs, whatever the number of processes or micro-batches."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvlp.config import Config
from fastvlp.data import Batch
from fastvlp.models import TwoTower
from fastvlp.train import batches, checkpoint, distributed, grad_cache, schedule
from fastvlp.train.ema import Ema
from fastvlp.train.optim import build_optimizer


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


@dataclasses.dataclass
class Counters:
    """What has happened so far; part of every checkpoint.

    Attributes:
        step: batches consumed, which is also the position in the data. samples, image_tokens, text_tokens: over all processes.
        nonfinite: steps skipped; nonfinite_in_a_row: the present streak. seconds: of training, without evaluation and start-up.
    """

    step: int = 0
    samples: int = 0
    image_tokens: int = 0
    text_tokens: int = 0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    seconds: float = 0.0


class Trainer:
    """A model, its optimizer and everything else whose state a checkpoint holds.

    Args:
        model: two towers on ``world.device``. criterion: takes (image features, text features, scale, bias, local_sizes=...).
    """

    def __init__(self, config: Config, model: TwoTower, criterion: nn.Module, world: distributed.World) -> None:
        self.config, self.model, self.criterion, self.world = config, model, criterion, world
        self.optimizer = build_optimizer(model, config.optim)
        self.ema = Ema(model, config.train.ema) if config.train.ema is not None else None
        self.amp_dtype = amp_dtype(config.train.amp, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp_dtype == torch.float16)
        self.local_sizes = world.sizes(config.data.batch_size)
        self.counters = Counters()
        self.towers: nn.Module = grad_cache.Towers(model)
        if world.size > 1:
            self.towers = DistributedDataParallel(self.towers)

    def amp(self) -> contextlib.AbstractContextManager:
        """Autocast to the run's dtype; nothing when the run has none."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, self.amp_dtype)

    def step(self, batch: Batch, stop: int = 0) -> dict[str, float]:
        """Train on one batch; all processes decide together whether it counts.

        Args:
            stop: the signal that this process was sent (SIGINT or SIGTERM), or 0.

        Returns:
            loss (the mean over processes), grad_norm, lr, and stop: the signal that any process was sent, or 0.

        Raises:
            TrainingError: too many non-finite losses in a row.
        """
        counters, config = self.counters, self.config
        stage, lr = schedule.stage_at(config, counters.step), schedule.learning_rate(config, counters.step)
        micro = batches.split(batch, stage, self.model.config.image.patch_size, config.train.image_tokens, config.train.text_tokens,
                              self.world.device)
        loss = grad_cache.backward(self.towers, self.model, micro, self._loss, self.amp, self.scaler.scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()

        sums = self.world.sum(torch.stack([loss.double(), *loss.new_tensor(
            [stop == signal.SIGINT, stop == signal.SIGTERM, len(micro), micro.image_tokens, micro.text_tokens], dtype=torch.float64)]))
        loss_sum, interrupts, terminations, samples, image_tokens, text_tokens, norm_value = [*sums.tolist(), norm.item()]
        mean = loss_sum / self.world.size
        # A finite loss with an infinite float16 gradient is the scaler's business: it skips the step itself and halves its scale.
        finite = math.isfinite(mean) and (math.isfinite(norm_value) or self.scaler.is_enabled())
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if finite:
            self.model.clamp_scale()
            if self.ema is not None:
                self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)

        counters.step += 1
        counters.samples += int(samples)
        counters.image_tokens += int(image_tokens)
        counters.text_tokens += int(text_tokens)
        counters.nonfinite += not finite
        counters.nonfinite_in_a_row = 0 if finite else counters.nonfinite_in_a_row + 1
        if counters.nonfinite_in_a_row >= config.train.max_nonfinite:
            raise TrainingError(
                f"the loss or its gradient was not finite for {counters.nonfinite_in_a_row} steps in a row (loss {mean}, gradient norm "
                f"{norm_value}), up to step {counters.step}; the last checkpoint is from before. Try a lower optim.lr, a longer "
                "schedule.warmup, optim.grad_clip=1 or train.amp=none")
        sent = signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0
        return {"loss": mean, "grad_norm": norm_value, "lr": lr, "stop": sent}

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, of all processes (a collective call)."""
        return {"format": 1, "step": self.counters.step, "counters": dataclasses.asdict(self.counters),
                "model": self.model.state_dict(), "ema": self.ema.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "random": self.world.gather(checkpoint.random_state(self.world.device))}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``; with another number of processes the random generators keep their fresh seeds."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.counters = Counters(**state["counters"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        if len(state["random"]) == self.world.size:
            checkpoint.set_random_state(state["random"][self.world.rank], self.world.device)

    def evaluation_weights(self) -> contextlib.AbstractContextManager:
        """The averaged weights, where there are any, inside this context."""
        return self.ema.applied() if self.ema is not None else contextlib.nullcontext()

    def export(self, folder: Path) -> None:
        """Write the model directory that ``fastvlp.load`` reads, with the weights that are evaluated."""
        with self.evaluation_weights():
            self.model.save(folder)

    def _loss(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return self.criterion(image, text, scale, bias, local_sizes=self.local_sizes)

    def _gradient_norm(self) -> Tensor:
        """Norm of the whole gradient before clipping, 0-d."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        if self.config.optim.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.grad_clip, norm, foreach=True)
        return norm


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that ``train.amp`` means on a device."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" else "none"
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
