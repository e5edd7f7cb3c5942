"""From open_clip's training step to ours, one mechanism at a time, on the same pairs of the shipped data.

A rung is a whole step: what the training process does with decoded pictures and token ids, forward, loss, backward and AdamW. All rungs
are interleaved in one process; memory is measured in a process for each (CPU), beyond the model, the optimizer's state and the batch.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import open_clip_baseline as rival
from benchmarks.machine import describe, load
from benchmarks.measure import FULL, QUICK, Clock, paired_ratio, percentile, sample
from benchmarks.peak import elsewhere, growth
from benchmarks.rivals import clip_loss
from benchmarks.run import write

COLUMNS = ("rung", "about", "images_per_second", "p20_ms", "p50_ms", "p80_ms", "samples", "ratio_first", "ratio_previous", "extra_mb",
           "pairs", "device", "threads", "torch", "commit", "timestamp")  # fmt: skip
PATCH, PAIRS, QUICK_PAIRS, MICRO_BATCHES = 16, 256, 32, 4
MERGE = (0.3, 0, 0.3, 0, 0.3, 0)  # of the tokens in each block: 16 patches to 7

Step = Callable[[], object]


@dataclass(frozen=True)
class Pairs:
    """A batch of the training stream, once with each tokenizer: pictures of the same samples, nothing augmented."""

    clip: Any
    own: Any
    device: torch.device

    def square(self) -> Tensor:
        """The pictures centred on white as open_clip's tower wants them: uint8 [B, 3, 64, 64]."""
        out = torch.full((len(self.clip), 3, rival.SIDE, rival.SIDE), 255, dtype=torch.uint8)
        for canvas, picture in zip(out, self.clip.images, strict=True):
            height, width = picture.shape[:2]
            top, left = (rival.SIDE - height) // 2, (rival.SIDE - width) // 2
            canvas[:, top : top + height, left : left + width] = picture.permute(2, 0, 1)
        return out

    def padded(self) -> Tensor:
        """The captions as open_clip's tower wants them: int64 [B, 24], zeros behind the end token."""
        return torch.stack([F.pad(ids, (0, rival.CONTEXT - len(ids))) for ids in self.clip.texts])


def draw(count: int, device: torch.device) -> Pairs:
    """The first pairs of the shipped training data in its order of seed 0."""
    from fastvlp.data import Stage, Stream, load_tokenizer

    def batch(tokenizer: str) -> Any:
        stream = Stream("mini:train", load_tokenizer(tokenizer, rival.CONTEXT), count, PATCH, rival.CONTEXT, seed=0,
                        stage_at=Stage(rival.SIDE), max_captions=2)  # fmt: skip
        return next(iter(stream))

    return Pairs(batch("clip"), batch("mini"), device)


def _training(model: nn.Module, backward: Callable[[], object]) -> Step:
    """A step from what fills in the gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, betas=(0.9, 0.98))

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _open_clip(fused: bool, pairs: Pairs) -> Step:
    model: Any = rival.make_model(49408).to(pairs.device)
    loss, pictures, ids = clip_loss(fused), pairs.square(), pairs.padded()

    def backward() -> None:
        x = rival.normalise(pictures.to(pairs.device))
        loss(*model(x, ids.to(pairs.device))[:3]).backward()

    return _training(model, backward)


def _packed_captions(pairs: Pairs) -> Step:
    """open_clip's image tower, and a text tower of the same layers as theirs without the padding."""
    from fastvlp.data import pack_texts
    from fastvlp.models import TextConfig
    from fastvlp.models.towers import TextTower

    visual: Any = rival.make_model(49408).visual
    text = TextTower(TextConfig(vocab_size=49408, context_length=rival.CONTEXT, causal=True, pool="last", activation="gelu"), 256)
    model = nn.ModuleDict({"visual": visual, "text": text}).to(pairs.device)
    scale = nn.Parameter(torch.tensor(14.3, device=pairs.device))
    model.register_parameter("scale", scale)
    loss, pictures = clip_loss(fused=True), pairs.square()

    def backward() -> None:
        image = F.normalize(visual(rival.normalise(pictures.to(pairs.device))), dim=-1)
        caption = F.normalize(text(pack_texts(pairs.clip.texts).to(pairs.device)), dim=-1)
        loss(image, caption, scale).backward()

    return _training(model, backward)


def _packed(pairs: Pairs, own: bool = True, keep: float = 1.0, merge: tuple[float, ...] = (), micro_batches: int = 1) -> Step:
    """Both towers packed; ``own``: with the layers and the vocabulary of the default recipe instead of open_clip's."""
    from fastvlp.data import Stage
    from fastvlp.models import ImageConfig, ModelConfig, TextConfig, TwoTower
    from fastvlp.train.batches import split
    from fastvlp.train.grad_cache import Towers, backward

    theirs = ModelConfig(image=ImageConfig(activation="gelu"),
                         text=TextConfig(vocab_size=49408, causal=True, pool="last", activation="gelu"))  # fmt: skip
    model = TwoTower(ModelConfig(image=ImageConfig(merge=merge)) if own else theirs).to(pairs.device)
    towers, loss, batch = Towers(model), clip_loss(fused=True), pairs.own if own else pairs.clip
    whole = split(batch, Stage(rival.SIDE, keep), PATCH, None, None, pairs.device)
    image_budget, text_budget = (max(packed.max_seqlen, -(-packed.total // micro_batches)) for packed in (*whole.images, *whole.texts))

    def once() -> None:
        micro = split(batch, Stage(rival.SIDE, keep), PATCH, image_budget, text_budget, pairs.device)
        backward(towers, model, micro, loss, contextlib.nullcontext, lambda x: x)

    return _training(model, once)


RUNGS: dict[str, tuple[str, Callable[[Pairs], Step]]] = {
    "open_clip": ("its towers on square pictures and padded captions, its loss", partial(_open_clip, False)),
    "fused loss": ("fastvlp.losses.ClipLoss", partial(_open_clip, True)),
    "packed captions": ("no padding in the text tower", _packed_captions),
    "packed images": ("pictures at their own aspect ratio, no padding in either tower", partial(_packed, own=False)),
    "recipe's layers": ("squared ReLU, captions seen both ways, a vocabulary of 4,096", _packed),
    "merged tokens": ("similar patches merged inside the image tower, 16 to 7", partial(_packed, merge=MERGE)),
    "half of the patches": ("dropped at random before the patch embedding, instead of merging", partial(_packed, keep=0.5)),
    "GradCache": (f"the same batch in {MICRO_BATCHES} micro-batches: less memory for more work",
                  partial(_packed, keep=0.5, micro_batches=MICRO_BATCHES)),
}  # fmt: skip


def task(rung: str, count: str) -> Step:
    """What ``benchmarks.peak`` runs."""
    return RUNGS[rung][1](draw(int(count), torch.device("cpu")))


def run(arguments: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """Measure all rungs; returns the content of the result file, which goes to <out>/<device>/ladder.json and .csv."""
    device, count = torch.device(arguments.device), QUICK_PAIRS if arguments.quick else PAIRS
    budget, before = QUICK if arguments.quick else FULL, load()
    if arguments.seconds is not None:
        budget = replace(budget, seconds=arguments.seconds)
    pairs, about = draw(count, device), describe(device)
    steps = {name: make(pairs) for name, (_, make) in RUNGS.items()}
    taken = sample(steps, Clock(device), replace(budget, seconds=budget.seconds * len(steps)))
    first, previous, rungs = next(iter(steps)), next(iter(steps)), []
    for name, seconds in taken.items():
        median = percentile(seconds, 50)
        extra = None
        if not arguments.quick:
            command = ("benchmarks.peak", "benchmarks.ladder", name, str(count))
            extra = growth(steps[name], device) if device.type == "cuda" else elsewhere(*command)
        rungs.append({
            "rung": name, "about": RUNGS[name][0], "images_per_second": count / median, "p20_ms": 1e3 * percentile(seconds, 20),
            "p50_ms": 1e3 * median, "p80_ms": 1e3 * percentile(seconds, 80), "samples": len(seconds),
            "ratio_first": paired_ratio(taken[first], seconds), "ratio_previous": paired_ratio(taken[previous], seconds),
            "extra_mb": None if extra is None else extra / 1e6, "pairs": count,
        } | about)  # fmt: skip
        previous = name
        print(line(rungs[-1]), flush=True)
    content = {"op": "ladder", "about": "a training step from open_clip's to ours, one mechanism at a time", "machine": about,
               "load_before": before, "rows": rungs}  # fmt: skip
    if out is not None:
        print(f"wrote {write(content, out, COLUMNS)}")
    return content


def line(rung: dict[str, Any]) -> str:
    """A rung for people."""
    extra = "" if rung["extra_mb"] is None else f"{rung['extra_mb']:9.1f} MB"
    return (f"{rung['rung']:<20} {rung['images_per_second']:8.0f} images/s  {rung['ratio_first']:5.2f}x of the first  "
            f"{rung['ratio_previous']:5.2f}x of the one before {extra}")  # fmt: skip
