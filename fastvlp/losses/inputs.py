"""What a loss asks of its inputs, and how the members of a batch agree that all of them may start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp_kernels import _check
from fastvlp_kernels._logsumexp import LogSumExp

from .members import Members

KINDS = (
    *("ClipLoss gather", "ClipLoss ring", "ClipLoss grouped", "SigLipLoss gather", "SigLipLoss ring", "SigLipLoss grouped"),
    *("CoCaLoss gather", "CoCaLoss ring", "CoCaLoss grouped"),
    *("DistillClipLoss gather", "DistillClipLoss ring", "DistillClipLoss grouped"),
    "contrastive_loss",
)
SIZES, ALIKE = 4, 5  # how many numbers of either kind members tell one another


@dataclass(frozen=True)
class Batch:
    """One batch of pairs spread over its members.

    Attributes:
        members: the processes. sizes: how many pairs each of them has.
        dtype: of the operands of matrix products, and of features on their way.
        sums: of statistics and accumulated gradients: float32 (float64 for float64).
        node_size: how many consecutive members share fast links; what ``strategy="gather"`` does is the same for any.
    """

    members: Members
    sizes: tuple[int, ...]
    dtype: torch.dtype
    sums: torch.dtype
    node_size: int = 1

    def start(self, rank: int) -> int:
        """The place of ``rank``'s first pair in the whole batch."""
        return sum(self.sizes[:rank])

    def place(self, columns: Tensor, values: Tensor, owners: Sequence[int]) -> None:
        """Write ``values`` [..., n], of the texts of ``owners``, into ``columns`` [..., N], of those of all members."""
        parts = values.split([self.sizes[owner] for owner in owners], -1)
        for owner, part in zip(owners, parts, strict=True):
            columns.split(self.sizes, -1)[owner].copy_(part)

    def take(self, columns: LogSumExp, owners: Sequence[int]) -> LogSumExp:
        """Those of the texts of ``owners``."""
        parts = [values.split(self.sizes, -1) for values in columns]
        return LogSumExp(*(torch.cat([part[owner] for owner in owners], -1) for part in parts))

    def own(self, columns: LogSumExp) -> LogSumExp:
        """This member's part of log-sum-exps [..., N] of the texts of all members."""
        return LogSumExp(*(values.split(self.sizes, -1)[self.members.rank] for values in columns))

    @property
    def factor(self) -> float:
        """W / N: by it a sum over this process's pairs becomes its share, so that the mean of the shares is the mean over pairs."""
        return self.members.size / sum(self.sizes)

    @property
    def travels(self) -> torch.dtype:
        """Of parts of gradients that are summed where they arrive: that of the products, but not float16, whose range is too small."""
        return self.sums if self.dtype == torch.float16 else self.dtype


def check(loss: str, image: Tensor, text: Tensor, *, pairs: bool = True) -> None:
    """Refuse features that are not two floating-point matrices of one width on one device, with ``pairs`` of one shape.

    Raises:
        TypeError: not a tensor, a DTensor, or of a dtype that is not floating point.
        ValueError: the shapes, widths, batch sizes or devices do not fit, or there are no pairs.
    """
    features = {"image_features": image, "text_features": text}
    for name, tensor in features.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{loss}: {name} is {type(tensor).__name__}; it must be a tensor [batch, width]")
    _check.plain_tensors(loss, **features)
    for name, tensor in features.items():
        if tensor.dtype not in _check.FLOATS:
            raise TypeError(f"{loss}: {name} is {tensor.dtype}; features must be float32, bfloat16 or float16 (or float64 on the CPU)")
        if tensor.ndim != 2:
            raise ValueError(f"{loss}: {name} has shape {tuple(tensor.shape)}; it must be a matrix [batch, width]")
    if image.shape[1] != text.shape[1] or image.shape[1] == 0:
        raise ValueError(f"{loss}: images have {image.shape[1]} features and texts {text.shape[1]}; project both towers to one width")
    if pairs and len(image) != len(text):
        raise ValueError(f"{loss}: {len(image)} images but {len(text)} texts; row i of both must be the same pair")
    if 0 in (len(image), len(text)):
        raise ValueError(f"{loss}: the batch is empty; every process needs at least one pair (drop the last batch, or repeat a sample)")


def align(loss: str, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The features in one dtype: as they are, or, where the towers differ under autocast, cast to its dtype.

    Raises:
        TypeError: the dtypes differ outside autocast.
    """
    if image.dtype == text.dtype:
        return image, text
    device = image.device.type
    if not torch.is_autocast_enabled(device):
        raise TypeError(f"{loss}: image_features are {image.dtype}, text_features {text.dtype}; cast one of them, or use autocast")
    dtype = torch.get_autocast_dtype(device)
    return image.to(dtype), text.to(dtype)


def told_sizes(loss: str, local_sizes: Sequence[int], members: Members, pairs: int) -> tuple[int, ...]:
    """``local_sizes`` as the number of pairs of each member.

    Raises:
        TypeError: no sequence. ValueError: not one positive number per member, or not this member's own at its place.
    """
    if not isinstance(local_sizes, Sequence):
        raise TypeError(f"{loss}: local_sizes is {type(local_sizes).__name__}; it must be a list, the number of pairs of each process")
    sizes = tuple(int(size) for size in local_sizes)
    if len(sizes) != members.size:
        raise ValueError(f"{loss}: local_sizes has {len(sizes)} numbers; give one for each process of the group, {members.size}")
    if min(sizes) < 1:
        raise ValueError(f"{loss}: local_sizes is {list(sizes)}; every process needs at least one pair")
    if sizes[members.rank] != pairs:
        raise ValueError(f"{loss}: local_sizes is {list(sizes)}, but rank {members.rank} of the group was called with {pairs} pairs")
    return sizes


def asked_sizes(
    loss: str, strategy: str, node_size: int, batch: Tensor, dtype: torch.dtype, trains: Sequence[bool], teacher: int, members: Members
) -> tuple[int, ...]:
    """The number of pairs of each member, see ``agree``. ``teacher``: the width of a teacher's features; 0 without one."""
    alike = {
        **features_alike(batch, dtype, trains),
        "number of processes of a node": node_size,
        "width of the teacher's features": teacher,
    }
    return tuple(sizes[0] for sizes in agree(loss, f"{loss} {strategy}", members, [len(batch)], alike))


def features_alike(batch: Tensor, dtype: torch.dtype, trains: Sequence[bool]) -> dict[str, int]:
    """What every loss asks to be the same on all members, for ``agree``."""
    return {
        "width of the features": batch.shape[1],
        "dtype of the features, or of autocast": _check.FLOATS.index(dtype),
        "inputs that need a gradient": sum(1 << place for place, wants in enumerate(trains) if wants),
    }


def agree(loss: str, kind: str, members: Members, sizes: Sequence[int], alike: Mapping[str, int]) -> list[list[int]]:
    """``sizes`` of each member, by one collective over a few integers, which also makes sure that all do the same.

    Args:
        kind: one of ``KINDS``. sizes: up to ``SIZES`` numbers. alike: up to ``ALIKE`` that must be equal, by what they are.

    Raises:
        RuntimeError: another member refused its input.
        ValueError: the members differ in the loss, or in ``alike``.
    """
    same = {"loss or strategy": KINDS.index(kind), **alike}
    numbers = [*sizes, *[0] * (SIZES - len(sizes)), *same.values(), *[0] * (ALIKE - len(alike))]
    everyone = _tell(members, [1, *numbers])
    for rank, (fine, *_) in enumerate(everyone):
        if not fine:
            raise RuntimeError(f"{loss}: stopped, because rank {rank} of the group refused its input; that process's own error says why")
    for place, name in enumerate(same, start=1 + SIZES):
        for rank, others in enumerate(everyone):
            if others[place] != everyone[0][place]:
                raise ValueError(f"{loss}: ranks 0 and {rank} of the group differ in the {name}; all processes must call the loss alike")
    return [others[1 : 1 + len(sizes)] for others in everyone]


def tell_refusal(members: Members) -> None:
    """Take this process's part in ``agree`` when it cannot go on, so that the others stop too instead of waiting."""
    _tell(members, [0] * (2 + SIZES + ALIKE))


def _tell(members: Members, numbers: list[int]) -> list[list[int]]:
    return members.gather(torch.tensor(numbers, device=members.control_device())).tolist()
