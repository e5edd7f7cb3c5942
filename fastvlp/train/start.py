"""What is made, checked and said before the first step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastvlp.config import ConfigError
from fastvlp.data.fields import Caption, Image, Other
from fastvlp.data.images import Unusable
from fastvlp.data.order import Order
from fastvlp.data.samples import Reader
from fastvlp.data.shards import Index, Shards, expand
from fastvlp.data.stream import Source, Stream
from fastvlp.evaluate import load_classes
from fastvlp.recipe import NO_DATA, Recipe
from fastvlp.systems.files import bind, build_system
from fastvlp.systems.system import System
from fastvlp.train import agreement, report, schedule
from fastvlp.train.parallel import World
from fastvlp.train.step import Trainer, named_part

LOOKED_AT = 256  # samples whose captions are measured
SAID = 0.1  # share of captions whose cut is worth a line


def prepare(recipe: Recipe, world: World) -> tuple[System, Stream]:
    """The system with fresh weights, the same on every process, and the stream of its data, from the first batch.

    Raises:
        ConfigError, FileNotFoundError: what would fail later: a batch too small or larger than the data, shards or classes or packages
        that are not there.
    """
    check(recipe, world)
    torch.manual_seed(recipe.run.seed)
    system = build_system(recipe)
    for name in {name for stage in recipe.schedule.stages for name in stage.frozen}:
        named_part(system, name)
    return system, _stream(recipe, system, world)


def check(recipe: Recipe, world: World) -> None:
    """Refuse now what would fail later."""
    if recipe.data.batch_size < world.size:
        raise ConfigError(f"data.batch_size is {recipe.data.batch_size} for {world.size} processes; each needs at least one sample")
    if not recipe.data.fields:
        raise ConfigError("data.fields is empty; a batch needs streams, such as {'image': Image(), 'text': Caption()}")
    streams = {name for source in recipe.data.sources for name in (source.fields or recipe.data.fields)}
    unknown = [name for name in recipe.train.tokens if name not in streams]
    if unknown:
        raise ConfigError(f"train.tokens names {', '.join(unknown)}; the streams of this recipe are {', '.join(sorted(streams))}")
    _named(recipe)
    for key, shards in _shards(recipe):
        _expanded(key, shards)
    if recipe.eval.classes is not None:
        try:
            load_classes(recipe.eval.classes)
        except ValueError as error:
            raise ConfigError(f"eval.classes: {error}") from error
    if isinstance(recipe.train.compile, str):
        if recipe.train.compile not in torch.compiler.list_backends(exclude_tags=None):
            raise ConfigError(f"train.compile is {recipe.train.compile!r}; true, false or a backend of torch.compile (inductor, "
                              "aot_eager) is needed")
    for name in recipe.run.log:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.log names {name}, which is not installed: pip install 'fastvlp[log]'")


def _named(recipe: Recipe) -> None:
    if any(source.shards == NO_DATA for source in recipe.data.sources):
        raise ConfigError(f"{recipe.run.name} brings no data of its own; name yours: data=SHARDS (docs/data.md says what is read), or "
                          "data=mini:train for the data that ships")


def counted(recipe: Recipe, world: World) -> Recipe:
    """A recipe whose length, where it is given in epochs, is a number of samples: those that all sources with a weight hold, by their
    headers, which the first process reads.

    Raises:
        ConfigError, FileNotFoundError: no data, or none that can be used.
    """
    epochs = recipe.schedule.epochs
    if epochs is None:
        return recipe

    def held() -> int:
        _named(recipe)
        indices = [Index(_expanded("data.train", source.shards), lambda reason, name: None)
                   for source in recipe.data.sources if source.weight > 0]
        return sum(index.count(number) for index in indices for number in range(len(index.paths)))

    samples = max(1, math.ceil(epochs * agreement.first_decides(world, held)))
    return replace(recipe, schedule=replace(recipe.schedule, epochs=None, samples=samples))


def _shards(recipe: Recipe) -> Iterator[tuple[str, Shards]]:
    yield from (("data.train", source.shards) for source in recipe.data.sources)
    yield from (("eval", shards) for shards in report.shards(recipe.eval) if shards)


def _expanded(key: str, shards: Shards) -> list[str]:
    try:
        return expand(shards)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{key}: {error}") from error


class Early:
    """Hears of bad samples before there is a log."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def __call__(self, reason: str, name: str) -> None:
        self.heard.append((reason, name))


def _stream(recipe: Recipe, system: System, world: World) -> Stream:
    sources = [Source(s.shards, s.weight, None if s.fields is None else bind(s.fields, system)) for s in recipe.data.sources]
    early = Early()
    try:
        stream = Stream(sources, system.fields, recipe.data.batch_size, recipe.run.seed, lambda step: schedule.stage_at(recipe, step),
                        workers=recipe.data.workers, rank=world.rank, world_size=world.size, shuffle=recipe.data.shuffle,
                        on_skip=early, pin_memory=world.device.type == "cuda", timeout=recipe.run.timeout if recipe.data.workers else 0)
        for index, source in zip(stream.indices, sources, strict=True):
            if source.weight > 0:
                Order(index, recipe.run.seed, recipe.data.shuffle).require(recipe.data.batch_size)
    except (ValueError, RuntimeError) as error:
        why = f" ({len(early.heard)} could not be used, such as {early.heard[0][1]}: {early.heard[0][0]})" if early.heard else ""
        raise ConfigError(f"data.train: {error}{why}") from error
    return stream


def headline(recipe: Recipe, trainer: Trainer, stream: Stream) -> Iterator[str]:
    """What is trained, on what, in which precision; and what somebody might not have meant."""
    for key, shards in _shards(recipe):
        paths = expand(shards)
        missing = Index(paths, lambda reason, name: None).missing()
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            yield f"note: {len(missing)} of the {len(paths)} shards of {key} are missing: {some}"
    world, system, options = trainer.world, trainer.system, recipe.train
    every, trained = (sum(p.numel() for p in system.parameters() if p.requires_grad or not only) for only in (False, True))
    where = f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
    precision = str(trainer.amp_dtype or torch.float32).removeprefix("torch.")
    share = "" if every == trained else f" ({trained / every:.1%} of them trained)"
    sharded = "" if options.shard == 1 or world.size == 1 else f", sharded over {world.size if options.shard == 'world' else options.shard}"
    yield (f"{recipe.run.name}: {type(system).__name__.removeprefix('FSDP')}, {every / 1e6:.1f}M parameters{share}, {recipe.steps} steps "
           f"of {recipe.data.batch_size} samples, {where}{sharded}, {precision}")
    yield f"{', '.join(_inputs(recipe, system))}; {_length(recipe, stream.indices)}"
    if recipe.schedule.warmup >= recipe.steps:
        yield f"note: schedule.warmup is {recipe.schedule.warmup} of {recipe.steps} steps: the learning rate never reaches its peak"
    for name, field in system.fields.items():
        last, evaluated = recipe.schedule.stages[-1].image_size, getattr(field, "_size", None)
        if getattr(field, "size", None) is None and last is not None and evaluated is not None and last != evaluated:
            yield f"note: the last stage trains {name} at {last} pixels, evaluation uses {evaluated}"
    for index, source in zip(stream.indices, recipe.data.sources, strict=True):
        fields = system.fields if source.fields is None else bind(source.fields, system)
        yield from _cut_captions(index, fields)


def _inputs(recipe: Recipe, system: System) -> Iterator[str]:
    """What a model sees of a sample, stream by stream."""
    for name, field in system.fields.items():
        if isinstance(field, Image):
            sizes = [field.at(stage) for stage in recipe.schedule.stages]
            patches = sorted({max(1, round(keep * (size // patch) ** 2)) for size, patch, keep, _ in sizes})
            pixels = sorted({size for size, _, _, _ in sizes})
            yield (f"{name}: {_range(pixels)} pixels, at most {_range(patches)} patches of {field.patch}"
                   f"{f', {field.views} views' if field.views > 1 else ''}")
        elif isinstance(field, Caption) and field.length is not None:
            yield f"{name}: at most {field.length} tokens"


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _length(recipe: Recipe, indices: Sequence[Index]) -> str:
    """Samples and epochs; those of data too large to read all headers at every start are estimated from the shards that were read."""
    seen = recipe.steps * recipe.data.batch_size
    held, exact = 0.0, True
    for index, source in zip(indices, recipe.data.sources, strict=True):
        if source.weight > 0:
            samples, all_read = index.estimate()
            held, exact = held + samples, exact and all_read
    return f"{seen:,} samples = {seen / max(1.0, held):.3g} epochs of {'' if exact else 'about '}{held:,.0f}"


def _cut_captions(index: Index, fields: Mapping[str, Any]) -> Iterator[str]:
    """A line for each field of captions: how many of the first it cuts, and what to do where these are many."""
    texts: list[str] | None = None
    for name, field in fields.items():
        caption = field.field if isinstance(field, Other) else field
        if not isinstance(caption, Caption) or caption.shear is not None or caption.length is None:
            continue
        texts = _some_captions(index) if texts is None else texts
        long = [caption.cuts(text) for text in texts]
        share = sum(long) / max(1, len(long))
        if share >= SAID:
            yield (f"note: {share:.0%} of the captions ({len(long)} were looked at) are longer than the {caption.length} tokens of {name}, "
                   f"and are cut; raise model.{caption.part}.context_length, or data.fields.{name}.length")
        else:
            yield f"{name}: {share:.1%} of {len(long)} captions that were looked at are cut"


def _some_captions(index: Index) -> list[str]:
    """The first captions of samples spread over the first shard that has any."""
    reader = Reader(index)
    number = next((number for number in range(len(index.paths)) if index.count(number)), None)
    found: list[str] = []
    if number is None:
        return found
    for member in np.unique(np.linspace(0, index.count(number) - 1, LOOKED_AT).astype(int)).tolist():
        try:
            found.append(reader.labels(number, member).captions[0])
        except Unusable:  # named when it is trained on
            continue
    return found
