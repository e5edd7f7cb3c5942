"""What both losses share: open_clip's call, the checks, and the choice between one process and many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch import distributed as dist

from fastvlp_kernels import _inputs

from .across.gather_batch import gather_batch
from .across.group import Group, Members
from .across.split_batch import SplitBatch, agree, features_alike, tell_refusal, told_sizes
from .inputs import align, check


@dataclass(frozen=True)
class Given:
    """What a loss was called with, checked: features of one dtype, scalars of the dtype of sums, and which of the four need a gradient."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    batch: SplitBatch
    trains: list[bool]


class ContrastiveLoss(nn.Module, ABC):
    """A loss over all pairs of a batch that may be spread over processes; subclasses give the mathematics."""

    name: str
    strategies: tuple[str, ...] = ("gather", "ring", "grouped")
    # Methods of open_clip's losses: those that a subclass may override, and those that nothing here would call.
    hooks: tuple[str, ...] = ("get_logits", "get_ground_truth")
    unused: tuple[str, ...] = ()

    def __init__(self, rank: int, world_size: int, strategy: str, node_size: int | None, group: Group) -> None:
        super().__init__()
        if strategy not in self.strategies:
            raise ValueError(f"{self.name}: strategy={strategy!r} is not one of this loss; allowed: {', '.join(self.strategies)}")
        if node_size is not None and (strategy != "grouped" or node_size < 1):
            raise ValueError(f"{self.name}: node_size={node_size} with strategy={strategy!r}; it is at least 1, and for 'grouped' alone")
        self._from_hooks = [hook for hook in self.hooks if getattr(type(self), hook) is not getattr(self._original(), hook)]
        if self._from_hooks and strategy != "gather":
            raise TypeError(f"{self.name}: {self._from_hooks[0]} is overridden, but strategy={strategy!r} has no logits; use 'gather'")
        for method in self.unused:
            if getattr(type(self), method, None) is not getattr(self._original(), method, None):
                raise TypeError(f"{self.name}: {type(self).__name__} overrides {method}, which is never called; override forward instead")
        self.rank = rank
        self.world_size = world_size
        self.strategy = strategy
        self.node_size = node_size
        self.group = group
        self._agreed: set[str] = set()  # calls with local_sizes that the processes have compared

    def _original(self) -> type[ContrastiveLoss]:
        """The class of this library that a user's class is derived from."""
        return next(cls for cls in type(self).__mro__ if cls.__module__.startswith("fastvlp.losses."))

    def _settings(self) -> dict[str, object]:
        """What of the loss itself must be the same on all processes, by what it is."""
        return {"loss or strategy": f"{self.name} {self.strategy}"}

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
        """This process's share of the loss, 0-d, float32 (float64 for float64); the mean of the shares is the whole batch's.

        Args:
            image_features, text_features: [b, D], row i of both is a pair; float32, bfloat16 or float16 (float64 on the CPU).
            logit_scale, logit_bias: numbers, 0-d or [1]; the scale already exponentiated, the bias may be None.
            output_dict: return ``{"contrastive_loss": loss}``.
            local_sizes: pairs of each process; without it they ask one another at every call, with it once for every kind of call.

        Raises:
            TypeError, ValueError: the inputs do not fit; where processes ask one another, all of them raise.
            RuntimeError: another process refused, died, or did not answer in time.
        """
        given = self._given(image_features, text_features, logit_scale, logit_bias, local_sizes)
        if self._from_hooks:
            loss = self._from_logits(given)
        elif given.batch.members.size == 1:
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
        **alike: object,
    ) -> Given:
        """The checked inputs of a call, and the batch that they are a part of; ``alike``: what else must be equal, by what it is."""
        members = self._members()
        try:
            check(self.name, image, text)
            image, text = align(self.name, image, text)
            dtype = _inputs.product_dtype(self.name, image, None)
            sums = _inputs.sum_dtype(dtype)
            scale = _inputs.scalar(self.name, "logit_scale", logit_scale, image, sums)
            bias = None if logit_bias is None else _inputs.scalar(self.name, "logit_bias", logit_bias, image, sums)
            node_size = members.node_size(self.name, self.node_size) if self.strategy == "grouped" else 1
            sizes = None if local_sizes is None else told_sizes(self.name, local_sizes, members, image.shape[0])
        except (TypeError, ValueError):
            self._tell_refusal(local_sizes)
            raise
        trains = _inputs.needs_grad(image, text, scale, bias)
        if members.size > 1:
            alike = self._settings() | features_alike(image, dtype, trains) | {"number of processes of a node": node_size} | alike
            alike["presence of logit_bias"] = bias is not None
            call = repr(alike)
            # Told sizes are compared once for each kind of call: comparing costs a message between all processes.
            if sizes is None or call not in self._agreed:
                asked = tuple(count for (count,) in agree(self.name, members, [image.shape[0]], alike))
                if sizes is not None and sizes != asked:
                    raise ValueError(f"{self.name}: local_sizes is {list(sizes)}, but the processes have {list(asked)} pairs")
                if sizes is not None:
                    self._agreed.add(call)
                sizes = asked
        return Given(image, text, scale, bias, SplitBatch(members, sizes or (image.shape[0],), dtype, sums, node_size), trains)

    def _tell_refusal(self, local_sizes: Sequence[int] | None) -> None:
        """Before an error of this process alone: let the others, which may be asking for its size, stop too."""
        members = self._members()
        # Where sizes were told and agreed upon before, nobody asks, and so nobody waits.
        if members.size > 1 and (local_sizes is None or not self._agreed):
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

    def _whole(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The features of all processes, with gradients."""
        if self._members().size == 1:
            return image, text
        images, texts = gather_batch(image, text, group=self.group)
        return images, texts

    @abstractmethod
    def _from_logits(self, given: Given) -> Tensor:
        """This process's share from ``get_logits`` and ``get_ground_truth``, one of which a subclass overrides: dense, as open_clip's."""

    @abstractmethod
    def _alone(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The loss of a batch that is all here, one operator."""

    @abstractmethod
    def _across(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, batch: SplitBatch, trains: list[bool]) -> Tensor:
        """This process's share of a loss over several; ``trains``: which of the four need a gradient."""
