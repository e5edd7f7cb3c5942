"""``fastvlp recipes``: the systems that ship, and the keys of a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.resources
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastvlp import config
from fastvlp.recipe import Data, Eval, Optim, Recipe, Run, Schedule, Train

SECTIONS = {"run": Run, "data": Data, "optim": Optim, "schedule": Schedule, "train": Train, "eval": Eval}
# What other trainers call it, with a value where theirs means another; a name that is a key here, too, needs no entry.
ELSEWHERE = {
    "learning_rate": "optim.lr", "wd": "optim.weight_decay", "beta1": "optim.betas.0", "beta2": "optim.betas.1",
    "grad_clip_norm": "optim.grad_clip", "max_grad_norm": "optim.grad_clip", "train_batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size", "train_data": "data.train", "dataset": "data.train", "num_workers": "data.workers",
    "max_steps": "schedule.steps", "num_train_epochs": "schedule.epochs", "train_num_samples": "schedule.samples",
    "warmup_steps": "schedule.warmup", "lr_scheduler": "schedule.shape", "precision": "train.amp", "bf16": "train.amp=bf16",
    "fp16": "train.amp=fp16", "torchcompile": "train.compile=true", "grad_checkpointing": "train.checkpointing=blocks",
    "gradient_checkpointing": "train.checkpointing=blocks", "accum_freq": "train.tokens={STREAM: TOKENS}",
    "gradient_accumulation_steps": "train.tokens={STREAM: TOKENS}", "save_frequency": "train.checkpoint_every",
    "save_steps": "train.checkpoint_every", "val_frequency": "eval.every", "logs": "run.dir", "output_dir": "run.dir",
    "report_to": "run.log", "pretrained": "run.start", "aug_cfg": "schedule.stages.0.augment",
    "csv_img_key": "data.train=TABLE?image=COLUMN", "csv_caption_key": "data.train=TABLE?caption=COLUMN",
    "csv_separator": "data.train=TABLE?sep=CHARACTER", "val_data": "eval.retrieval", "imagenet_val": "eval.zero_shot",
    "force_image_size": "model.image.image_size", "batch": "data.batch_size", "bs": "data.batch_size",
}


def command(options: argparse.Namespace) -> int:
    """List the systems, or the keys of one recipe."""
    print(keys(config.load(options.recipe)) if options.recipe else "\n".join(listing()))
    return 0


def listing() -> Iterator[str]:
    """Name, paper, what the recipe shows, what it reached, and the other recipes of the file."""
    found = json.loads((importlib.resources.files("fastvlp.systems") / "measured.json").read_text(encoding="utf-8"))
    for name in config.names():
        recipe = config.function(name)
        module = sys.modules[recipe.__module__]
        papers = f"; {name}:paper" if hasattr(module, "paper") else ""
        yield f"{name}{' (default)' if name == config.DEFAULT else ''}{papers}"
        yield f"    {(module.__doc__ or '').splitlines()[0]}"
        yield f"    {' '.join((recipe.__doc__ or '').split())}"
        yield f"    {measured(found[name]) if name in found else 'not measured'}"
    yield "for your own pictures and captions: fastvlp train RECIPE data=SHARDS"
    for name, recipe in config.for_own_data().items():
        yield f"{name}\n    {' '.join((recipe.__doc__ or '').split())}"


def measured(entry: Mapping[str, Any]) -> str:
    """The line about what a recipe reached by itself (``python -m benchmarks recipes --alone``)."""
    scores = "; ".join(f"{one['name']} {one['value']:.3f} ({one['items']:,} {one['of']})" for one in entry["scores"])
    starts = ", ".join(f"{part or 'all'} of {other.split()[0]}" for part, other in entry.get("start", {}).items())
    return (f"measured: {scores}; {entry['samples']:,} samples in {entry['seconds']:.0f} s, {entry['threads']} thread of "
            f"{entry['machine']}, seeds: {entry['seeds']}, commit {entry['commit']}{f'; starts with {starts}' if starts else ''}")


def keys(recipe: Recipe) -> str:
    """Every key of a recipe with its value, section by section, and what the section's keys mean."""
    values = config.to_dict(recipe)
    lines = [f"Keys of {recipe.run.name}, written key=value behind the recipe; lists as [a, b], mappings as {{a: b}}."]
    for section, kind in SECTIONS.items():
        lines += ["", f"{section}: {inspect.cleandoc(kind.__doc__ or '')}", *_lines(values[section], section)]
    lines += ["", "model: what is built; make names the class, the rest are its arguments.", *_lines(values["model"], "model")]
    return "\n".join(lines)


def _lines(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _lines(item, f"{path}.{key}")
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _lines(item, f"{path}.{number}")
    else:
        yield f"  {path}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str) and set(value) & set("{}[],#'\""):  # YAML would read them as something else
        return json.dumps(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else "{}" if value == {} else str(value)


def key_for(flag: str, rest: Sequence[str]) -> str:
    """The sentence about a flag that another tool has: the key that means the same, with the value that was given."""
    name, _, given = flag.lstrip("-").partition("=")
    name = name.replace("-", "_")
    given = given or next((one for one in rest[:1] if not one.startswith("-") and "=" not in one), "")
    # Reversed, so that of equal names the one of the first section wins.
    known = {field.name: f"{section}.{field.name}" for section, kind in reversed(SECTIONS.items()) for field in dataclasses.fields(kind)}
    found = ELSEWHERE.get(name) or known.get(name) or next((known[near] for near in difflib.get_close_matches(name, known, 1, 0.75)), None)
    if found is None:
        return f"unrecognized arguments: {flag}; settings are written key=value, and fastvlp recipes NAME lists them"
    change = found if "=" in found else f"{found}={given or '...'}"
    return f"there is no {flag.partition('=')[0]}; settings are written key=value, here {change}"
