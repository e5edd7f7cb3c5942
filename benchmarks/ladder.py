"""From open_clip's training step to ours, one mechanism at a time, on the same pairs.

On CPUs the pairs are of the shipped data and the towers those of the end-to-end benchmark; on GPUs it is ViT-B/16 in bfloat16 on random
pictures of 224 pixels and captions of 16 of 77 tokens on average. A rung is a whole step: what the training process does with decoded
pictures and token ids, forward, loss, backward and AdamW. All rungs are interleaved in one process; memory is measured in a process for
each (CPU), beyond the model, the optimizer's state and the batch.
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

from benchmarks import open_clip_baseline as rival
from benchmarks.machine import describe, load
from benchmarks.measure import Clock, budget, paired_ratio, percentile, sample
from benchmarks.peak import elsewhere, growth
from benchmarks.rivals import clip_loss
from benchmarks.run import write

COLUMNS = ("rung", "about", "images_per_second", "p20_ms", "p50_ms", "p80_ms", "samples", "ratio_first", "ratio_previous", "extra_mb",
           "pairs", "device", "threads", "torch", "commit", "timestamp")  # fmt: skip
PATCH, PAIRS, QUICK_PAIRS, MICRO_BATCHES = 16, 256, 32, 4
MERGE = (0.3, 0, 0.3, 0, 0.3, 0)  # of the tokens in each block: 16 patches to 7
MERGES = {6: MERGE, 12: (0.13, 0) * 6}  # by the number of layers: 196 patches to 86
VOCABULARY, OWN_VOCABULARY = 49408, 4096

Step = Callable[[], object]


@dataclass(frozen=True)
class Pairs:
    """The same pairs with each tokenizer, nothing augmented, and the model's size."""

    clip: Any
    own: Any
    device: torch.device
    size: rival.Size = rival.MINI

    def amp(self) -> AbstractContextManager:
        """bfloat16 at the sizes of a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.size is not rival.MINI)

    def square(self) -> Tensor:
        """The pictures centred on white as open_clip's tower wants them: uint8 [B, 3, S, S]."""
        side = self.size.side
        out = torch.full((len(self.clip), 3, side, side), 255, dtype=torch.uint8)
        for canvas, picture in zip(out, self.clip.images, strict=True):
            height, width = picture.shape[:2]
            top, left = (side - height) // 2, (side - width) // 2
            canvas[:, top : top + height, left : left + width] = picture.permute(2, 0, 1)
        return out

    def padded(self) -> Tensor:
        """The captions as open_clip's tower wants them: int64 [B, N], zeros behind the end token."""
        return torch.stack([F.pad(ids, (0, self.size.context - len(ids))) for ids in self.clip.texts])


def draw(count: int, device: torch.device) -> Pairs:
    """The first pairs of the shipped training data in its order of seed 0."""
    from fastvlp.data import Stage, Stream, load_tokenizer

    def batch(tokenizer: str) -> Any:
        stream = Stream("mini:train", load_tokenizer(tokenizer, rival.CONTEXT), count, PATCH, rival.CONTEXT, seed=0,
                        stage_at=Stage(rival.SIDE), max_captions=2)  # fmt: skip
        return next(iter(stream))

    return Pairs(batch("clip"), batch("mini"), device)


def invent(count: int, device: torch.device, size: rival.Size) -> Pairs:
    """Random square pictures, and captions of a tenth to a third of the context that end in the vocabulary's last token."""
    from fastvlp.data import Batch

    pictures = list(torch.randint(256, (count, size.side, size.side, 3), dtype=torch.uint8))
    lengths = torch.randint(size.context // 10 + 1, size.context // 3, (count,)).tolist()

    def batch(vocabulary: int) -> Any:
        texts = [F.pad(torch.randint(1, vocabulary - 1, (length - 1,)), (0, 1), value=vocabulary - 1) for length in lengths]
        return Batch(pictures, texts, torch.arange(count), [str(k) for k in range(count)], 0, torch.arange(count))

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


def _configs(size: rival.Size, own: bool, merge: tuple[float, ...] = ()) -> Any:
    """Our towers of that size; ``own``: with the layers and the vocabulary of the default recipe instead of open_clip's."""
    from fastvlp.models import ImageConfig, ModelConfig, TextConfig

    image = ImageConfig(size.width, size.layers, size.width // rival.HEAD, merge=merge, image_size=size.side)
    text = TextConfig(size.text_width, size.text_layers, size.text_width // rival.HEAD, vocab_size=OWN_VOCABULARY,
                      context_length=size.context)  # fmt: skip
    if not own:
        image = replace(image, activation="gelu")
        text = replace(text, activation="gelu", vocab_size=VOCABULARY, causal=True, pool="last")
    return ModelConfig(size.features, image, text)


def _packed_captions(pairs: Pairs) -> Step:
    """open_clip's image tower, and a text tower of the same layers as theirs without the padding."""
    from fastvlp.data import pack_texts
    from fastvlp.models.towers import TextTower

    visual: Any = rival.make_model(VOCABULARY, pairs.size).visual
    text = TextTower(_configs(pairs.size, own=False).text, pairs.size.features)
    model = nn.ModuleDict({"visual": visual, "text": text}).to(pairs.device)
    scale = nn.Parameter(torch.tensor(14.3, device=pairs.device))
    model.register_parameter("scale", scale)
    loss, pictures = clip_loss(fused=True), pairs.square()

    def backward() -> None:
        with pairs.amp():
            image = F.normalize(visual(rival.normalise(pictures.to(pairs.device))), dim=-1)
            caption = F.normalize(text(pack_texts(pairs.clip.texts).to(pairs.device)), dim=-1)
            value = loss(image, caption, scale)
        value.backward()

    return _training(model, backward)


def _packed(pairs: Pairs, own: bool = True, keep: float = 1.0, merging: bool = False, micro_batches: int = 1) -> Step:
    """Both towers packed."""
    from fastvlp.data import Stage
    from fastvlp.models import TwoTower
    from fastvlp.train.batches import split
    from fastvlp.train.grad_cache import Towers, backward

    size = pairs.size
    model = TwoTower(_configs(size, own, MERGES[size.layers] if merging else ())).to(pairs.device)
    towers, loss, batch = Towers(model), clip_loss(fused=True), pairs.own if own else pairs.clip
    stage = Stage(size.side, keep)
    whole = split(batch, stage, PATCH, None, None, pairs.device)
    image_budget, text_budget = (max(packed.max_seqlen, -(-packed.total // micro_batches)) for packed in (*whole.images, *whole.texts))

    def once() -> None:
        micro = split(batch, stage, PATCH, image_budget, text_budget, pairs.device)
        backward(towers, model, micro, loss, pairs.amp, lambda x: x)

    return _training(model, once)


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
