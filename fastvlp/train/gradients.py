"""The gradients of one step of any system: accumulation where nothing compares samples, GradCache where something does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastvlp._schema import ConfigError
from fastvlp.data.batch import Batch, take_samples
from fastvlp.systems.system import Losses, Outputs, System
from fastvlp.train.spans import BACKWARD, FORWARD, span
from fastvlp_kernels.packed import Packed

Parts = Sequence[Tensor]  # int64 rows of each micro-batch
Autocast = Callable[[], AbstractContextManager]
ScaleLoss = Callable[[Tensor], Tensor]
Encode = Callable[[], Outputs]


def gradients(system: System, whole: Batch, parts: Parts, *, autocast: Autocast = nullcontext,
              scale_loss: ScaleLoss = lambda loss: loss) -> tuple[Losses, Outputs]:
    """Add the gradients of the whole batch to those of the parameters, with the activations of one micro-batch in memory at a time.

    One part is a plain forward and backward. Where the system compares nothing, parts accumulate. Where it does, what ``encode`` gives
    for every part comes first, without gradient, then the objective over all of it, then each part once more with its share of the
    objective's gradient, and with the same random numbers (GradCache, Gao et al. 2021, arXiv:2101.06983).

    Args:
        whole: all samples of this process, on the system's device. parts: their rows, micro-batch by micro-batch; as many parts on every
            process, since sharded parameters are gathered by all at once.
        autocast: makes the context of forward passes and of the objective. scale_loss: multiplies the loss before backward (float16).

    Returns:
        The loss terms of this process, detached, and what ``encode`` gave, detached, in the order of ``whole``.

    Raises:
        ConfigError: the system has neither an objective nor losses, or what one of its halves returns is of another kind or shape.
    """
    # Everything at once needs no second forward, whatever the objective compares.
    if len(parts) == 1:
        with span(FORWARD), autocast():
            out = encoded(system, whole)
            losses = terms(system, out, whole)
        _backward(losses, scale_loss)
        return _detached_terms(losses), detached(out)
    step = _cached if system.compares else _accumulated
    return step(system, whole, parts, autocast, scale_loss)


def _accumulated(system: System, whole: Batch, parts: Parts, autocast: Autocast, scale_loss: ScaleLoss) -> tuple[Losses, Outputs]:
    losses: Losses = {}
    outs = []
    for number, rows in enumerate(parts):
        part = whole.take(rows)
        _reduce_gradients(system, number == len(parts) - 1)
        with span(FORWARD), autocast():
            out = encoded(system, part)
            found = terms(system, out, part)
        _backward(found, scale_loss)
        losses = {name: value + losses[name] if name in losses else value for name, value in _detached_terms(found).items()}
        outs.append(detached(out))
    return losses, _in_order(_end_to_end(outs), parts, len(whole))


def _cached(system: System, whole: Batch, parts: Parts, autocast: Autocast, scale_loss: ScaleLoss) -> tuple[Losses, Outputs]:
    def objective(leaves: Outputs) -> tuple[Losses, Outputs]:
        joined = _in_order(leaves, parts, len(whole))
        return terms(system, joined, whole), joined

    def call(number: int) -> Encode:
        def encode() -> Outputs:
            if torch.is_grad_enabled():
                _reduce_gradients(system, number == len(parts) - 1)
            return encoded(system, whole.take(parts[number]))

        return encode

    calls = [call(number) for number in range(len(parts))]
    _reduce_gradients(system, False)
    losses, joined = cached_gradients(calls, calls, objective, autocast=autocast, scale_loss=scale_loss)
    return _detached_terms(losses), detached(joined)


def cached_gradients(first: Sequence[Encode], second: Sequence[Encode], objective: Callable[[Outputs], tuple[Losses, Outputs]], *,
                     autocast: Autocast = nullcontext, scale_loss: ScaleLoss = lambda loss: loss) -> tuple[Losses, Outputs]:
    """GradCache: outputs of all calls without a graph, the objective's gradient for them, then each call once more with its share of it.

    Args:
        first, second: the calls, without and with gradients; pairs of them give the same. Outputs of one name are laid end to end.
        objective: (outputs of all calls) -> loss terms, and what to hand on.

    Returns:
        What ``objective`` gave.
    """
    states, outs = [], []
    with span(FORWARD), torch.no_grad(), autocast():
        for encode in first:
            # The second forward has to drop the same patches and weights as the first.
            states.append(random_state())
            outs.append(detached(encode()))
    after = random_state()
    counts = {name: [len(tensor(out[name])) if name in out else 0 for out in outs] for name in _names(outs)}
    # What the objective sees are leaves of its own graph: its backward stops here, at the outputs, with their gradients.
    leaves = _end_to_end(outs)
    del outs
    for value in leaves.values():
        if tensor(value).is_floating_point():
            tensor(value).requires_grad_()
    with span(FORWARD), autocast():
        losses, found = objective(leaves)
    _backward(losses, scale_loss)

    # What the objective leaves out has a gradient of zeros: DistributedDataParallel waits for one of every parameter.
    shares = {name: (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).split(counts[name])
              for name, value in leaves.items() if (leaf := tensor(value)).is_floating_point()}
    for number, (encode, state) in enumerate(zip(second, states, strict=True)):
        set_random_state(state)
        with span(FORWARD), autocast():
            out = encode()
        pairs = [(tensor(out[name]), share[number]) for name, share in shares.items() if name in out and tensor(out[name]).requires_grad]
        if pairs:
            with span(BACKWARD):
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
    # As if each part had been encoded once: what is drawn next does not depend on the number of micro-batches.
    set_random_state(after)
    return losses, found


def encoded(system: System, batch: Batch) -> Outputs:
    """What ``encode`` gives, which has to have names and a row a sample.

    Raises:
        ConfigError: it has not.
    """
    out, name = system.encode(batch), _class_name(system)
    if not isinstance(out, Mapping):
        raise ConfigError(f"{name}.encode returns {type(out).__name__}; outputs have names: return {{'image': ..., 'colour_loss': ...}}")
    for key, value in out.items():
        if not isinstance(value, Tensor | Packed):
            raise ConfigError(f"{name}.encode: {key} is {type(value).__name__}; a tensor with a row a sample, or Packed tokens, is needed")
        if key.endswith("_loss") and (isinstance(value, Packed) or value.shape != (len(batch),)):
            got = "Packed" if isinstance(value, Packed) else tuple(value.shape)  # of another length, it would be summed into a wrong number
            raise ConfigError(f"{name}.encode: {key} is {got}; a *_loss is one number a sample, here [{len(batch)}]")
    return out


def terms(system: System, out: Outputs, batch: Batch) -> Losses:
    """The objective's terms, each of them one number.

    Raises:
        ConfigError: there are none, or they are something else.
    """
    losses, name = system.objective(out, batch), _class_name(system)
    if not isinstance(losses, Mapping):
        raise ConfigError(f"{name}.objective returns {type(losses).__name__}; terms have names: return {{'contrastive': ...}}")
    for key, value in losses.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{name}.objective: {key} is {got}; a term is a tensor of one number, such as a mean over samples")
    if not losses:
        raise ConfigError(f"{name} has nothing to train on: encode gives {', '.join(out) or 'nothing'}; name an output "
                          "*_loss (one number a sample), or write an objective")
    return losses


def _class_name(system: System) -> str:
    return type(system).__name__.removeprefix("FSDP")  # which wrapping puts before it


def _backward(losses: Losses, scale_loss: ScaleLoss) -> None:
    loss = sum(value.reshape(()) for value in losses.values())
    if isinstance(loss, Tensor) and loss.requires_grad:  # a system whose trainable parts took no part in this batch has no graph
        with span(BACKWARD):
            scale_loss(loss).backward()


def _reduce_gradients(system: nn.Module, now: bool) -> None:
    """Gradients are reduced over processes by the last backward of a step alone."""
    if isinstance(system, FSDPModule):
        system.set_requires_gradient_sync(now)
        system.set_is_last_backward(now)


def tensor(value: Tensor | Packed) -> Tensor:
    """The tensor of an output: the tokens of a packed one."""
    return value.x if isinstance(value, Packed) else value


def detached(out: Outputs) -> Outputs:
    """Outputs without a graph."""
    return {name: value.replace(x=value.x.detach()) if isinstance(value, Packed) else value.detach() for name, value in out.items()}


def _detached_terms(losses: Losses) -> Losses:
    return {name: value.detach().reshape(()) for name, value in losses.items()}


def _names(outs: Sequence[Outputs]) -> list[str]:
    return list({name: None for out in outs for name in out})


def _end_to_end(outs: Sequence[Outputs]) -> Outputs:
    """The outputs of all parts, part after part."""
    columns = {name: [out[name] for out in outs if name in out] for name in _names(outs)}
    return {name: Packed.cat(values) if isinstance(values[0], Packed) else torch.cat(values) for name, values in columns.items()}


def _in_order(outs: Outputs, parts: Parts, samples: int) -> Outputs:
    """A row a sample in the order of the batch."""
    # Parts were balanced by cost, so that their rows are not in the order of the batch.
    order = torch.cat(list(parts)).argsort()
    return {name: take_samples(value, order, samples) for name, value in outs.items()}


def random_state() -> list[Tensor]:
    """Of the generators that a forward pass draws from: the CPU's and, where CUDA is in use, its current device's."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def set_random_state(state: Sequence[Tensor]) -> None:
    """Put the generators back where ``random_state`` found them."""
    torch.set_rng_state(state[0])
    for of_device in state[1:]:
        torch.cuda.set_rng_state(of_device)
