"""``fastvlp.accelerate``: the parts of one model that fastvlp computes faster, replaced in place and put back on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from fastvlp.losses.across.group import ALONE, Group

from . import instances, towers
from .report import Report


def accelerate(
    model: nn.Module,
    *,
    merge: int | float | Sequence[int | float] | None = None,
    drop: float | None = None,
    attention: Literal["packed"] | None = None,
    pack: bool = False,
    group: Group = ALONE,
    logits: bool | None = None,
) -> Report:
    """Accelerate one model of timm, open_clip or transformers 5 in place.

    Only these instances change, by a subclass of their class made for them: parameters, state-dict keys, hooks, ``isinstance``,
    ``save_pretrained``, ``copy.deepcopy`` and the signature of ``forward`` stay. DDP, FSDP and ``torch.compile`` may wrap the model
    before or after.

    Image towers (timm's VisionTransformer and NaFlexVit; open_clip's CLIP, CoCa and CustomText; transformers' CLIP, SigLIP, SigLIP 2 and
    ViT) compute as before until something is switched on:

    * ``merge`` merges similar tokens between attention and MLP of each block (ToMe, https://arxiv.org/abs/2210.09461, with its order of
      tokens and its attention in proportion to sizes). After the last block, and in ``hidden_states``, every patch has the token that it
      went to, so that shapes and pooling stay; class and register tokens never merge. Between two blocks flow ``Tokens`` (a tuple, whose
      [0] is [B, N, C]); ``forward_intermediates``, ``output_attentions`` and reentrant checkpointing are refused with that.
    * ``drop`` lets each image lose that share of its patches before the first block, in training only (PatchDropout, FLIP). SigLIP 2 hides
      them in its mask.
    * ``attention="packed"`` computes attention by :func:`fastvlp.ops.packed_attention` also where nothing merges, and the sum behind it
      with the next norm by :func:`fastvlp.ops.residual_norm`.
    * ``pack`` leaves padding out of all blocks where a batch comes with an attention mask (NaFlexVit, SigLIP 2), as merging always does;
      it asks the device for the numbers of tokens once per batch. Padding comes out as 0.

    Attention masks say which tokens are real, and may add to the scores of keys (not with ``merge``); what differs between queries is
    refused. Models that drop attention weights in training attend padded there. ``torch.export``, ONNX and ``torch.jit.trace`` get
    PyTorch's own operators. ``torch.compile(fullgraph=True)`` takes all but masks.

    Every CLIPModel, SiglipModel and Siglip2Model of transformers 5 computes its loss without the batch x batch logits: a call with
    ``return_loss=True`` gets it from :func:`fastvlp.ops.similarity_logsumexp` or :func:`fastvlp.ops.pairwise_sigmoid`, float32; a call
    without it is the model's own. ``outputs.logits_per_image`` and ``outputs.logits_per_text`` are computed, differentiably, when they are
    first read; ``outputs.keys()``, ``values()`` and ``items()`` contain them from then on.

    Args:
        model: a module that is, or contains, at least one of those models.
        merge: how many tokens each block merges away: a count, or a share below 1 of its tokens; or one of these per block.
        drop: the share of the patches, from 0 to below 1.
        attention: "packed", or None: packed_attention where tokens are merged or packed, else the model's own.
        pack: whether padding is left out.
        group: processes whose pairs are contrasted with one another, as in ``fastvlp.losses``: None means all, a larger batch, which
            transformers itself does not have; ``fastvlp.losses.ALONE`` this process's own pairs.
        logits: whether a call with ``return_loss=True`` makes the logits at once. None: only where gradients are off, so that an
            evaluation sees the outputs in their usual places; with ``return_dict=False`` they are always made.

    Returns:
        A report of what was replaced and what that should save; ``report.restore()`` or ``fastvlp.restore(model)`` puts it back.

    Raises:
        TypeError: there is nothing to replace, or the blocks of a tower that is to merge, drop or pack are of another kind.
        ValueError: a switch is not what is allowed or does not fit a tower, or nothing is asked for; ``group`` or ``logits``
            without a loss.
        RuntimeError: it is transformers 4, whose models are built differently, or the model is accelerated already.
    """
    # Every module is asked, as a part may have been accelerated by itself.
    for path, module in model.named_modules():
        if instances.changed(module):
            raise RuntimeError(f"fastvlp.accelerate: {path or 'the model'} is accelerated already; to change it call fastvlp.restore first")
    found, unknown = towers.find_all(model)
    switches = towers.Switches(merge, drop, attention, pack)
    if unknown and (not found and switches.on):
        raise TypeError(f"fastvlp.accelerate: {unknown[0]}; leave merge, drop, attention and pack out for this model")
    plans = towers.plan(model, switches, found) if switches.on else []
    # transformers is imported only where a part of the model comes from it: the import takes seconds.
    losses: list[tuple[str, nn.Module, Any]] = []
    if named := [(path, module) for path, module in model.named_modules() if _of_transformers(module)]:
        from . import transformers

        losses = transformers.find_all(named)
    if not losses and not (group == ALONE and logits is None):
        raise ValueError(
            f"fastvlp.accelerate: group= and logits= are for the loss of transformers' models, and this {type(model).__name__} has none"
        )
    if found and not (losses or switches.on):
        raise ValueError(
            f"fastvlp.accelerate: nothing was asked for, and this {type(model).__name__} has no loss to replace; pass merge=, drop=, "
            "attention='packed' or pack=True"
        )
    if not plans and (not losses or switches.on):
        raise TypeError(
            f"fastvlp.accelerate: nothing to replace in {type(model).__name__}; it knows the image towers of timm (VisionTransformer, "
            "NaFlexVit), open_clip and transformers (CLIP, SigLIP, SigLIP 2, ViT), and the loss of transformers' CLIPModel, SiglipModel "
            "and Siglip2Model (in an open_clip or timm script, import the loss from fastvlp.losses)"
        )
    # Nothing changes before everything is checked.
    replaced = [transformers.replace(loss, group, logits) for loss in losses]
    for plan in plans:
        replaced += towers.replace(plan)
    return Report(tuple(replaced), tuple(saving for plan in plans for saving in plan.savings), tuple(unknown if switches.on else ()))


def _of_transformers(module: nn.Module) -> bool:
    # Of all bases, since a subclass of the caller's lies in a module of another name.
    return any(cls.__module__.split(".")[0] == "transformers" for cls in type(module).__mro__)
