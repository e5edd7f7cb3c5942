"""What a paper proposes: its modules, what it computes for a sample, and what it asks of a batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvlp.data.batch import Batch
from fastvlp_kernels.packed import Packed

Outputs = Mapping[str, Any]  # tensors, or Packed
Losses = dict[str, Tensor]
if TYPE_CHECKING:
    Part = Any  # what a part has beside forward (width, embed, ...) is known where it is made
else:
    Part = nn.Module


class System(nn.Module):
    """A trainable system in two halves: ``encode`` sees some samples and nothing of the others, ``objective`` compares samples.

    Whatever is a mean over samples or tokens is a ``*_loss`` of ``encode``, one number a sample. Whatever compares samples belongs in
    ``objective``. So the engine can run ``encode`` on micro-batches, packed, replicated or sharded, and needs a second forward
    (GradCache) only where something is compared. A system must not draw random numbers in ``objective``.
    """

    def encode(self, batch: Batch) -> Outputs:
        """What each of some samples gives: tensors [n, ...] with a row a sample, or ``Packed`` with the same number of segments for each.

        Names that end in ``_loss`` are losses: [n], one number a sample, already weighted.
        """
        raise NotImplementedError

    def objective(self, out: Outputs, batch: Batch) -> Losses:
        """Loss terms of this process, already weighted; the mean of their sum over processes is the loss of the whole batch.

        ``out`` is what ``encode`` gave for all samples of this process, in the order of ``batch``. Without an objective of its own, a
        system has the means of its ``*_loss`` outputs.
        """
        return self.means(out, batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        """What means divide by when it is not samples: this process's number of target words, hidden words, patches.

        Called on the CPU before the step; ``batch.counts`` then holds the sums over all processes.
        """
        return {}

    def after_step(self, out: Outputs, batch: Batch) -> None:
        """What follows the optimizer's step: queues, running means. Momentum copies and scales look after themselves."""

    def before_episode(self, features: Outputs) -> None:
        """Every ``train.episode`` steps: what ``episode`` gave for the whole training set (prototypes, mined negatives)."""

    def weights_from(self, theirs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Another system's weights (``run.start``) under the names that they have here; one that takes parts of another apart says so."""
        return theirs

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...

    @property
    def compares(self) -> bool:
        """Whether samples are compared, so that micro-batches need a second forward."""
        # The default objective only takes means of what ``encode`` gave, which micro-batches can add up.
        return type(self).objective is not System.objective

    @staticmethod
    def means(out: Outputs, batch: Batch) -> Losses:
        """This process's share of the mean of each ``*_loss`` over all samples of all processes."""
        # Divided by all samples and not by this process's: processes may hold different numbers, and DDP divides by ``world`` once more.
        return {name: value.sum() * (batch.world / batch.total) for name, value in out.items()
                if name.endswith("_loss") and isinstance(value, Tensor)}

    def train(self, mode: bool = True) -> System:
        """Frozen parts stay in evaluation mode: no dropout, no running statistics."""
        super().train(mode)
        for module in self.modules():
            # ``freeze`` leaves this mark; requires_grad alone would also be False of parts that a stage freezes for a while.
            if getattr(module, "_frozen", False):
                for part in module.modules():
                    part.training = False
        return self

    # What evaluators and users ask for: a system has what it can. ``fields`` and ``tokenizer`` are set where a recipe is built or loaded.

    fields: Mapping[str, Any] = {}
    tokenizer: Any = None

    def encode_image(self, images: Any) -> Tensor:
        """Unit features [n, D] of pictures: a list of PIL images, uint8 [h, w, 3], float [3, h, w] in 0..1 or paths; or packed patches."""
        return self.embed_image(self.prepared("image", images))

    def encode_text(self, texts: Any) -> Tensor:
        """Unit features [n, D] of a list of strings, or of packed token ids."""
        return self.embed_text(self.prepared("text", texts))

    def prepared(self, stream: str, raw: Any) -> Any:
        """Raw pictures or captions as the stream of that name, on the system's device."""
        if not isinstance(raw, Tensor | Packed):
            if isinstance(raw, str):
                raise TypeError("encode_text: got one string; pass a list of strings")
            if stream not in self.fields:
                raise ValueError(f"{type(self).__name__} has no field {stream!r} to prepare raw input with; load it from a run "
                                 f"(fastvlp.load), set system.fields = {{{stream!r}: ...}}, or pass packed tokens")
            raw = self.fields[stream].prepare(raw)
        return raw.to(next(self.parameters()).device)

    def embed_image(self, images: Any) -> Tensor:
        """Unit features [n, D] of the stream ``image``."""
        raise NotImplementedError(f"{type(self).__name__} has no embed_image; it gives no features of a picture alone")

    def embed_text(self, texts: Any) -> Tensor:
        """Unit features [n, D] of the stream ``text``."""
        raise NotImplementedError(f"{type(self).__name__} has no embed_text; it gives no features of a caption alone")

    def score(self, images: Any, texts: Any) -> Tensor:
        """How well picture i and caption i belong together: [n], larger is better."""
        raise NotImplementedError(f"{type(self).__name__} has no score; it does not judge pairs")

    def caption_nll(self, images: Any, texts: Any) -> Tensor:
        """The negative log-likelihood of caption i given picture i, in nats, summed over its words: [n]."""
        raise NotImplementedError(f"{type(self).__name__} has no caption_nll; it does not predict captions")

    def caption_hits(self, images: Any, texts: Any) -> Tensor:
        """How many tokens of caption i are the likeliest one given picture i and the tokens before: int64 [n]."""
        raise NotImplementedError(f"{type(self).__name__} has no caption_hits; it does not predict captions")

    def generate(self, images: Any, **options: Any) -> list[list[int]]:
        """Token ids of a caption for each picture."""
        raise NotImplementedError(f"{type(self).__name__} has no generate; it writes no captions")


class Scale(nn.Module):
    """The learnable scale of similarities, and a bias where the loss has one.

    Parameters have the shape [1], since FSDP2 shards dimension 0. After each step the scale is brought back into [1, ``largest``].

    Args:
        init: the scale at the start (CLIP: 1 / 0.07; SigLIP: 10). bias: at the start, or None for no bias (SigLIP: -10).
    """

    def __init__(self, init: float = 1 / 0.07, largest: float = 100.0, bias: float | None = None) -> None:
        super().__init__()
        if not 0 < init <= largest:
            raise ValueError(f"Scale: init is {init} and largest is {largest}; 0 < init <= largest is needed")
        # The logarithm is learned: the scale stays positive, and a step changes it in proportion.
        self.log_scale: Tensor = nn.Parameter(torch.tensor([math.log(init)]))
        self.bias = None if bias is None else nn.Parameter(torch.tensor([float(bias)]))
        self.largest = largest

    def forward(self) -> tuple[Tensor, ...]:
        """(scale,) or (scale, bias), each [1]: what a loss takes after the features."""
        scale = self.log_scale.exp()
        return (scale,) if self.bias is None else (scale, self.bias)

    @torch.no_grad()
    def follow(self) -> None:
        """After the optimizer's step: bring the scale back into its bounds."""
        # Here and not in ``forward``, where a clamp would leave a scale beyond its bound without gradient.
        self.log_scale.clamp_(0.0, math.log(self.largest))


class Momentum(nn.Module):
    """A copy of a module that follows it after every step, without gradient: copy <- m * copy + (1 - m) * module (MoCo, BYOL, BriVL).

    The copy is part of the system's state, and is sharded as its module is. Of 16-bit weights the running average is kept in float32.

    Args:
        of: what it follows; not a child of this module, so that its parameters are counted once.
        momentum: m, from 0 to 1.
    """

    def __init__(self, of: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"Momentum: momentum is {momentum}; it lies between 0 and 1")
        self.copy, self.momentum = freeze(copy.deepcopy(of)), momentum
        # Not as a submodule: its weights belong to the system already and would be saved and trained twice.
        self.__dict__["of"] = of
        sixteen = [p for p in self.copy.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        for number, parameter in enumerate(sixteen):
            # Buffers, so that checkpoints hold them.
            self.register_buffer(f"average_{number}", parameter.detach().float().clone())
        self._sixteen = len(sixteen)

    @torch.no_grad()
    def forward(self, *args: Any, **keywords: Any) -> Any:
        """What the copy gives."""
        return self.copy(*args, **keywords)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the copy towards its module."""
        averages = iter([getattr(self, f"average_{number}") for number in range(self._sixteen)])
        for mine, theirs in zip(self.copy.parameters(), self.__dict__["of"].parameters(), strict=True):
            if mine.dtype in (torch.float16, torch.bfloat16):
                average = next(averages)
                # In 16 bits a step of 1 - momentum is mostly rounded away.
                mine.copy_(average.lerp_(theirs.float(), 1 - self.momentum))
            else:
                mine.lerp_(theirs, 1 - self.momentum)
        for mine, theirs in zip(self.copy.buffers(), self.__dict__["of"].buffers(), strict=True):
            mine.copy_(theirs)


def freeze(module: nn.Module) -> Any:
    """Take a part out of training for good: no gradients, and evaluation mode whatever its system is in. Returns it."""
    module.requires_grad_(False)
    for part in module.modules():
        part.training = False
    module._frozen = True  # type: ignore[assignment]  # a plain mark, which survives deepcopy
    return module
