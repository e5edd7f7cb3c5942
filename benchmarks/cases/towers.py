"""Both towers on packed tokens of the shipped data, against the padded twin of the same weights and against open_clip's towers."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import batches
from benchmarks import open_clip_baseline as rival
from benchmarks.registry import Case, Exact, InapplicableError, Mode, Problem, Provider, Shape, Task, needs
from benchmarks.rivals import import_torchvision

SIDE, CONTEXT, PATCH = rival.SIDE, rival.CONTEXT, 16
GROUP = 64  # tokens in one row of NaViT, as in its README


def shapes(device: str, quick: bool) -> list[Shape]:
    """Pairs of the training data: pictures alone, captions alone, both."""
    count = 16 if quick else 256
    towers = {"pictures": ("image",), "captions": ("text",), "pairs": ("image", "text")}
    return [Shape(f"{count} {name}", torch.float32, {"count": count, "towers": both}) for name, both in towers.items()]


def problem(shape: Shape, device: torch.device) -> Problem:
    """A batch of the training stream, with the pictures' own aspect ratios at 64 pixels, nothing dropped, and a model of the default size.

    The token ratio weighs a tower's tokens by its layers: tokens padded / tokens real, over all layers that they pass.
    """
    from fastvlp.systems.clip import Clip
    from fastvlp.towers import Text, Vit

    count, towers = shape.values["count"], shape.values["towers"]
    batch = batches.shipped(count, seed=int(torch.randint(2**31, ()))).to(device)
    model: Any = Clip(Vit(), Text()).to(device)
    packed = {"image": batch.image, "text": batch.text}
    padded = {name: x.to_padded() for name, x in packed.items()}
    places, _ = packed["image"].replace(x=packed["image"].pos).to_padded()
    ids, mask = padded["text"]
    room = CONTEXT - ids.shape[1]
    padded["text"] = (F.pad(ids, (0, room)), F.pad(mask, (0, room)))
    depth = {"image": len(model.image.blocks), "text": len(model.text.blocks)}
    ratio = sum(depth[t] * padded[t][1].numel() for t in towers) / sum(depth[t] * packed[t].total for t in towers)
    inputs = {"model": model, "packed": packed, "padded": padded, "places": places, "pictures": batches.pictures(batch.image)}
    inputs["upstream"] = torch.randn(count, len(towers) * model.image_head.projection.shape[1], device=device)
    return Problem(shape, device, inputs, {"token_ratio": ratio})


def _encode_padded(model: Any, problem: Problem) -> Tensor:
    from fastvlp.towers import padded

    def encode(name: str) -> Tensor:
        x, mask = problem.inputs["padded"][name]
        tokens = padded.encode(getattr(model, name), x, mask, problem.inputs["places"] if name == "image" else None)
        return padded.features(getattr(model, f"{name}_head"), tokens, mask)

    return torch.cat([encode(tower) for tower in problem.shape.values["towers"]], 1)


def _parameters(model: Any, towers: Iterable[str]) -> dict[str, Tensor]:
    """Those of towers and their heads, by "tower.part.name"."""
    parts = [(tower, part) for tower in towers for part in (tower, f"{tower}_head")]
    return {f"{tower}.{part}.{name}": p for tower, part in parts for name, p in getattr(model, part).named_parameters()}


def _per_tower(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """All gradients of a tower as one vector."""
    towers = dict.fromkeys(name.split(".")[0] for name in results if name != "value")
    gradients = {t: torch.cat([x.flatten() for name, x in results.items() if name.startswith(f"{t}.")]) for t in towers}
    return {"value": results["value"]} | gradients


def exact(problem: Problem) -> Exact:
    """The padded towers in float64."""
    model = copy.deepcopy(problem.inputs["model"]).double()
    leaves = _parameters(model, problem.shape.values["towers"])
    value = _encode_padded(model, problem)
    gradients = torch.autograd.grad(value, list(leaves.values()), problem.inputs["upstream"].double())
    return Exact(_per_tower({"value": value.detach()} | dict(zip(leaves, gradients, strict=True))))


def _task(encode: Callable[[Any, Problem], Tensor]) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        model = problem.inputs["model"]
        leaves = _parameters(model, problem.shape.values["towers"])
        return Task(lambda: encode(model, problem), leaves, problem.inputs["upstream"], _per_tower)

    return build


def _encode_packed(model: Any, problem: Problem) -> Tensor:
    encode = {"image": model.embed_image, "text": model.embed_text}
    return torch.cat([encode[tower](problem.inputs["packed"][tower]) for tower in problem.shape.values["towers"]], 1)


def _open_clip(problem: Problem) -> Task:
    """open_clip's towers of that width and depth: square pictures with a class token, captions padded to 24, our vocabulary."""
    model: Any = rival.make_model(problem.inputs["model"].text.vocab_size).to(problem.device)
    towers, count = problem.shape.values["towers"], problem.shape.values["count"]
    pictures = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, device=problem.device)
    ids = problem.inputs["padded"]["text"][0]
    encode = {"image": lambda: model.encode_image(rival.normalise(pictures)), "text": lambda: model.encode_text(ids)}
    parameters = {"image." + name.removeprefix("visual.") if name.startswith("visual.") else "text." + name: p
                  for name, p in model.named_parameters() if not name.startswith("logit_")}  # fmt: skip
    leaves = {name: p for name, p in parameters.items() if name.split(".")[0] in towers}
    return Task(lambda: torch.cat([encode[t]() for t in towers], 1), leaves, problem.inputs["upstream"], _per_tower)


def _navit(problem: Problem) -> Task:
    """vit-pytorch's NaViT of that width and depth, which packs too: several pictures in a padded row of tokens, and a mask between them."""
    if problem.shape.values["towers"] != ("image",):
        raise InapplicableError("it has no text tower")
    import_torchvision()  # which the package imports
    ours = problem.inputs["model"]
    block = ours.image.blocks[0]
    model = importlib.import_module("vit_pytorch.na_vit").NaViT(
        image_size=SIDE, patch_size=PATCH, num_classes=ours.image_head.projection.shape[1], dim=ours.image.width,
        depth=len(ours.image.blocks), heads=block.heads, dim_head=rival.HEAD, mlp_dim=block.up.out_features).to(problem.device)  # fmt: skip
    pictures = [picture.permute(2, 0, 1) for picture in problem.inputs["pictures"]]

    def forward() -> Tensor:
        features: Tensor = model([rival.normalise(picture) for picture in pictures], group_images=True, group_max_seq_len=GROUP)
        return features

    leaves = {f"image.{name}": parameter for name, parameter in model.named_parameters()}
    return Task(forward, leaves, problem.inputs["upstream"], _per_tower)


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """24 C C n + 4 C n n operations per layer and segment forward, twice that again backward; weights and pixels are read once."""
    model, passes = problem.inputs["model"], 3 if mode == "forward+backward" else 1
    flops = 0.0
    for tower in problem.shape.values["towers"]:
        c, depth = getattr(model, tower).width, len(getattr(model, tower).blocks)
        n = problem.inputs["packed"][tower].lengths.double()
        flops += depth * (24 * c * c * n + 4 * c * n**2).sum().item()
    weights = sum(p.nbytes for p in _parameters(problem.inputs["model"], problem.shape.values["towers"]).values())
    return passes * flops, float(passes * weights)


CASE = Case(
    op="towers",
    about="image and text tower of width 192 on the shipped data, packed against padded with the same weights",
    formula="features of 256 pictures and captions, and the gradients of all parameters",
    limit="the tokens padded / the tokens real",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    providers=(
        Provider("packed", "ours", _task(_encode_packed), "fastvlp"),
        Provider("padded", "eager", _task(_encode_padded), "fastvlp"),
        Provider("open_clip", "rival", _open_clip, "open_clip_torch", needs("open_clip"), same_function=False),
        Provider("NaViT", "rival", _navit, "vit-pytorch", needs("vit_pytorch"), same_function=False),
    ),
)
