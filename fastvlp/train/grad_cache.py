"""The gradient of a whole contrastive batch, with the activations of one micro-batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastvlp.train.gradients import random_state, set_random_state
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
        if all(len(batch) == 1 for batch in batches):
            with self._autocast():
                loss = _single(self._loss(*self._together(*last)))
            scale_loss(loss).backward()
            return loss.detach()

        # The last of all towers come last, since `together` draws their random numbers in one go.
        order = [(tower, x) for tower, batch in enumerate(batches) for x in batch[:-1]] + list(enumerate(last))
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in batches]
        states = []
        with torch.no_grad(), self._autocast():
            for tower, x in order:
                states.append(random_state())
                parts[tower].append(_several(self._towers[tower](x)))
            shared = [None if tensor is None else tensor.detach().requires_grad_() for tensor in self._shared()]
        whole = [tuple(torch.cat(pieces) for pieces in zip(*found, strict=True)) for found in parts]
        for tensor in (tensor for tensors in whole for tensor in tensors if tensor.is_floating_point()):
            tensor.requires_grad_()
        with self._autocast():
            loss = _single(self._loss(*(tensors[0] if len(tensors) == 1 else tensors for tensors in whole), *shared))
        scale_loss(loss).backward()

        gradients = [_share_out(tensors, found) for tensors, found in zip(whole, parts, strict=True)]
        del whole, parts
        after = random_state()
        for (tower, x), state in zip(order[: -len(batches)], states, strict=False):
            set_random_state(state)
            with self._autocast():
                features = self._towers[tower](x)
            _backward(_several(features), gradients[tower].pop(0))
        set_random_state(states[-len(batches)])
        with self._autocast():
            found = self._together(*last)
        of_last = [gradient for gradients_of_tower in gradients for gradient in gradients_of_tower[0]]
        of_shared = [None if tensor is None else _gradient(tensor) for tensor in shared]
        outputs = [output for features in found for output in ([None] if features is None else _several(features))]
        _backward(outputs, [*of_last, *of_shared])
        set_random_state(after)
        return loss.detach()


def _single(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ValueError(f"GradCache: the loss gave a {type(loss).__name__}; it must give one number, a 0-d tensor")
    if loss.numel() != 1:
        raise ValueError(f"GradCache: the loss gave a tensor of shape {tuple(loss.shape)}; it must give one number (its mean, or sum)")
    return loss


def _several(features: Features) -> tuple[Tensor, ...]:
    return features if isinstance(features, tuple) else (features,)


def _share_out(whole: Sequence[Tensor], parts: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor | None]]:
    """The gradients of what each micro-batch gave; None of integers."""
    columns = [_gradient(tensor).split([len(part[place]) for part in parts]) if tensor.is_floating_point() else [None] * len(parts)
               for place, tensor in enumerate(whole)]
    return [list(row) for row in zip(*columns, strict=True)]


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _backward(outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Backward of the outputs that carry a graph; a frozen tower has none."""
    pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if output is not None and output.requires_grad]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
