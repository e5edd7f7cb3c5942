"""open_clip's own trainer, unmodified, with fastvlp's losses.

    python -m fastvlp.integrations.open_clip --train-data '/data/cc3m/{00000..00331}.tar' --model ViT-B-32 --batch-size 1024

takes the arguments of ``python -m open_clip_train.main`` (open_clip_torch 3), also under torchrun: ``--siglip``, ``--distill-model``,
CoCa models, ``--accum-freq``, ``--local-loss --gather-with-grad`` and all others. One argument is added: ``--fastvlp-strategy ring`` makes
the texts travel from neighbour to neighbour instead of all at once. A copy of the trainer needs one changed import instead:
``from fastvlp.integrations.open_clip import create_loss``.

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
    if args.horovod:
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


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run ``open_clip_train.main.main`` with these command-line arguments (default: the process's); returns what it returns.

    The trainer's function runs as it is, but finds :func:`create_loss` under that name; no module is changed.

    Raises:
        ModuleNotFoundError: open_clip_torch, or what its trainer imports, is not installed.
        RuntimeError: the installed trainer does not create its loss by ``create_loss``.
    """
    from open_clip_train import main as trainer

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--fastvlp-strategy", default="gather")
    own, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    if "create_loss" not in trainer.main.__code__.co_names:
        raise RuntimeError(f"{trainer.__file__} does not call create_loss; fastvlp.integrations.open_clip supports open_clip_torch 3")
    names = {**vars(trainer), "create_loss": partial(create_loss, strategy=own.fastvlp_strategy)}
    return FunctionType(trainer.main.__code__, names)(rest)


if __name__ == "__main__":
    sys.exit(main())
