"""The contrastive and the captioning loss of CoCa."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlp_kernels import _check, _inputs

from .across.group import Group
from .clip import ClipLoss


class CoCaLoss(ClipLoss):
    """CLIP's loss and the cross-entropy of each caption token, each with its weight (Yu et al. 2022, arXiv:2205.01917).

    Arguments and call of ``open_clip.CoCaLoss`` 3.3. The mean of the captions is over the tokens of the whole batch, where open_clip
    averages the processes' means. Without tokens it is 0. With ``clip_loss_weight=0`` features and scale have gradient 0, not none, which
    DDP would refuse.

    Args:
        pad_id: label that is not counted. The others, and what is raised: as in :class:`ClipLoss`.
    """

    name = "CoCaLoss"

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        strategy: str = "gather",
        node_size: int | None = None,
        group: Group = None,
        stash_bytes: int = 0,
    ) -> None:
        super().__init__(
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
            strategy=strategy,
            node_size=node_size,
            group=group,
            stash_bytes=stash_bytes,
        )
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.pad_id = pad_id

    def _settings(self) -> dict[str, object]:
        weights = {"caption_loss_weight": self.caption_loss_weight, "clip_loss_weight": self.clip_loss_weight, "pad_id": self.pad_id}
        return super()._settings() | weights

    def forward(  # type: ignore[override]  # as in open_clip, a ClipLoss that is called with captions too
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
        *,
        local_sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """This process's shares of both losses, 0-d, float32 (float64 for float64), already weighted.

        Args:
            logits: [b, L, V] of the next token. labels: [b, L] integers below V, or ``pad_id``; on CUDA another one ends in PyTorch's
                assertion.
            output_dict: ``{"contrastive_loss": ..., "caption_loss": ...}`` instead of both. The others: as in :class:`ClipLoss`.

        Raises:
            TypeError, ValueError, RuntimeError: as there; or logits and labels do not fit.
        """
        try:
            self._check_captions(image_features, logits, labels)
        except (TypeError, ValueError):
            # The others may be waiting for this process's numbers.
            self._tell_refusal(local_sizes)
            raise
        if self.clip_loss_weight:
            loss = super().forward(image_features, text_features, logit_scale, local_sizes=local_sizes)
            assert isinstance(loss, Tensor)
            contrastive = self.clip_loss_weight * loss
        else:
            # With weight 0 the inputs are checked all the same, and every parameter gets a gradient of 0, for which DDP would wait.
            self._given(image_features, text_features, logit_scale, None, local_sizes)
            parts = (image_features, text_features, torch.as_tensor(logit_scale, device=logits.device).reshape(-1))
            contrastive = torch.stack([part[:0].sum(dtype=_inputs.sum_dtype(part.dtype)) for part in parts]).sum()
        caption = self.caption_loss_weight * self._captions(logits, labels)
        return {"contrastive_loss": contrastive, "caption_loss": caption} if output_dict else (contrastive, caption)

    def _check_captions(self, image: Tensor, logits: Tensor, labels: Tensor) -> None:
        _check.plain_tensors(self.name, logits=logits, labels=labels)
        if not logits.is_floating_point() or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{self.name}: logits are {logits.dtype} and labels {labels.dtype}; they must be floating point and integers")
        if logits.ndim != 3 or logits.shape[:2] != labels.shape or logits.shape[:1] != image.shape[:1]:
            got = f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}"
            raise ValueError(f"{self.name}: {got} for {image.shape[0]} pairs; they must be [b, L, V] and [b, L], b the number of pairs")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = labels[(labels != self.pad_id) & ((labels < 0) | (labels >= logits.shape[2]))]
            if len(wrong):
                raise ValueError(f"{self.name}: a label is {wrong[0]}; allowed: 0 to {logits.shape[2] - 1}, and pad_id, {self.pad_id}")

    def _captions(self, logits: Tensor, labels: Tensor) -> Tensor:
        """This process's share of the mean over the tokens of all processes."""
        # Widened, since a sum over a whole vocabulary loses too many digits in 16 bits.
        wide = logits.flatten(0, 1).to(_inputs.sum_dtype(logits.dtype))
        total = F.cross_entropy(wide, labels.flatten().long(), ignore_index=self.pad_id, reduction="sum")
        tokens, members = (labels != self.pad_id).sum(), self._members()
        # A collective: processes without tokens take part as well.
        if members.size > 1:
            tokens = members.gather(tokens).sum()
        # DDP divides by the number of processes; captions differ in length, so the mean is over all tokens and not of means.
        return total * members.size / tokens.clamp(min=1)
