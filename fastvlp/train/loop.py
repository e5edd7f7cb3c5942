"""A whole run: from a configuration to a trained model with its scores."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import torch

from fastvlp import losses
from fastvlp.config import Config, ConfigError, dump, to_dict
from fastvlp.data import Batch, Stream, expand, load_tokenizer
from fastvlp.evaluate import load_classes
from fastvlp.models import TwoTower
from fastvlp.train import checkpoint, distributed, report, resume, schedule
from fastvlp.train.interrupt import Interrupted, StopRequest
from fastvlp.train.log import Log
from fastvlp.train.memory import keep_freed_memory
from fastvlp.train.progress import Progress
from fastvlp.train.trainer import Trainer


def train(config: Config) -> dict[str, Any]:
    """Train a two-tower model, continuing an interrupted run by default.

    Under torchrun every process calls this with the same configuration. Results go to ``run.dir/run.name``: config.yaml, log.jsonl,
    checkpoints/, model/ (for ``fastvlp.load``), curves.png, retrieval.png, results.json.

    Returns:
        What results.json holds (on every process but the first: without scores).

    Raises:
        ConfigError: settings that do not fit together or the run directory. FileNotFoundError: no shards.
        TrainingError: too many non-finite losses in a row. Interrupted: SIGINT or SIGTERM, after a checkpoint was written.
    """
    began = time.perf_counter()
    with StopRequest() as stop, distributed.join(config.run.device) as world:
        if world.device.type == "cpu":
            keep_freed_memory()
        return _run(config, world, stop, began)


def _run(config: Config, world: distributed.World, stop: StopRequest, began: float) -> dict[str, Any]:
    _check(config, world)
    folder = Path(config.run.dir) / config.run.name
    progress = Progress(config.steps, config.train.print_every, enabled=world.rank == 0)
    state = resume.find(config, folder, progress.say)
    if state is not None and state["step"] >= config.steps and report.exists(folder):
        progress.say(f"{folder} is a finished run; --resume none would start it over")
        return report.show(folder, progress.say)

    trainer = build_trainer(config, world)
    if state is not None:
        trainer.load_state(state)
        progress.say(f"continuing {folder} after step {state['step']}")
    world.wait()  # everybody has read what the first process may now delete
    if world.rank == 0:
        _prepare(folder, config, trainer.counters.step)
    log = Log(folder, config, trainer.counters.step, enabled=world.rank == 0)
    progress.say(_headline(config, trainer))
    trained, evaluated = config.schedule.stages[-1].image_size, config.model.image.image_size
    if trained != evaluated:
        progress.say(f"note: the last stage trains at {trained} pixels, evaluation uses model.image.image_size={evaluated}")
    try:
        skipped, startup_seconds = _fit(config, trainer, folder, log, progress, stop, began)
        if world.rank > 0:
            return {"steps": trainer.counters.step, "train_seconds": trainer.counters.seconds}
        return report.finish(config, trainer, folder, log, progress, skipped=skipped, startup_seconds=startup_seconds)
    finally:
        progress.close()
        log.close()


def build_trainer(config: Config, world: distributed.World) -> Trainer:
    """The model with fresh weights (the same on every process), its loss and its optimizer.

    Raises:
        ConfigError: the tokenizer cannot be used or does not fit the text tower, or the bias the loss.
    """
    torch.manual_seed(config.run.seed)
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.text.context_length)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"data.tokenizer: {error}") from error
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise ConfigError(f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens and model.text.vocab_size is "
                          f"{config.model.text.vocab_size}; set model.text.vocab_size={tokenizer.vocab_size}")
    if config.loss.name == "clip" and config.model.init_bias is not None:
        raise ConfigError("model.init_bias is set, and loss.name=clip has no bias; set model.init_bias=null or loss.name=siglip")
    model = TwoTower(config.model)
    model.tokenizer = tokenizer
    model.to(world.device)
    loss = losses.ClipLoss if config.loss.name == "clip" else losses.SigLipLoss
    criterion = loss(rank=world.rank, world_size=world.size, strategy=config.loss.strategy, node_size=config.loss.node_size)
    return Trainer(config, model, criterion, world)


def _check(config: Config, world: distributed.World) -> None:
    """Refuse now what would fail later: a batch too small, pictures too large, shards or classes or packages that are not there."""
    if config.data.batch_size < world.size:
        raise ConfigError(f"data.batch_size is {config.data.batch_size} for {world.size} processes; each needs at least one pair")
    image, text = config.model.image, config.model.text
    reach = image.grid * image.patch_size
    largest = max(stage.image_size for stage in config.schedule.stages)
    if largest > reach:
        raise ConfigError(f"a stage has image_size {largest} and the image tower reaches {reach} pixels (grid {image.grid} x "
                          f"patch_size {image.patch_size}); raise model.image.grid or lower the stage")
    patches = max(max(1, int(round(stage.image_size / image.patch_size) ** 2 * stage.keep + 0.5)) for stage in config.schedule.stages)
    for name, budget, longest in (("image_tokens", config.train.image_tokens, patches),
                                  ("text_tokens", config.train.text_tokens, text.context_length)):
        if budget is not None and budget < longest:
            raise ConfigError(f"train.{name} is {budget}, and one sample may have {longest} tokens; at least that is needed")
    for shards in (config.data.train, config.eval.zero_shot, config.eval.retrieval):
        if shards:
            expand(shards)
    if config.eval.classes is not None:
        try:
            load_classes(config.eval.classes)
        except ValueError as error:
            raise ConfigError(f"eval.classes: {error}") from error
    for name in config.run.log:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.log names {name}, which is not installed: pip install 'fastvlp[log]'")


def _fit(config: Config, trainer: Trainer, folder: Path, log: Log, progress: Progress, stop: StopRequest,
         began: float) -> tuple[dict[str, int], float]:
    """Train to the last step; returns the samples that were skipped, by reason, and the seconds before the first step."""
    world, counters = trainer.world, trainer.counters

    def on_skip(reason: str, name: str) -> None:  # the other processes name theirs through logging
        log.write(counters.step, skipped=reason, sample=name)

    assert trainer.model.tokenizer is not None  # build_trainer gave it one
    stream = Stream(config.data.train, trainer.model.tokenizer, batch_size=config.data.batch_size,
                    patch_size=config.model.image.patch_size, context_length=config.model.text.context_length, seed=config.run.seed,
                    stage_at=lambda step: schedule.stage_at(config, step), workers=config.data.workers, rank=world.rank,
                    world_size=world.size, start=counters.step, max_captions=config.data.max_captions,
                    on_skip=on_skip if world.rank == 0 else None)
    startup_seconds = 0.0
    with contextlib.closing(cast(Generator[Batch, None, None], iter(stream))) as pairs:
        while counters.step < config.steps:
            batch = next(pairs)
            if not startup_seconds:
                mark = time.perf_counter()
                startup_seconds = mark - began
            images, tokens = counters.samples, counters.image_tokens + counters.text_tokens
            values = trainer.step(batch, stop.signum)
            seconds, mark = time.perf_counter() - mark, time.perf_counter()
            counters.seconds += seconds
            images, tokens = counters.samples - images, counters.image_tokens + counters.text_tokens - tokens

            interrupted, last = int(values.pop("stop")), counters.step == config.steps
            if counters.step % config.train.log_every == 0 or last:
                log.write(counters.step, **values, image_size=schedule.stage_at(config, counters.step - 1).image_size,
                          images_per_second=images / seconds, tokens_per_second=tokens / seconds, seconds=counters.seconds)
            progress.update(counters.step, seconds, images, tokens, values["loss"], _note(trainer))
            due = config.train.checkpoint_every and counters.step % config.train.checkpoint_every == 0
            if due or last or interrupted:
                _save(trainer, folder)
            if interrupted:
                raise Interrupted(interrupted, f"stopped at step {counters.step}; the same command continues from here")
            if config.eval.every and counters.step % config.eval.every == 0 and not last:
                counters.seconds += time.perf_counter() - mark
                if world.rank == 0:
                    with trainer.evaluation_weights():
                        report.log_scores(config, trainer.model, counters.step, log, progress)
                mark = time.perf_counter()
        skipped = sum((Counter(counts) for counts in world.gather(dict(stream.skipped))), Counter())
        return dict(skipped), startup_seconds


def _save(trainer: Trainer, folder: Path) -> None:
    state = {**trainer.state(), "config": to_dict(trainer.config)}
    if trainer.world.rank == 0:
        checkpoint.save(folder / "checkpoints", trainer.counters.step, state, trainer.export, trainer.config.train.keep)


def _prepare(folder: Path, config: Config, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.forget_after(folder / "checkpoints", step if step else -1)
    (folder / "results.json").unlink(missing_ok=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")


def _headline(config: Config, trainer: Trainer) -> str:
    world = trainer.world
    parameters = sum(p.numel() for p in trainer.model.parameters())
    where = f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
    precision = str(trainer.amp_dtype or torch.float32).removeprefix("torch.")
    return (f"{config.run.name}: {parameters / 1e6:.1f}M parameters, {config.steps} steps of {config.data.batch_size} pairs, "
            f"{config.loss.name} loss, {where}, {precision}")


def _note(trainer: Trainer) -> str:
    return f"  {trainer.counters.nonfinite} skipped" if trainer.counters.nonfinite else ""
