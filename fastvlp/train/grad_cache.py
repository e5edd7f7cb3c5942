"""The gradient of a whole contrastive batch, with the activations of one micro-batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastvlp.train.gradients import cached_gradients
from fastvlp_kernels.packed import Packed

Features = Tensor | tuple[Tensor, ...]


class GradCache:
    """Any loss over a whole batch, for towers that see it in micro-batches (Gao et al. 2021, arXiv:2101.06983).

    Features of every micro-batch without gradient, the loss of all of them and its gradient for the features, then each micro-batch once
    more with its part of that gradient. Gradients are those of one large batch; memory is that of one micro-batch and of the features.

        cache = GradCache([model.encode_image, model.encode_text], lambda image, text: ClipLoss()(image, text, model.scale()))
        loss = cache.backward(images, texts)      # two lists of micro-batches; gradients are in the parameters

    What a tower gives may be several tensors: for FILIP, tokens and how many each picture has. Random numbers that a tower draws
    (dropout) are the same in both passes.

    Args:
        towers: micro-batch -> features [b, ...], or a tuple of tensors; their first dimensions add up over micro-batches. Of integers
            there is no gradient.
        loss: (features of each tower, over the whole batch, then the ``shared`` tensors) -> 0-d tensor. Parameters that it uses itself
            get their gradients too.
        shared: () -> tensors or None, of parameters that ``together`` uses beside the towers.
        together: (the last micro-batch of each tower) -> features of each tower, then the shared tensors. The one call per step that goes
            through DistributedDataParallel, so that processes meet once; None: the towers, and ``shared``.
        autocast: makes the context of forward passes and of the loss.
    """

    def __init__(
        self,
        towers: Sequence[Callable[[Any], Features]],
        loss: Callable[..., Tensor],
        *,
        shared: Callable[[], Sequence[Tensor | None]] = tuple,
        together: Callable[..., Sequence[Features | None]] | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._towers, self._loss, self._shared, self._autocast = list(towers), loss, shared, autocast
        # The towers' last micro-batches come in one call: a wrapper such as DistributedDataParallel wants one forward for one backward.
        self._together = together or (lambda *last: (*(tower(x) for tower, x in zip(self._towers, last, strict=True)), *shared()))

    def backward(self, *batches: Sequence[Any], scale_loss: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
        """Add the gradients of the loss to those of the parameters.

        Args:
            batches: the micro-batches of each tower, at least one; their numbers may differ. One of each is a plain forward and backward.
            scale_loss: multiplies the loss before its backward (float16).

        Returns:
            The loss, 0-d, detached and not multiplied.

        Raises:
            ValueError: not as many lists as towers, or one is empty, or the loss is no single number.
            TypeError: a whole batch where its micro-batches are needed. RuntimeError: gradients are off.
        """
        for batch in batches:
            if isinstance(batch, Tensor | Packed):
                raise TypeError(f"GradCache: got a {type(batch).__name__}; give each tower a list of micro-batches (a tensor: x.split(32))")
        if not torch.is_grad_enabled():
            raise RuntimeError("GradCache: gradients are off (torch.no_grad), but backward computes them; call it outside")
        if len(batches) != len(self._towers) or not all(len(batch) for batch in batches):
            raise ValueError(f"GradCache: {[len(batch) for batch in batches]} micro-batches for {len(self._towers)} towers; "
                             "give each tower a list of at least one")
        last = [batch[-1] for batch in batches]
        # Nothing was split: the plain step, without a second forward.
        if all(len(batch) == 1 for batch in batches):
            with self._autocast():
                loss = _single(self._loss(*self._together(*last)))
            scale_loss(loss).backward()
            return loss.detach()

        def call(place: int, x: Any) -> Callable[[], dict[str, Tensor]]:
            return lambda: _named(place, self._towers[place](x))

        def last_of_all(found: Callable[[], Sequence[Features | None]]) -> Callable[[], dict[str, Tensor]]:
            # The last of all towers come together: through DistributedDataParallel processes meet once a step.
            return lambda: {name: output for place, features in enumerate(found()) if features is not None
                            for name, output in _named(place, features).items()}

        def objective(leaves: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
            sides: list[Any] = [[] for _ in range(len(self._towers) + len(self._shared()))]
            for name, leaf in leaves.items():
                place = int(name.partition(".")[0])
                sides[place].append(leaf if place < len(self._towers) else leaf.reshape(leaf.shape[1:]))
            arguments = [None if not side else side[0] if len(side) == 1 else tuple(side) for side in sides]
            return {"loss": _single(self._loss(*arguments))}, {}

        early = [call(place, x) for place, batch in enumerate(batches) for x in batch[:-1]]
        alone = last_of_all(lambda: (*(tower(x) for tower, x in zip(self._towers, last, strict=True)), *self._as_rows(self._shared())))
        through = last_of_all(lambda: self._rows_behind(self._together(*last)))
        losses, _ = cached_gradients([*early, alone], [*early, through], objective, autocast=self._autocast, scale_loss=scale_loss)
        return losses["loss"].detach()

    def _rows_behind(self, found: Sequence[Features | None]) -> Sequence[Features | None]:
        towers = len(self._towers)
        return (*found[:towers], *self._as_rows(found[towers:]))  # type: ignore[arg-type]

    @staticmethod
    def _as_rows(shared: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Scalars and other shared tensors as one row each, since outputs are laid end to end."""
        return [None if value is None else value[None] for value in shared]


def _named(place: int, features: Features) -> dict[str, Tensor]:
    return {f"{place}.{number}": output for number, output in enumerate(features if isinstance(features, tuple) else (features,))}


def _single(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ValueError(f"GradCache: the loss gave a {type(loss).__name__}; it must give one number, a 0-d tensor")
    if loss.numel() != 1:
        raise ValueError(f"GradCache: the loss gave a tensor of shape {tuple(loss.shape)}; it must give one number (its mean, or sum)")
    return loss
