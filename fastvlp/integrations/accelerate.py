"""``fastvlp.accelerate``: the parts of one model that fastvlp computes faster, replaced in place and put back on demand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import distributed as dist
from torch import nn


@dataclass(frozen=True)
class Replacement:
    """One module that computes differently now.

    Attributes:
        path: its name in the model, "" for the model itself. module: the module. original: the class that it had.
        change: what is different, in words.
    """

    path: str
    module: nn.Module
    original: type[nn.Module]
    change: str


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` replaced; print it to read it."""

    replaced: tuple[Replacement, ...]

    def __str__(self) -> str:
        lines = (f"{part.path or 'the model'} ({part.original.__name__}): {part.change}" for part in self.replaced)
        return "fastvlp.accelerate replaced\n" + "\n".join(f"  {line}" for line in lines)

    def undo(self) -> None:
        """Put everything back; a second call does nothing.

        Raises:
            RuntimeError: a module's class was changed again meanwhile, as FSDP2 does; undo that first.
        """
        from . import transformers

        for part in self.replaced:
            transformers.restore(part.module, part.original)


def accelerate(model: nn.Module, *, group: dist.ProcessGroup | None = None, logits: bool | None = None) -> Report:
    """Make every CLIPModel, SiglipModel and Siglip2Model of transformers 5 in ``model`` compute its loss without the batch x batch logits.

    Call it before DDP, FSDP or ``torch.compile`` wrap the model. Only these instances change, by a subclass of their class made for
    them: parameters, state-dict keys, ``isinstance``, ``save_pretrained``, ``copy.deepcopy`` and the signature of ``forward`` stay as they
    are, and no module or class of transformers is touched. A call with ``return_loss=True`` gets the loss from
    :func:`fastvlp.ops.similarity_logsumexp` or :func:`fastvlp.ops.pairwise_sigmoid`, float32; a call without it is the model's own.

    ``outputs.logits_per_image`` and ``outputs.logits_per_text`` are computed, differentiably, when they are first read (by name, by
    position, or through ``to_tuple()``); ``outputs.keys()``, ``values()`` and ``items()`` contain them from then on.

    Args:
        model: a module that is, or contains, at least one of those models.
        group: processes whose pairs are contrasted with one another, for example ``torch.distributed.group.WORLD``: the objective of a
            larger batch, which transformers itself does not have. None: this process's own pairs, as in transformers.
        logits: whether a call with ``return_loss=True`` makes the logits at once. None: only where gradients are off, so that an
            evaluation sees the outputs in their usual places; with ``return_dict=False`` they are always made.

    Returns:
        A report of what was replaced; ``report.undo()`` puts it back.

    Raises:
        TypeError: there is nothing to replace.
        RuntimeError: it is transformers 4, whose models are built differently, or the model is accelerated already.
    """
    found = [(path, module) for path, module in model.named_modules() if _of_transformers(module)]
    replaced: list[Replacement] = []
    if found:
        from . import transformers

        replaced = transformers.replace(found, transformers.Options(group, logits))
    if not replaced:
        raise TypeError(
            f"fastvlp.accelerate: nothing to replace in {type(model).__name__}; it replaces the loss of transformers' CLIPModel, "
            "SiglipModel and Siglip2Model (in an open_clip or timm script, import the loss from fastvlp.losses)"
        )
    return Report(tuple(replaced))


def _of_transformers(module: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "transformers" for cls in type(module).__mro__)
