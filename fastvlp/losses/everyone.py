"""The whole batch on every process, with gradients: any objective across processes, for W times the work of its share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from fastvlp_kernels import _check
from fastvlp_kernels.packed import Packed

from .members import Members
from .once import no_second_derivatives

NAME = "gather_batch"
DTYPES = (*_check.FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
Rows = TypeVar("Rows", Tensor, Packed)


def gather_batch(*parts: Rows, group: dist.ProcessGroup | None = None) -> tuple[Rows, ...]:
    """The rows (or segments) of all processes of ``group``, in the order of ranks, from this process's rows of each part.

    A loss that every process computes from the whole batch is, as their mean, that loss; and once DDP has averaged, every gradient is that
    of one process with the whole batch. That makes any function of this module exact across processes::

        image, text = gather_batch(image, text)
        loss = rank_clip_loss(image, text, scale)

    Every process then makes all the products, O(N * N * D), and holds O(N * D). ``ClipLoss``, ``SigLipLoss``, ``CoCaLoss``,
    ``DistillClipLoss`` and ``contrastive_loss(..., group=...)`` share that work out.

    Args:
        parts: tensors [b, ...], floating-point (float32, float64, bfloat16, float16), int64, int32, uint8 or bool; or ``Packed``. The
            number of rows may differ between processes and between parts, everything else must not.
        group: the processes that share a batch; None: all. Without torch.distributed, or for a group of one, the parts come back.

    Returns:
        As many parts. Gradients are summed over processes in float32, and travel in the dtype of the part (float16: in float32).

    Raises:
        TypeError, ValueError: a part is of another kind, or the processes differ; then all of them raise.
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
    counts = _agree(members, tensors, wrong)
    gathered = iter([_gather(tensor, members, sizes) for tensor, sizes in zip(tensors, counts, strict=True)])
    return tuple(_whole(part, gathered) for part in parts)


def _tensors(part: Any) -> tuple[list[Tensor], Exception | None]:
    """What travels of a part, or why it cannot."""
    if isinstance(part, Packed):
        extras = [extra for extra in (part.size, part.pos) if extra is not None]
        return [part.x, part.lengths.to(part.x.device), *extras], None
    if not isinstance(part, Tensor) or part.ndim == 0 or part.dtype not in DTYPES:
        what = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        return [], TypeError(f"{NAME}: a part is {what}; allowed: tensors [b, ...] of floats, int64, int32, uint8 or bool, and Packed")
    try:
        _check.plain_tensors(NAME, part=part)
    except TypeError as error:
        return [], error
    return [part], None


def _agree(members: Members, tensors: list[Tensor], wrong: Exception | None) -> list[tuple[int, ...]]:
    """How many rows each member has of every tensor, once all have found that theirs fit together."""
    device = members.control_device()
    heads = members.gather(torch.tensor([-1 if wrong else len(tensors)], device=device))[:, 0].tolist()
    if wrong is not None:
        raise wrong
    for rank, head in enumerate(heads):
        if head == -1:
            raise ValueError(f"{NAME}: stopped, because rank {rank} of the group refused its parts; that process's own error says why")
        if head != heads[0]:
            raise ValueError(f"{NAME}: ranks 0 and {rank} of the group gather {heads[0]} and {head} tensors; all must gather alike")
    numbers = [(len(tensor), tensor.shape[1:].numel(), DTYPES.index(tensor.dtype)) for tensor in tensors]
    everyone = members.gather(torch.tensor(numbers, device=device)).tolist()
    for rank, others in enumerate(everyone):
        for place, (mine, theirs) in enumerate(zip(everyone[0], others, strict=True)):
            if mine[1:] != theirs[1:]:
                raise ValueError(f"{NAME}: ranks 0 and {rank} of the group differ in the dtype or the width of tensor {place}")
    return [tuple(rows[0] for rows in column) for column in zip(*everyone, strict=True)]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, members: Members, sizes: tuple[int, ...]) -> Tensor:
        ctx.members, ctx.sizes, ctx.dtype = members, sizes, rows.dtype
        return members.gather_rows(rows, sizes)

    @staticmethod
    @no_second_derivatives
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sums = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        travels = sums if ctx.dtype == torch.float16 else ctx.dtype
        return ctx.members.scatter_sum(gradient.to(travels), ctx.sizes, sums).to(ctx.dtype), None, None


def _gather(tensor: Tensor, members: Members, sizes: tuple[int, ...]) -> Tensor:
    flat = tensor.reshape(len(tensor), tensor.shape[1:].numel()).contiguous()
    if tensor.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    whole: Tensor = _Gather.apply(flat, members, sizes)
    return whole.to(tensor.dtype).reshape(sum(sizes), *tensor.shape[1:])


def _whole(part: Any, gathered: Any) -> Any:
    if not isinstance(part, Packed):
        return next(gathered)
    x, lengths = next(gathered), next(gathered)
    size, pos = (None if extra is None else next(gathered) for extra in (part.size, part.pos))
    return Packed.of(x, lengths, size, pos)
