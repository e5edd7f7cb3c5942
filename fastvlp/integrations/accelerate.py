"""``fastvlp.accelerate``: the parts of one model that fastvlp computes faster, replaced in place and put back on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import distributed as dist
from torch import nn

from . import instances


@dataclass(frozen=True)
class Replacement:
    """One module that computes differently now.

    Attributes:
        path: its name in the model, "" for the model itself. module: the module. original: the class that it had.
        build: makes the forward that it has now. change: what is different, in words. expected: what that should save.
    """

    path: str
    module: nn.Module
    original: type[nn.Module]
    build: instances.Build
    change: str
    expected: str


@dataclass(frozen=True)
class Saving:
    """What one block is expected to save for an image of the tower's own size.

    Attributes:
        path: the block. tokens: how many its attention sees and how many its MLP sees. flops: of an image in it, forward, as counted
            from its weights and the attention. flops_before: the same in the untouched model.
    """

    path: str
    tokens: tuple[int, int]
    flops: float
    flops_before: float


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` replaced, and per block what is ``expected``; print it to read it."""

    replaced: tuple[Replacement, ...]
    expected: tuple[Saving, ...]

    @property
    def flops_saved(self) -> float:
        """The share of the towers' operations that is expected to be saved, 0 where nothing merges or the number of tokens is not known."""
        before = sum(block.flops_before for block in self.expected)
        return 1 - sum(block.flops for block in self.expected) / before if before else 0.0

    def __str__(self) -> str:
        lines = (f"{part.path or 'the model'} ({part.original.__name__}): {part.change}; {part.expected}" for part in self.replaced)
        return "fastvlp.accelerate replaced\n" + "\n".join(f"  {line}" for line in lines)

    def restore(self) -> None:
        """Put everything back; a second call does nothing.

        Raises:
            RuntimeError: a module's class was changed again meanwhile, as FSDP2 does; undo that first.
        """
        for part in self.replaced:
            instances.restore(part.module, part.original, part.build)


def accelerate(
    model: nn.Module,
    *,
    merge: int | float | Sequence[int | float] | None = None,
    drop: float | None = None,
    attention: Literal["packed"] | None = None,
    pack: bool = False,
    group: dist.ProcessGroup | None = None,
    logits: bool | None = None,
) -> Report:
    """Accelerate one model of timm, open_clip or transformers 5 in place.

    Call it before DDP, FSDP or ``torch.compile`` wrap the model. Only these instances change, by a subclass of their class made for
    them: parameters, state-dict keys, hooks, ``isinstance``, ``save_pretrained``, ``copy.deepcopy`` and the signature of ``forward`` stay
    as they are, and no module or class of a library is touched.

    Image towers (timm's VisionTransformer and NaFlexVit; open_clip's CLIP, CoCa and CustomText; transformers' CLIP, SigLIP, SigLIP 2 and
    ViT) compute as before until something is switched on:

    * ``merge`` merges similar tokens between attention and MLP of each block (ToMe, https://arxiv.org/abs/2210.09461, with its order of
      tokens and its attention in proportion to sizes). After the last block every patch has the token that it went to, so that shapes and
      pooling stay; class and register tokens never merge. Between two blocks flow ``Tokens`` (a tuple, the tokens first) instead of a
      tensor, which a hook on a block sees; ``forward_intermediates`` of timm and open_clip, and ``output_attentions`` of transformers,
      are refused with that.
    * ``drop`` lets each image lose that share of its patches before the first block, in training only (PatchDropout, FLIP).
    * ``attention="packed"`` computes attention by :func:`fastvlp.ops.packed_attention` also where nothing merges.
    * ``pack`` leaves padding out of all blocks where a batch comes with an attention mask (NaFlexVit, SigLIP 2), as merging always does;
      it asks the device for the numbers of tokens once per batch. Padding comes out as 0.

    Every CLIPModel, SiglipModel and Siglip2Model of transformers 5 computes its loss without the batch x batch logits: a call with
    ``return_loss=True`` gets it from :func:`fastvlp.ops.similarity_logsumexp` or :func:`fastvlp.ops.pairwise_sigmoid`, float32; a call
    without it is the model's own. ``outputs.logits_per_image`` and ``outputs.logits_per_text`` are computed, differentiably, when they are
    first read (by name, by position, or through ``to_tuple()``); ``outputs.keys()``, ``values()`` and ``items()`` contain them from then
    on.

    Args:
        model: a module that is, or contains, at least one of those models.
        merge: how many tokens each block merges away: a count, or a share below 1 of its tokens; or one of these per block.
        drop: the share of the patches, from 0 to below 1.
        attention: "packed", or None: packed_attention where tokens are merged or packed, else the model's own.
        pack: whether padding is left out.
        group: processes whose pairs are contrasted with one another, for example ``torch.distributed.group.WORLD``: the objective of a
            larger batch, which transformers itself does not have. None: this process's own pairs, as in transformers.
        logits: whether a call with ``return_loss=True`` makes the logits at once. None: only where gradients are off, so that an
            evaluation sees the outputs in their usual places; with ``return_dict=False`` they are always made.

    Returns:
        A report of what was replaced and what that should save; ``report.restore()`` puts it back.

    Raises:
        TypeError: there is nothing to replace, or the blocks of a tower that is to merge, drop or pack are of another kind.
        ValueError: merge, drop or attention are not what is allowed, or nothing is asked for; patches are to be dropped from a tower whose
            pooling takes a mask; ``group`` or ``logits`` without a loss.
        RuntimeError: it is transformers 4, whose models are built differently, or the model is accelerated already.
    """
    for path, module in model.named_modules():
        if hasattr(module, instances.OPTIONS):
            raise RuntimeError(f"fastvlp.accelerate: {path or 'the model'} is accelerated already; restore the first report to change it")
    from . import towers

    found, unknown = towers.find_all(model)
    switches = towers.Switches(merge, drop, attention, pack)
    if unknown and (not found and switches.on):
        raise TypeError(f"fastvlp.accelerate: {unknown[0]}; leave merge, drop, attention and pack out for this model")
    plans = [towers.plan(path, tower, switches) for path, tower in found] if switches.on else []
    replaced: list[Replacement] = []
    losses = [(path, module) for path, module in model.named_modules() if _of_transformers(module)]
    if losses:
        from . import transformers

        replaced += transformers.replace(losses, transformers.Options(group, logits))
    if not replaced and not (group is None and logits is None):
        raise ValueError(
            f"fastvlp.accelerate: group= and logits= are for the loss of transformers' models, and this {type(model).__name__} has none"
        )
    if found and not (replaced or switches.on):
        raise ValueError(
            f"fastvlp.accelerate: nothing was asked for, and this {type(model).__name__} has no loss to replace; pass merge=, drop=, "
            "attention='packed' or pack=True"
        )
    if not plans and (not replaced or switches.on):
        raise TypeError(
            f"fastvlp.accelerate: nothing to replace in {type(model).__name__}; it knows the image towers of timm (VisionTransformer, "
            "NaFlexVit), open_clip and transformers (CLIP, SigLIP, SigLIP 2, ViT), and the loss of transformers' CLIPModel, SiglipModel "
            "and Siglip2Model (in an open_clip or timm script, import the loss from fastvlp.losses)"
        )
    for plan in plans:
        replaced += towers.replace(plan)
    return Report(tuple(replaced), tuple(saving for plan in plans for saving in plan.savings))


def _of_transformers(module: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "transformers" for cls in type(module).__mro__)
