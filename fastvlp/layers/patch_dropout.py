"""Dropping tokens at random in training: PatchDropout, FLIP."""

import torch
from torch import Tensor, nn

from fastvlp_kernels import token_select
from fastvlp_kernels._check import plain_tensors


def patch_dropout(x: Tensor, prob: float, num_prefix_tokens: int, ordered: bool = False) -> tuple[Tensor, Tensor]:
    """Keep max(1, int(L * (1 - prob))) random tokens of the L after the prefix of each row.

    Args:
        x: [B, N, C].

    Returns:
        The prefix and the kept tokens [B, N', C], and which they are: int64 [B, L'], counted after the prefix, ascending if ``ordered``.

    Raises:
        ValueError: there is nothing after the prefix. TypeError: ``x`` is no dense tensor.
    """
    plain_tensors("PatchDropout", x=x)
    rows, tokens = x.shape[:2]
    patches = tokens - num_prefix_tokens
    if patches < 1:
        raise ValueError(f"PatchDropout: x has {tokens} tokens, {num_prefix_tokens} of them prefix; at least one other is needed")
    kept = max(1, int(patches * (1 - prob)))
    # The highest of independent random scores are a random subset of fixed size, drawn for all rows at once and without asking the device.
    scores = torch.rand(rows, patches, device=x.device)
    if not ordered:
        keep = scores.topk(kept, dim=1).indices
    else:
        starts = torch.arange(0, rows * patches + 1, patches, dtype=torch.int32, device=x.device)
        lengths = torch.full((rows,), patches)
        selection = token_select(scores.flatten(), starts, kept, lengths=lengths, total=rows * kept)
        keep = selection.index.unflatten(0, (rows, kept)) - starts[:-1, None]
    # Class and register tokens come first and always stay.
    prefix = torch.arange(num_prefix_tokens, device=x.device).expand(rows, -1)
    index = torch.cat((prefix, keep + num_prefix_tokens), 1)
    places = (index + torch.arange(rows, device=x.device)[:, None] * tokens).flatten()
    # Not x[rows, index]: its backward would sort the indices to add up rows, and here each row is taken at most once.
    taken = torch.ops.fastvlp.token_take(x.flatten(0, 1), places)
    return taken.unflatten(0, index.shape), keep


class _Dropout(nn.Module):
    """What timm's two dropouts share: their arguments, and which tokens stay."""

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False) -> None:
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"PatchDropout: prob is {prob}; it must be the share that is dropped, from 0 to below 1")
        self.prob, self.num_prefix_tokens, self.ordered = prob, num_prefix_tokens, ordered

    def _drop(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.training or self.prob == 0:
            return x, None
        return patch_dropout(x, self.prob, self.num_prefix_tokens, self.ordered)


class PatchDropoutWithIndices(_Dropout):
    """timm's PatchDropoutWithIndices: in training, random tokens of each row stay (https://arxiv.org/abs/2212.00794).

    Args:
        prob: the share that is dropped, from 0 to below 1. At least one token stays.
        num_prefix_tokens: leading tokens (class, registers) that always stay. ordered: the kept tokens keep their order.

    Raises:
        ValueError: ``prob`` is no such share.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, N, C] -> [B, N', C], and the kept places int64 [B, L'] after the prefix; ``x`` and None in eval mode."""
        return self._drop(x)


class PatchDropout(_Dropout):
    """timm's PatchDropout: the tokens of :class:`PatchDropoutWithIndices`, whose arguments it has, alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N', C]; ``x`` in eval mode."""
        return self._drop(x)[0]
