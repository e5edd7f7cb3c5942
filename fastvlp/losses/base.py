"""What both losses share: open_clip's call, the checks, and the choice between one process and many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch import distributed as dist

from fastvlp_kernels import _inputs

from .inputs import Batch, align, asked_sizes, check, tell_refusal, told_sizes
from .members import Members


@dataclass(frozen=True)
class Given:
    """What a loss was called with, checked: features of one dtype, scalars of the dtype of sums, and which of the four need a gradient."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    batch: Batch
    trains: list[bool]


class ContrastiveLoss(nn.Module, ABC):
    """A loss over all pairs of a batch that may be spread over processes; subclasses give the mathematics."""

    name: str
    strategies: tuple[str, ...] = ("gather", "ring", "grouped")

    def __init__(self, rank: int, world_size: int, strategy: str, node_size: int | None, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        if strategy not in self.strategies:
            raise ValueError(f"{self.name}: strategy={strategy!r} is not one of this loss; allowed: {', '.join(self.strategies)}")
        if node_size is not None and (strategy != "grouped" or node_size < 1):
            raise ValueError(f"{self.name}: node_size={node_size} with strategy={strategy!r}; it is at least 1, and for 'grouped' alone")
        self.rank = rank
        self.world_size = world_size
        self.strategy = strategy
        self.node_size = node_size
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        local_sizes: Sequence[int] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """This process's share of the loss; the mean of the shares is the loss of the whole batch.

        Args:
            image_features, text_features: [b, D], row i of both is a pair; float32, bfloat16 or float16 (float64 on the CPU).
            logit_scale: a number, or a tensor of shape () or (1,), already exponentiated.
            logit_bias: likewise, or None.
            output_dict: return ``{"contrastive_loss": loss}``.
            local_sizes: how many pairs each process of the group has. Without it, the processes ask one another at every call.

        Returns:
            A 0-d tensor, float32 (float64 for float64 features).

        Raises:
            TypeError, ValueError: the inputs do not fit, in themselves or between processes. Without ``local_sizes``, all
                processes raise when one refuses.
            RuntimeError: another process refused its input, died, or did not answer within the process group's timeout.
        """
        given = self._given(image_features, text_features, logit_scale, logit_bias, local_sizes)
        if given.batch.members.size == 1:
            loss = self._alone(given.image, given.text, given.scale, given.bias)
        else:
            loss = self._across(given.image, given.text, given.scale, given.bias, given.batch, given.trains)
        return {"contrastive_loss": loss} if output_dict else loss

    def _given(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        local_sizes: Sequence[int] | None,
        teacher: int = 0,
    ) -> Given:
        """The checked inputs of a call, and the batch that they are a part of; ``teacher``: the width of a teacher's features."""
        members = self._members()
        try:
            check(self.name, image, text)
            image, text = align(self.name, image, text)
            dtype = _inputs.product_dtype(self.name, image, None)
            sums = _inputs.sum_dtype(dtype)
            scale = _inputs.scalar(self.name, "logit_scale", logit_scale, image, sums)
            bias = None if logit_bias is None else _inputs.scalar(self.name, "logit_bias", logit_bias, image, sums)
            node_size = members.node_size(self.name, self.node_size) if self.strategy == "grouped" else 1
        except (TypeError, ValueError):
            self._tell_refusal(local_sizes)
            raise
        trains = _inputs.needs_grad(image, text, scale, bias)
        if members.size > 1 and local_sizes is None:
            sizes = asked_sizes(self.name, self.strategy, node_size, image, dtype, trains, teacher, members)
        else:
            sizes = (len(image),) if local_sizes is None else told_sizes(self.name, local_sizes, members, len(image))
        return Given(image, text, scale, bias, Batch(members, sizes, dtype, sums, node_size), trains)

    def _tell_refusal(self, local_sizes: Sequence[int] | None) -> None:
        """Before an error of this process alone: let the others, which may be asking for its size, stop too."""
        members = self._members()
        if members.size > 1 and local_sizes is None:
            tell_refusal(members)

    def _members(self) -> Members:
        members = Members.of(self.name, self.group)
        if self.world_size == 1:
            return members
        if not dist.is_initialized():
            raise RuntimeError(
                f"{self.name}: world_size={self.world_size}, but torch.distributed is not running; call init_process_group first"
            )
        if self.world_size not in (members.size, dist.get_world_size()) or self.rank not in (members.rank, dist.get_rank()):
            raise ValueError(
                f"{self.name}: rank={self.rank}, world_size={self.world_size}, but this process is rank {members.rank} of {members.size}"
                " in the group of the loss; leave both out, or pass the group's"
            )
        return members

    @abstractmethod
    def _alone(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The loss of a batch that is all here, one operator."""

    @abstractmethod
    def _across(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, batch: Batch, trains: list[bool]) -> Tensor:
        """This process's share of a loss over several; ``trains``: which of the four need a gradient."""
