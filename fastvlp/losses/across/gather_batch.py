"""The whole batch on every process, with gradients: any objective across processes, for W times the work of its share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastvlp_kernels import _check
from fastvlp_kernels._inputs import sum_dtype
from fastvlp_kernels.packed import Packed

from .gather import gather_rows
from .group import Group, Members
from .split_batch import SplitBatch, agree, tell_refusal

NAME = "gather_batch"
DTYPES = (*_check.FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
Rows = TypeVar("Rows", Tensor, Packed)


def gather_batch(*parts: Rows, group: Group = None) -> tuple[Rows, ...]:
    """The rows (or segments) of all processes of ``group``, in the order of ranks, with gradients.

    It makes any function of the whole batch exact across processes (the mean of the losses, and all gradients once DDP has averaged)::

        image, text = gather_batch(image, text)
        loss = rank_clip_loss(image, text, scale)

    Every process makes all the products; ``ClipLoss``, ``SigLipLoss``, ``CoCaLoss``, ``DistillClipLoss`` and
    ``contrastive_loss(..., group=...)`` share them out.

    Args:
        parts: tensors [b, ...] (float32, float64, bfloat16, float16, int64, int32, uint8, bool) or ``Packed``; only b may differ.
        group: None: all processes; without torch.distributed the parts come back.

    Returns:
        As many parts. Gradients are summed in float32, and travel in the part's dtype (float16: in float32).

    Raises:
        TypeError, ValueError: another kind, or the processes differ; then all of them raise.
    """
    members = Members.of(NAME, group)
    tensors, wrong = [], None
    for part in parts:
        found, why = _tensors(part)
        tensors += found
        wrong = wrong or why
    if members.size == 1:
        if wrong is not None:
            raise wrong
        return parts
    if wrong is not None:
        # The others are in a collective already, or will be: told, they raise, too, instead of waiting.
        tell_refusal(members)
        raise wrong
    alike: dict[str, object] = {"loss or strategy": NAME, "number of tensors": len(tensors)}
    alike |= {f"dtype or the width of tensor {k}": f"{t.dtype} {t.shape[1:].numel()}" for k, t in enumerate(tensors)}
    counts = zip(*agree(NAME, members, [len(tensor) for tensor in tensors], alike), strict=True)
    gathered = iter([_gather(tensor, members, sizes) for tensor, sizes in zip(tensors, counts, strict=True)])
    return tuple(_whole(part, gathered) for part in parts)


def _tensors(part: Any) -> tuple[list[Tensor], Exception | None]:
    """What travels of a part, or why it cannot."""
    if isinstance(part, Packed):
        extras = [extra for extra in (part.size, part.pos) if extra is not None]
        # With the tokens on their device, since NCCL moves nothing from the CPU.
        return [part.x, part.lengths.to(part.x.device), *extras], None
    if not isinstance(part, Tensor) or part.ndim == 0 or part.dtype not in DTYPES:
        what = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        return [], TypeError(f"{NAME}: a part is {what}; allowed: tensors [b, ...] of floats, int64, int32, uint8 or bool, and Packed")
    try:
        _check.plain_tensors(NAME, part=part)
    except TypeError as error:
        return [], error
    return [part], None


def _gather(tensor: Tensor, members: Members, sizes: tuple[int, ...]) -> Tensor:
    flat = tensor.reshape(len(tensor), tensor.shape[1:].numel()).contiguous()
    if tensor.is_floating_point():
        whole = gather_rows(flat, SplitBatch(members, sizes, tensor.dtype, sum_dtype(tensor.dtype)))
    else:
        # Not every backend moves booleans.
        whole = members.gather_rows(flat.to(torch.uint8) if tensor.dtype == torch.bool else flat, sizes).to(tensor.dtype)
    return whole.reshape(sum(sizes), *tensor.shape[1:])


def _whole(part: Any, gathered: Any) -> Any:
    if not isinstance(part, Packed):
        return next(gathered)
    x, lengths = next(gathered), next(gathered)
    size, pos = (None if extra is None else next(gathered) for extra in (part.size, part.pos))
    return Packed.of(x, lengths, size, pos)
