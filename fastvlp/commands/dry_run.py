"""A system on paper: shapes and sizes without values, so that a model of any size costs no memory to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastvlp._schema import ConfigError
from fastvlp.data.batch import Batch, Stage
from fastvlp.data.fields import Field, Label, Other, Vector, bind
from fastvlp.data.images import Unusable
from fastvlp.losses import ClipLoss, SigLipLoss
from fastvlp.recipe import Recipe
from fastvlp.systems.flops import FlopCount
from fastvlp.systems.system import System
from fastvlp_kernels.packed import Packed

WIDTH = 512  # of cached features whose field does not say
KEPT = ("mm", "addmm", "bmm", "packed_attention")  # results that train.checkpointing=selective keeps


@dataclass
class Sizes:
    """What some samples make a system compute and keep.

    Attributes:
        forward, backward: operations of products. again: of them, what lies in blocks, forward. saved: bytes kept for the backward of all,
            by ``train.checkpointing``. outputs: bytes of what ``encode`` gives. tokens: by stream.
        losses: "clip" or "siglip" and the width of the features, of each such loss that was called.
    """

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    saved: dict[str | None, float] = field(default_factory=dict)
    outputs: float = 0.0
    tokens: dict[str, float] = field(default_factory=dict)
    losses: list[tuple[str, int]] = field(default_factory=list)


def build(recipe: Recipe) -> System:
    """The system of a recipe with tensors that have shapes and no values.

    Raises:
        ConfigError: something in it refuses its arguments.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            system = fdl.build(recipe.model)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {str(error).splitlines()[0]}") from error
    if not isinstance(system, System):
        raise ConfigError(f"model makes a {type(system).__name__}; a fastvlp.systems.System is needed")
    return system


def per_sample(system: System, recipe: Recipe, stage: Stage, dtype: torch.dtype | None) -> tuple[Sizes, float]:
    """What one more sample costs in a stage, all pictures square and all captions as long as they may be; and bytes kept once.

    Args:
        dtype: of autocast.

    Raises:
        ConfigError: a field cannot be bound or filled, or ``encode`` asks for values.
    """
    # The difference of two batches is what a sample costs; what a batch costs once (tables, the loss of none) drops out.
    few, many = (measure(system, longest_batch(system, recipe, stage, count), dtype) for count in (2, 4))

    def each(name: str) -> float:
        return float(getattr(many, name) - getattr(few, name)) / 2

    saved = {how: (many.saved[how] - few.saved[how]) / 2 for how in many.saved}
    once = few.saved[None] - 2 * saved[None]
    return Sizes(each("forward"), each("backward"), each("again"), saved, each("outputs"),
                 {name: count / 4 for name, count in many.tokens.items()}, many.losses), max(0.0, once)


def measure(system: System, batch: Batch, dtype: torch.dtype | None) -> Sizes:
    """The sizes of one batch through ``encode`` and ``objective``."""
    found = Sizes(tokens={name: stream.total for name, stream in batch.streams.items() if isinstance(stream, Packed)})
    counted = FlopCount(system)
    known = _Unknown(counted)
    # What is saved of weights lies in memory anyway, and is none of the activations.
    weights = {p.untyped_storage()._cdata for p in (*system.parameters(), *system.buffers())}
    kept: dict[int, tuple[str, int]] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in weights:
            # By storage: views of one tensor, saved several times, are in memory once.
            kept.setdefault(storage._cdata, (counted.inside[-1], storage.nbytes()))
        return value

    hooks = [module.register_forward_pre_hook(lambda module, args: found.losses.append((_kind(module), args[0].shape[-1])))
             for module in system.modules() if _kind(module)]
    blocks = {f"{name}.{number}": block for name, module in system.named_modules() if isinstance(module, nn.ModuleList)
              for number, block in enumerate(module)}
    inputs = dict.fromkeys(blocks, 0)

    def enter(name: str, args: tuple[Any, ...]) -> None:
        inputs[name] += sum(_bytes(_tensor(one)) for one in args[:1] if isinstance(one, Tensor | Packed))

    hooks += [block.register_forward_pre_hook(lambda block, args, name=name: enter(name, args)) for name, block in blocks.items()]
    try:
        # Tensors without values are tensors of the CPU, whose autocast stands for the device's.
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), counted, known, \
                torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            out = system.encode(batch)
            system.objective(out, batch)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(f"{type(system).__name__} asks for values of features while it computes ({error.func}), which a plan does not "
                          "have; measure it with fastvlp profile") from error
    finally:
        for hook in hooks:
            hook.remove()
    found.forward, found.backward = sum(counted.forward.values()), sum(counted.backward.values())
    found.outputs = sum(_bytes(_tensor(value)) for value in out.values())
    own = {name: sum(size for inside, size in kept.values() if _in(inside, name)) for name in blocks}
    own = {name: size for name, size in own.items() if size}  # frozen ones keep nothing
    found.again = sum(flops for inside, flops in counted.forward.items() if any(_in(inside, name) for name in blocks))
    whole = float(sum(size for _, size in kept.values()))
    outside, largest = whole - sum(own.values()), max(own.values(), default=0)
    # With checkpointing blocks keep their inputs, and one of them at a time what it needs for its backward pass.
    checkpointed = outside + sum(inputs[name] for name in own) + largest
    products = sum(size for inside, size in known.products.items() if any(_in(inside, name) for name in own))
    found.saved = {None: whole, "blocks": min(whole, checkpointed), "selective": min(whole, checkpointed + products)}
    return found


def _kind(module: nn.Module) -> str:
    kind = type(module)
    return "clip" if kind is ClipLoss else "siglip" if kind is SigLipLoss else ""


def _in(inside: str, name: str) -> bool:
    return inside == name or inside.startswith(f"{name}.")


def _tensor(value: Tensor | Packed) -> Tensor:
    return value.x if isinstance(value, Packed) else value


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


class _Unknown(TorchDispatchMode):
    """Numbers that depend on values which nobody knows (the most similar caption, what merges with what) count as 0."""

    def __init__(self, counted: FlopCount) -> None:
        super().__init__()
        self.counted = counted
        self.products: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        inside = self.counted.inside[-1]
        if func is torch.ops.aten.index.Tensor:  # by a mask that is known
            args = args[0], [where for one in args[1] for where in (one.nonzero().unbind(1) if _mask(one) else (one,))]
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in KEPT:
            result = out[0] if isinstance(out, tuple) else out
            self.products[inside] = self.products.get(inside, 0) + _bytes(result)
        return tree_map(lambda one: _zeros(one) if isinstance(one, FakeTensor) and not one.is_floating_point() else one, out)


def _mask(one: Any) -> bool:
    return isinstance(one, Tensor) and not isinstance(one, FakeTensor) and one.dtype == torch.bool


def _zeros(one: Tensor) -> Tensor:
    return torch.zeros(one.shape, dtype=one.dtype)


def longest_batch(system: System, recipe: Recipe, stage: Stage, samples: int) -> Batch:
    """So many samples with the largest pictures and the longest captions that the fields allow."""
    longest: Any = _Longest(recipe.data.fields)
    try:
        fields = bind(recipe.data.fields, system, _Words())
        words = np.arange(samples, dtype=np.uint64)
        streams = {name: one([longest] * samples, words, stage) for name, one in fields.items()}
    except (ValueError, Unusable) as error:
        raise ConfigError(f"data.fields: {error}") from error
    batch = Batch(streams, torch.arange(samples))
    return replace(batch, sizes=(samples,), counts=system.counts(batch))


class _Words:
    """A tokenizer of one word: every caption has as many tokens as it may."""

    start, end, vocab_size, context_length = (), (), 2, 77  # without ends of its own, so that a field may have some

    def encode(self, text: str, length: int) -> list[int]:
        return [1] * length

    @property
    def core(self) -> Any:
        def encode(text: str, add_special_tokens: bool = False) -> Any:
            numbers = list(range(len(text.split())))
            return SimpleNamespace(ids=numbers, word_ids=numbers)

        return SimpleNamespace(encode=encode)


class _Longest:
    """A sample with a square black picture, which also moves, a caption of a thousand words, and whatever numbers fields ask for."""

    key, captions = "longest", ("word " * 1000,)

    def __init__(self, fields: Mapping[str, Field]) -> None:
        each = [one.field if isinstance(one, Other) else one for one in fields.values()]
        self.values: dict[str, Any] = {one.key: [0.0] * (one.width or WIDTH) for one in each if isinstance(one, Vector)}
        self.values |= {one.key: one.names[0] if one.names else 0 for one in each if isinstance(one, Label)}

    @property
    def other(self) -> _Longest:
        return self

    def picture(self, size: int, patch: int) -> np.ndarray:
        # A square has the most patches of all shapes with this longest side.
        side = max(1, size // patch) * patch
        return np.zeros((side, side, 3), np.uint8)

    def frames(self, size: int, patch: int) -> Sequence[np.ndarray]:
        return [self.picture(size, patch)] * 2

    def npy(self, name: str) -> bytes | None:
        return None
