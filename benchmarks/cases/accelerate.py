"""A training step of the image towers that ``fastvlp.accelerate`` knows, untouched and with each of its switches."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.registry import Case, Exact, InapplicableError, Mode, Problem, Provider, Shape, Task, needs
from benchmarks.rivals import import_open_clip, version

HEAD, PATCH, OUT = 64, 16, 64
DROP, MERGED = 0.5, 1 / 3  # shares of the tokens: dropped before the first block, merged away by the last one

Options = Mapping[str, Any]  # of one size: side in patches, width, layers


def _timm(name: str) -> Callable[[Options], nn.Module]:
    def make(size: Options) -> nn.Module:
        square = {} if name.startswith("naflex") else {"img_size": PATCH * size["side"]}
        model: nn.Module = importlib.import_module("timm").create_model(
            name, **square, patch_size=PATCH, embed_dim=size["width"], num_heads=size["width"] // HEAD, depth=size["layers"],
            num_classes=OUT)  # fmt: skip
        return model

    return make


def _open_clip(kind: str) -> Callable[[Options], nn.Module]:
    def make(size: Options) -> nn.Module:
        image: dict[str, Any] = {"layers": size["layers"], "width": size["width"], "head_width": HEAD, "patch_size": PATCH,
                          "image_size": PATCH * size["side"]}  # fmt: skip
        text = {"context_length": 8, "vocab_size": 99, "width": 64, "heads": 1, "layers": 1}
        if kind == "CoCa":
            captions = {"embed_cls": True, "output_tokens": True}
            model: Any = importlib.import_module("open_clip.coca_model").CoCa(
                OUT, {"context_length": 8, "width": 64, "heads": 1, "layers": 1}, text | captions, image | {"output_tokens": True})
        else:
            model = getattr(importlib.import_module("open_clip.model"), kind)(OUT, image, text)
        visual: nn.Module = model.visual
        return visual

    return make


def _transformers(kind: str) -> Callable[[Options], nn.Module]:
    def make(size: Options) -> nn.Module:
        library, width = importlib.import_module("transformers"), size["width"]
        options: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": size["layers"],
                   "num_attention_heads": width // HEAD, "patch_size": PATCH}  # fmt: skip
        options |= {"num_patches": size["side"] ** 2} if kind == "Siglip2" else {"image_size": PATCH * size["side"]}
        tower = "" if kind == "ViT" else "Vision"
        model: nn.Module = getattr(library, f"{kind}{tower}Model")(getattr(library, f"{kind}{tower}Config")(**options))
        return model

    return make


# What a size is called: the distribution, what makes the model, and whether it takes images of different sizes with a mask.
MODELS: dict[str, tuple[str, Callable[[Options], nn.Module], bool]] = {
    "timm ViT": ("timm", _timm("vit_tiny_patch16_224"), False),
    "timm NaFlexVit": ("timm", _timm("naflexvit_base_patch16_gap"), True),
    "open_clip CLIP": ("open_clip_torch", _open_clip("CLIP"), False),
    "open_clip CoCa": ("open_clip_torch", _open_clip("CoCa"), False),
    "open_clip CustomText": ("open_clip_torch", _open_clip("CustomTextCLIP"), False),
    "transformers CLIP": ("transformers", _transformers("CLIP"), False),
    "transformers SigLIP": ("transformers", _transformers("Siglip"), False),
    "transformers SigLIP 2": ("transformers", _transformers("Siglip2"), True),
    "transformers ViT": ("transformers", _transformers("ViT"), False),
}


def shapes(device: str, quick: bool) -> list[Shape]:
    """Every model with 14 x 14 patches, or at most that many: six layers of width 192, on GPUs twelve of 768."""
    if quick:
        size, dtype = {"b": 3, "side": 4, "width": 64, "layers": 2}, torch.float32
    elif device == "cuda":
        size, dtype = {"b": 64, "side": 14, "width": 768, "layers": 12}, torch.bfloat16
    else:
        size, dtype = {"b": 8, "side": 14, "width": 192, "layers": 6}, torch.float32
    return [Shape(f"{name} B={size['b']} C={size['width']}", dtype, {"model": name, **size}) for name in MODELS]


def problem(shape: Shape, device: torch.device) -> Problem:
    """A model of random weights and a batch of noise; half to all of the patches are real where there is a mask.

    ``trained``: the parameters that have gradients. Facts: the library's version, and operations that merging saves (0 where the number of
    tokens is not known).
    """
    import fastvlp

    distribution, make, masked = MODELS[shape.values["model"]]
    if missing := needs(distribution.removesuffix("_torch"))(device):
        raise InapplicableError(missing)
    import_open_clip()  # makes torchvision importable, which timm and transformers import
    b, side = shape.values["b"], shape.values["side"]
    model = make(shape.values).to(device, shape.dtype).train()
    if masked:
        rows, cols = (torch.randint(max(1, side * 7 // 10), side + 1, (b,)) for _ in range(2))
        batch = _masked(rows, cols, distribution, shape.dtype)
    else:
        name = "pixel_values" if distribution == "transformers" else "x"
        batch = {name: torch.randn(b, 3, PATCH * side, PATCH * side).to(shape.dtype)}
    batch = {name: x.to(device) for name, x in batch.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # some begin so that a block changes nothing
        upstream = torch.randn_like(_features(model, batch))
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(_features(model, batch), list(parameters.values()), upstream, allow_unused=True)
    trained = [name for name, gradient in zip(parameters, found, strict=True) if gradient is not None]
    report = fastvlp.accelerate(copy.deepcopy(model), merge=_merge(shape))
    facts = {"library": f"{distribution} {version(distribution)}", "flops_saved": report.flops_saved}
    return Problem(shape, device, {"model": model, "batch": batch, "upstream": upstream, "trained": trained}, facts)


def _masked(rows: Tensor, cols: Tensor, distribution: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Patches padded to the image that has most of them."""
    longest = int((rows * cols).max())
    patches, place = torch.randn(len(rows), longest, 3 * PATCH**2).to(dtype), torch.arange(longest)
    real = place < (rows * cols)[:, None]
    if distribution == "transformers":
        return {"pixel_values": patches, "pixel_attention_mask": real.long(), "spatial_shapes": torch.stack((rows, cols), 1)}
    places = torch.stack((place // cols[:, None], place % cols[:, None]), 2) * real[..., None]
    return {"patches": patches, "patch_coord": places, "patch_valid": real}


def _features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the tower gives for each image."""
    first = next(iter(batch))
    if first == "x":
        out = model(batch[first])
    elif first == "patches":
        out = model(batch)
    else:
        out = model(**batch).pooler_output
    pooled: Tensor = out[0] if isinstance(out, tuple) else out
    return pooled


def _merge(shape: Shape) -> int:
    """Tokens that each block merges away."""
    return max(1, int(MERGED * shape.values["side"] ** 2 / shape.values["layers"]))


def _differentiated(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """All gradients as one vector: some, as that of a key's bias, are nothing but rounding."""
    return {"value": results["value"], "gradients": torch.cat([x.flatten() for name, x in results.items() if name != "value"])}


def _task(model: nn.Module, problem: Problem, dtype: torch.dtype | None = None) -> Task:
    parameters = dict(model.named_parameters())
    batch = {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in problem.inputs["batch"].items()}
    leaves = {name: parameters[name] for name in problem.inputs["trained"]}
    return Task(lambda: _features(model, batch), leaves, problem.inputs["upstream"].to(dtype), _differentiated)


def exact(problem: Problem) -> Exact:
    """The untouched model in float64."""
    task = _task(copy.deepcopy(problem.inputs["model"]).double(), problem, torch.float64)
    value = task.forward()
    gradients = torch.autograd.grad(value, list(task.leaves.values()), task.upstream)
    return Exact(_differentiated({"value": value.detach()} | dict(zip(task.leaves, gradients, strict=True))))


def _ours(switches: Callable[[Shape], Options]) -> Callable[[Problem], Task]:
    def build(problem: Problem) -> Task:
        import fastvlp

        model = copy.deepcopy(problem.inputs["model"])
        fastvlp.accelerate(model, **switches(problem.shape))
        return _task(model, problem)

    return build


def _pack(shape: Shape) -> Options:
    return {"pack": True} if MODELS[shape.values["model"]][2] else {"attention": "packed"}


def _drop(shape: Shape) -> Options:
    if MODELS[shape.values["model"]][2]:
        raise InapplicableError("this model drops patches itself, or where its batches are made")
    return {"drop": DROP}


def work(problem: Problem, mode: Mode) -> tuple[float, float]:
    """24 C C + 4 C n operations per layer and token forward, twice that again backward; weights are read once each way."""
    shape, batch = problem.shape.values, problem.inputs["batch"]
    mask = batch.get("patch_valid", batch.get("pixel_attention_mask"))
    n = torch.full((shape["b"],), shape["side"] ** 2) if mask is None else mask.sum(1)
    per_layer = (24 * shape["width"] ** 2 * n + 4 * shape["width"] * n**2).sum().item()
    weights = sum(parameter.nbytes for parameter in problem.inputs["model"].parameters())
    return 3.0 * shape["layers"] * per_layer, 3.0 * weights


CASE = Case(
    op="accelerate",
    about=f"a training step of image towers: untouched, with a third of the tokens merged, {DROP:.0%} of the patches dropped, packed",
    formula="features of a batch of images, and the gradients of all parameters",
    limit="the operations of the untouched tower on real tokens",
    shapes=shapes,
    problem=problem,
    exact=exact,
    work=work,
    modes=("forward+backward",),
    providers=(
        Provider("untouched", "eager", lambda problem: _task(problem.inputs["model"], problem), why_not=needs("open_clip")),
        Provider("fastvlp merge", "ours", _ours(lambda shape: {"merge": _merge(shape)}), "fastvlp", needs("open_clip"),
                 same_function=False),
        Provider("fastvlp drop", "ours", _ours(_drop), "fastvlp", needs("open_clip"), same_function=False),
        Provider("fastvlp pack", "ours", _ours(_pack), "fastvlp", needs("open_clip")),
    ),
)
