"""What ``fastvlp.accelerate`` changed in a model, what that should save, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from . import instances


@dataclass(frozen=True)
class Replacement:
    """One module that computes differently now.

    Attributes:
        path: its name in the model, "" for the model itself. module: the module. original: the class that it had.
        change: what is different, in words. expected: what that should save.
    """

    path: str
    module: nn.Module
    original: type[nn.Module]
    change: str
    expected: str


@dataclass(frozen=True)
class Saving:
    """What one block should save for an image of the tower's own size.

    Attributes:
        path: the block. tokens: how many its attention sees and how many its MLP sees.
        flops: of one image, forward, counted from weights and attention. flops_before: the same in the untouched model.
    """

    path: str
    tokens: tuple[int, int]
    flops: float
    flops_before: float


@dataclass(frozen=True)
class Report:
    """What :func:`fastvlp.accelerate` replaced, per block what is ``expected``, and which towers were ``skipped``; print it to read it."""

    replaced: tuple[Replacement, ...]
    expected: tuple[Saving, ...]
    skipped: tuple[str, ...] = ()

    @property
    def flops_saved(self) -> float:
        """The share of the towers' operations that is saved; 0 where nothing merges or the number of tokens is not known."""
        # Of the blocks that were planned; what else the model computes is not known here.
        before = sum(block.flops_before for block in self.expected)
        return 1 - sum(block.flops for block in self.expected) / before if before else 0.0

    def __str__(self) -> str:
        lines = [f"{part.path or 'the model'} ({part.original.__name__}): {part.change}; {part.expected}" for part in self.replaced]
        lines += [f"left as it is: {why}" for why in self.skipped]
        return "fastvlp.accelerate replaced\n" + "\n".join(f"  {line}" for line in lines)

    def restore(self) -> None:
        """Put everything back; a second call does nothing. For a copy of the model there is :func:`fastvlp.restore`."""
        for part in self.replaced:
            instances.restore(part.module)


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`fastvlp.accelerate` in ``model``: also in a deep copy, an average of its weights, or a model read by ``torch.load``.

    Wrappers (DDP, FSDP, ``torch.compile``) may stay on. A model that is not accelerated stays as it is.

    Returns:
        ``model``.
    """
    for module in model.modules():
        instances.restore(module)
    return model
