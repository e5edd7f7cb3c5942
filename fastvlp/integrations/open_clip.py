"""open_clip's own trainer, unmodified, with fastvlp's losses.

    python -m fastvlp.integrations.open_clip --train-data '/data/cc3m/{00000..00331}.tar' --model ViT-B-32 --batch-size 1024

takes the arguments of ``python -m open_clip_train.main`` (open_clip_torch 3 or 4), also under torchrun: ``--siglip``,
``--distill-model``, CoCa models, ``--accum-freq``, ``--local-loss --gather-with-grad`` and all others. One is added:
``--fastvlp-strategy ring`` makes the texts travel from neighbour to neighbour instead of all at once. A copy of the trainer needs one
changed import instead: ``from fastvlp.integrations.open_clip import create_loss`` (3) or ``create_task`` (4); a script with a task of
open_clip 4 needs ``CLIPTask(model, loss=fastvlp.losses.ClipLoss(...))``.

The gradients are those of ``--local-loss --gather-with-grad`` with or without these flags, so the logged loss is rank 0's share.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

from fastvlp.losses import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss


def create_loss(args: Any, strategy: str = "gather") -> nn.Module:
    """The loss that ``open_clip.create_loss`` would choose for the trainer's arguments, of fastvlp's.

    Args:
        args: the namespace that ``open_clip_train`` parses and completes. strategy: "gather", "ring" or "grouped".

    Raises:
        ValueError: with ``--horovod``, or for a strategy that the loss does not have.
    """
    if getattr(args, "horovod", False):  # open_clip 4 has none
        raise ValueError("fastvlp's losses do not run under --horovod; start the processes with torchrun instead")
    place: dict[str, Any] = {"rank": args.rank, "world_size": args.world_size, "strategy": strategy}
    if args.siglip and not args.distill and "coca" not in args.model.lower():
        return SigLipLoss(dist_impl=args.loss_dist_impl, **place)
    options = {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad, **place}
    if args.distill:
        return DistillClipLoss(**options)
    if "coca" in args.model.lower():
        return CoCaLoss(args.coca_caption_loss_weight, args.coca_contrastive_loss_weight, **options)
    return ClipLoss(**options)


def create_task(args: Any, *models: Any, strategy: str = "gather", **options: Any) -> nn.Module:
    """open_clip 4's ``create_task``, with :func:`create_loss` as the loss of CLIP, SigLIP, CoCa and distillation tasks."""
    import open_clip

    task: nn.Module = open_clip.create_task(args, *models, **options)
    # By name, since open_clip 3 does not have these classes.
    if type(task).__name__ in ("CLIPTask", "SigLIPTask", "CoCaTask", "DistillCLIPTask"):
        task.loss = create_loss(args, strategy)
    return task


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run ``open_clip_train.main.main`` with these command-line arguments (default: the process's); returns what it returns.

    The trainer's function runs as it is, but finds :func:`create_loss` or :func:`create_task` under that name; no module is changed.

    Raises:
        ModuleNotFoundError: open_clip_torch, or what its trainer imports, is not installed.
        RuntimeError: the installed trainer creates its loss in another way.
    """
    from open_clip_train import main as trainer

    # Without abbreviations, which could be meant for the trainer.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--fastvlp-strategy", default="gather")
    own, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    ours = {create.__name__: partial(create, strategy=own.fastvlp_strategy) for create in (create_loss, create_task)}
    if not ours.keys() & set(trainer.main.__code__.co_names):
        raise RuntimeError(f"{trainer.__file__} calls neither create_loss nor create_task; open_clip_torch 3 and 4 are supported")
    # main's own code with two names looked up elsewhere: open_clip itself stays as it is for whoever else imports it.
    names = {**vars(trainer), **ours}
    return FunctionType(trainer.main.__code__, names)(rest)


if __name__ == "__main__":
    sys.exit(main())
