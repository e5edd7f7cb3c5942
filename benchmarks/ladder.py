"""From open_clip's training step to ours, one mechanism at a time, on the same pairs.

On CPUs the pairs are of the shipped data and the towers those of the end-to-end benchmark; on GPUs it is ViT-B/16 in bfloat16 on random
pictures of 224 pixels and captions of 16 of 77 tokens on average. A rung is a whole step: what the training process does with the
batches that workers hand over, forward, loss, backward and AdamW. All rungs are interleaved in one process; memory is measured in a
process for each (CPU), beyond the model, the optimizer's state and the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import batches
from benchmarks import open_clip_baseline as rival
from benchmarks.machine import describe, load
from benchmarks.measure import Clock, budget, paired_ratio, percentile, sample
from benchmarks.peak import elsewhere, growth
from benchmarks.rivals import clip_loss
from benchmarks.run import write
from fastvlp.data import Batch, pack_images, pack_texts
from fastvlp.layers import Pool
from fastvlp.systems.clip import Clip
from fastvlp.towers import Text, Vit
from fastvlp.train.gradients import gradients

COLUMNS = ("rung", "about", "images_per_second", "p20_ms", "p50_ms", "p80_ms", "samples", "ratio_first", "ratio_previous", "extra_mb",
           "pairs", "device", "threads", "torch", "commit", "timestamp")  # fmt: skip
PATCH, PAIRS, QUICK_PAIRS, MICRO_BATCHES = 16, 256, 32, 4
MERGE = (0.3, 0, 0.3, 0, 0.3, 0)  # of the tokens in each block: 16 patches to 7
MERGES = {6: MERGE, 12: (0.13, 0) * 6}  # by the number of layers: 196 patches to 86
VOCABULARY, OWN_VOCABULARY = 49408, 4096

Step = Callable[[], object]


@dataclass(frozen=True)
class Pairs:
    """The same pairs with each tokenizer, nothing augmented or dropped, and the model's size."""

    clip: Batch
    own: Batch
    device: torch.device
    size: rival.Size = rival.MINI

    def amp(self) -> AbstractContextManager:
        """bfloat16 at the sizes of a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.size is not rival.MINI)

    def square(self) -> Tensor:
        """The pictures centred on white as open_clip's tower wants them: uint8 [B, 3, S, S]."""
        side = self.size.side
        out = torch.full((len(self.clip), 3, side, side), 255, dtype=torch.uint8)
        for canvas, picture in zip(out, batches.pictures(self.clip.image), strict=True):
            height, width = picture.shape[:2]
            top, left = (side - height) // 2, (side - width) // 2
            canvas[:, top : top + height, left : left + width] = picture.permute(2, 0, 1)
        return out

    def padded(self) -> Tensor:
        """The captions as open_clip's tower wants them: int64 [B, N], zeros behind the end token."""
        ids: Tensor = self.clip.text.to_padded(width=self.size.context)[0]
        return ids

    def batch(self, own: bool, keep: float) -> Batch:
        """What a worker hands over: pairs of which a share of the patches is kept."""
        pairs = self.own if own else self.clip
        if keep == 1:
            return pairs
        kept = pack_images(batches.pictures(pairs.image), PATCH, keep, torch.Generator().manual_seed(0))
        return replace(pairs, streams={**pairs.streams, "image": kept})


def draw(count: int, device: torch.device) -> Pairs:
    """The first pairs of the shipped training data in its order of seed 0."""
    return Pairs(batches.shipped(count, "clip", max_captions=2), batches.shipped(count, "mini", max_captions=2), device)


def invent(count: int, device: torch.device, size: rival.Size) -> Pairs:
    """Random square pictures, and captions of a tenth to a third of the context that end in the vocabulary's last token."""
    images = pack_images(list(torch.randint(0, 256, (count, size.side, size.side, 3), dtype=torch.uint8)), PATCH)
    lengths = torch.randint(size.context // 10 + 1, size.context // 3, (count,)).tolist()

    def batch(vocabulary: int) -> Batch:
        texts = [F.pad(torch.randint(1, vocabulary - 1, (length - 1,)), (0, 1), value=vocabulary - 1) for length in lengths]
        return Batch({"image": images, "text": pack_texts(texts)}, torch.arange(count))

    return Pairs(batch(VOCABULARY), batch(OWN_VOCABULARY), device, size)


def _training(model: nn.Module, backward: Callable[[], object]) -> Step:
    """A step from what fills in the gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, betas=(0.9, 0.98))

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _open_clip(fused: bool, pairs: Pairs, compiled: bool = False) -> Step:
    model: Any = rival.make_model(VOCABULARY, pairs.size).to(pairs.device)
    run = torch.compile(model) if compiled else model
    loss, pictures, ids = clip_loss(fused), pairs.square(), pairs.padded()

    def backward() -> None:
        with pairs.amp():
            value = loss(*run(rival.normalise(pictures.to(pairs.device)), ids.to(pairs.device))[:3])
        value.backward()

    return _training(model, backward)


def _vit(size: rival.Size, own: bool, merge: tuple[float, ...] = ()) -> Vit:
    """Our image tower of that size; ``own``: with the layers of the default recipe instead of open_clip's."""
    return Vit(size.width, size.layers, size.width // rival.HEAD, PATCH, size.side, merge=merge, activation="relu2" if own else "gelu")


def _text(size: rival.Size, own: bool) -> Text:
    """Our text tower of that size; ``own``: with the layers and the vocabulary of the default recipe instead of open_clip's."""
    return Text(size.text_width, size.text_layers, size.text_width // rival.HEAD, activation="relu2" if own else "gelu",
                vocab_size=OWN_VOCABULARY if own else VOCABULARY, context_length=size.context, causal=not own)  # fmt: skip


def _packed_captions(pairs: Pairs) -> Step:
    """open_clip's image tower, and a text tower of the same layers as theirs without the padding."""
    visual: Any = rival.make_model(VOCABULARY, pairs.size).visual
    text = nn.Sequential(_text(pairs.size, own=False), Pool(pairs.size.text_width, pairs.size.features, "last"))
    model = nn.ModuleDict({"visual": visual, "text": text}).to(pairs.device)
    scale = nn.Parameter(torch.tensor(14.3, device=pairs.device))
    model.register_parameter("scale", scale)
    loss, pictures = clip_loss(fused=True), pairs.square()

    def backward() -> None:
        with pairs.amp():
            image = F.normalize(visual(rival.normalise(pictures.to(pairs.device))), dim=-1)
            value = loss(image, text(pairs.clip.text.to(pairs.device)), scale)
        value.backward()

    return _training(model, backward)


def _packed(pairs: Pairs, own: bool = True, keep: float = 1.0, merging: bool = False, micro_batches: int = 1) -> Step:
    """Both towers packed."""
    size = pairs.size
    image, text = _vit(size, own, MERGES[size.layers] if merging else ()), _text(size, own)
    system = Clip(image, text, size.features, pool_text="mean" if own else "last").to(pairs.device)
    batch, widths = pairs.batch(own, keep), {"image": size.width, "text": size.text_width}

    def backward() -> None:
        gradients(system, batch.to(pairs.device), batch.split(micro_batches, widths), autocast=pairs.amp)

    return _training(system, backward)


RUNGS: dict[str, tuple[str, Callable[[Pairs], Step]]] = {
    "open_clip": ("its towers on square pictures and padded captions, its loss", partial(_open_clip, False)),
    "torch.compile": ("the same compiled", partial(_open_clip, False, compiled=True)),
    "fused loss": ("fastvlp.losses.ClipLoss", partial(_open_clip, True)),
    "packed captions": ("no padding in the text tower", _packed_captions),
    "packed images": ("pictures at their own aspect ratio, no padding in either tower", partial(_packed, own=False)),
    "packed, half of the patches": ("dropped at random before the patch embedding, with open_clip's layers",
                                    partial(_packed, own=False, keep=0.5)),
    "recipe's layers": ("squared ReLU, captions seen both ways, a vocabulary of 4,096", _packed),
    "merged tokens": ("similar patches merged inside the image tower, to less than half", partial(_packed, merging=True)),
    "half of the patches": ("dropped at random before the patch embedding, instead of merging", partial(_packed, keep=0.5)),
    "GradCache": (f"the same batch in {MICRO_BATCHES} micro-batches: less memory for more work",
                  partial(_packed, keep=0.5, micro_batches=MICRO_BATCHES)),
}  # fmt: skip


BESIDE = ("torch.compile", "packed, half of the patches")  # compared with the rung before; the next one does not stand on them


def rungs(pairs: Pairs) -> dict[str, Step]:
    """All steps by name; on CPUs without those that only the target of a GPU is about."""
    return {name: make(pairs) for name, (_, make) in RUNGS.items() if name not in BESIDE or pairs.size is not rival.MINI}


def task(rung: str, count: str) -> Step:
    """What ``benchmarks.peak`` runs."""
    return RUNGS[rung][1](draw(int(count), torch.device("cpu")))


def run(arguments: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """Measure all rungs; returns the content of the result file, which goes to <out>/<device>/ladder.json and .csv."""
    device, count = torch.device(arguments.device), QUICK_PAIRS if arguments.quick else PAIRS
    spend, before = budget(arguments.quick, arguments.seconds), load()
    small = device.type == "cpu" or arguments.quick
    pairs, about = draw(count, device) if small else invent(count, device, rival.VIT_B_16), describe(device)
    steps = rungs(pairs)
    taken = sample(steps, Clock(device), replace(spend, seconds=spend.seconds * len(steps)))
    first, previous, rows = next(iter(steps)), next(iter(steps)), []
    for name, seconds in taken.items():
        median = percentile(seconds, 50)
        extra = None
        if not arguments.quick:
            command = ("benchmarks.peak", "benchmarks.ladder", name, str(count))
            extra = growth(steps[name], device) if device.type == "cuda" else elsewhere(*command)
        rows.append({
            "rung": name, "about": RUNGS[name][0], "images_per_second": count / median, "p20_ms": 1e3 * percentile(seconds, 20),
            "p50_ms": 1e3 * median, "p80_ms": 1e3 * percentile(seconds, 80), "samples": len(seconds),
            "ratio_first": paired_ratio(taken[first], seconds), "ratio_previous": paired_ratio(taken[previous], seconds),
            "extra_mb": None if extra is None else extra / 1e6, "pairs": count,
        } | about)  # fmt: skip
        previous = previous if name in BESIDE else name
        print(line(rows[-1]), flush=True)
    content = {"op": "ladder", "about": "a training step from open_clip's to ours, one mechanism at a time", "machine": about,
               "load_before": before, "rows": rows}  # fmt: skip
    if out is not None:
        print(f"wrote {write(content, out, COLUMNS)}")
    return content


def line(rung: dict[str, Any]) -> str:
    """A rung for people."""
    extra = "" if rung["extra_mb"] is None else f"{rung['extra_mb']:9.1f} MB"
    return (f"{rung['rung']:<20} {rung['images_per_second']:8.0f} images/s  {rung['ratio_first']:5.2f}x of the first  "
            f"{rung['ratio_previous']:5.2f}x of the one before {extra}")  # fmt: skip
