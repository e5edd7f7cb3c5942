"""The rival of the end-to-end benchmark: open_clip's own model and ClipLoss, trained on the shipped data set.

    python -m benchmarks.open_clip_baseline --minutes 15 --json baseline.json

Width 192, 6 image and 4 text layers, crops of 64 pixels from a 72-pixel canvas, AdamW with warm-up and a cosine over the given
minutes. Training seconds count neither loading nor evaluation. After every pass over the data and at the end it prints
zero-shot top-1 and top-5 on the emoji style that is never trained on, and image-to-text recall@10 on held-out clip art.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import ROOT
from benchmarks.rivals import import_open_clip

SIDE, PAD, CONTEXT = 64, 8, 24
WIDTH, IMAGE_LAYERS, TEXT_LAYERS, HEAD = 192, 6, 4, 64
Tokenize = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Size:
    """A CLIP model: pixels of a picture's side, tokens of a caption, width and layers of both towers, and their features."""

    side: int = SIDE
    context: int = CONTEXT
    width: int = WIDTH
    layers: int = IMAGE_LAYERS
    text_width: int = WIDTH
    text_layers: int = TEXT_LAYERS
    features: int = 256


MINI, VIT_B_16 = Size(), Size(224, 77, 768, 12, 512, 12, 512)


def load(folder: Path, pattern: str) -> tuple[Tensor, list[dict[str, Any]]]:
    """uint8 images [N, 3, 72, 72], centred on white, and their metadata."""
    from PIL import Image

    canvas, images, metas = SIDE + PAD, [], []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
            for name, file in members.items():
                if not name.endswith(".json") or file is None:
                    continue
                metas.append(json.load(file))
                picture = members[name.removesuffix("json") + "webp"]
                assert picture is not None
                image = Image.open(io.BytesIO(picture.read())).convert("RGB")
                scale = canvas / max(image.size)
                image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
                square = Image.new("RGB", (canvas, canvas), "white")
                square.paste(image, ((canvas - image.width) // 2, (canvas - image.height) // 2))
                images.append(np.asarray(square))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), metas


def normalise(x: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return x.float().div_(255).sub_(0.5).div_(0.5)


def make_tokenizer(name: str) -> tuple[Tokenize, int]:
    """Texts to ids [N, 24], and the vocabulary's size: open_clip's own ("clip"), or one of ``fastvlp.data.load_tokenizer``."""
    if name == "clip":
        return import_open_clip().SimpleTokenizer(context_length=CONTEXT), 49408
    from fastvlp.data import load_tokenizer

    tokenizer = load_tokenizer(name, CONTEXT)
    size = tokenizer.vocab_size

    def tokenize(texts: Sequence[str]) -> Tensor:
        out = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            ids = [*tokenizer.encode(text, CONTEXT - 1), size]  # open_clip pools at the largest id: an end token of its own
            row[: len(ids)] = torch.tensor(ids)
        return out

    return tokenize, size + 1


def make_model(vocabulary: int, size: Size = MINI) -> torch.nn.Module:
    """open_clip's CLIP with patches of 16 pixels."""
    import_open_clip()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=size.layers, width=size.width, head_width=HEAD, patch_size=16, image_size=size.side, pool_type="avg")
    text = CLIPTextCfg(context_length=size.context, vocab_size=vocabulary, width=size.text_width, heads=size.text_width // HEAD,
                       layers=size.text_layers)  # fmt: skip
    model: torch.nn.Module = CLIP(embed_dim=size.features, vision_cfg=vision, text_cfg=text)
    return model


def tower_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of both towers without the tables of tokens and positions, the class token and the loss's scalars."""
    left_out = ("token_embedding", "positional_embedding", "class_embedding", "logit_scale", "logit_bias")
    counted = {name: p.numel() for name, p in model.named_parameters() if not any(part in name for part in left_out)}
    image = sum(count for name, count in counted.items() if name.startswith("visual."))
    return {"image": image, "text": sum(counted.values()) - image}


@torch.no_grad()
def evaluate(model: Any, tokenize: Tokenize, classes: list[str], emoji: tuple, clipart: tuple) -> dict[str, float]:
    """Zero-shot top-1 and top-5 over all classes, and recall@10 from a clip-art picture to its first caption."""
    model.eval()
    edge = PAD // 2

    def embed_images(images: Tensor) -> Tensor:
        crops = images[:, :, edge : edge + SIDE, edge : edge + SIDE]
        return torch.cat([model.encode_image(normalise(batch), normalize=True) for batch in crops.split(256)])

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return torch.cat([model.encode_text(batch, normalize=True) for batch in tokenize(texts).split(256)])

    images, metas = emoji
    place = {name: index for index, name in enumerate(classes)}
    target = torch.tensor([place[meta["class"]] for meta in metas])
    top = (embed_images(images) @ embed_texts(classes).T).topk(5).indices
    scores = {f"top{k}": (top[:, :k] == target[:, None]).any(1).float().mean().item() for k in (1, 5)}
    images, metas = clipart
    top = (embed_images(images) @ embed_texts([meta["captions"][0] for meta in metas]).T).topk(10).indices
    scores["i2t_r10"] = (top == torch.arange(len(images))[:, None]).any(1).float().mean().item()
    model.train()
    return scores


def train(folder: Path, minutes: float, seed: int, tokenizer: str, batch_size: int, peak: float) -> dict[str, Any]:
    """Train for that long; returns the last scores, the speed, the sizes and the curve."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    images, metas = load(folder, "train-*.tar")
    emoji, clipart = load(folder, "val-emoji-*.tar"), load(folder, "val-openclipart-*.tar")
    classes = sorted(json.loads((folder / "emoji_classes.json").read_text(encoding="utf-8")))
    tokenize, vocabulary = make_tokenizer(tokenizer)
    captions = [tokenize(meta["captions"][:2]) for meta in metas]
    model = make_model(vocabulary)
    from open_clip.loss import ClipLoss

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.2, betas=(0.9, 0.98))
    loss_fn, budget, step, seen = ClipLoss(), minutes * 60, 0, 0
    curve: list[dict[str, float]] = []
    start, paused = time.perf_counter(), 0.0
    while not curve or curve[-1]["seconds"] < budget:
        for index in torch.randperm(len(images)).split(batch_size)[:-1]:
            elapsed = time.perf_counter() - start - paused
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * min(1, elapsed / budget)))
            dx, dy = draw.randint(0, PAD), draw.randint(0, PAD)
            x = normalise(images[index][:, :, dy : dy + SIDE, dx : dx + SIDE])
            loss = loss_fn(*model(x, torch.stack([draw.choice(captions[i]) for i in index.tolist()]))[:3])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.get_parameter("logit_scale").data.clamp_(0, math.log(100))
            step, seen = step + 1, seen + len(index)
            if time.perf_counter() - start - paused >= budget:
                break
        mark = time.perf_counter()
        seconds = mark - start - paused
        curve.append({"seconds": seconds, "step": step, "loss": loss.item()} | evaluate(model, tokenize, classes, emoji, clipart))
        paused += time.perf_counter() - mark
        last = curve[-1]
        print(f"{seconds:5.0f} s  step {step}  loss {last['loss']:.3f}  {seen / seconds:.0f} images/s  top-1 {last['top1']:.2%}  "
              f"top-5 {last['top5']:.2%}  clip-art R@10 {last['i2t_r10']:.1%}", flush=True)  # fmt: skip
    scores = {name: curve[-1][name] for name in ("top1", "top5", "i2t_r10")}
    speed = {"train_seconds": curve[-1]["seconds"], "steps": step, "images_per_second": seen / curve[-1]["seconds"]}
    return scores | speed | {"parameters": tower_parameters(model), "curve": curve}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "fastvlp" / "data" / "mini", help="folder of the shards (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=15, help="training time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="clip", help="clip (open_clip's own), mini, or a tokenizer.json (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="write scores, speed, sizes and the curve to this file")
    arguments = parser.parse_args()
    result = train(arguments.data, arguments.minutes, arguments.seed, arguments.tokenizer, arguments.batch_size, arguments.lr)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
