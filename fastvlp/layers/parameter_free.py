"""Cross attention without weights of its own, each text token by the image tokens that concern it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp_kernels.packed import Packed, check_packed


class ParameterFreeAttention(nn.Module):
    """sum_j s_ij v_j with s_ij = <silu(x_i), silu(k_j)>, without the lowest scores of each text token (ADEM-VL,
    https://arxiv.org/abs/2410.17779).

    There is no softmax. Scores are held for all pairs of text and image tokens of one segment: [S, n, m].

    Args:
        drop: the share of the image tokens, rounded down, that each text token leaves out; of equal scores all stay.
    """

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"ParameterFreeAttention: drop is {drop}; it must be the share that is left out, from 0 to below 1")
        self.drop = drop

    def forward(self, texts: Packed, images: Packed, values: Tensor | None = None) -> Tensor:
        """What each text token takes from the picture of its segment, [Tt, C]; zeros without image tokens.

        Args:
            texts: [Tt, C]. images: the keys [Ti, C] of as many segments, features in the space of the text; ``images.size`` weighs them.
            values: [Ti, C]; None: the keys. (ADEM-VL adds one learned vector per layer to the keys and another to the values.)

        Raises:
            ValueError: there are not as many pictures as texts.
        """
        check_packed("ParameterFreeAttention", texts=texts, images=images)
        if len(texts) != len(images):
            raise ValueError(f"ParameterFreeAttention: got {len(texts)} texts and {len(images)} pictures; each text needs one")
        x, _ = texts.to_padded()
        k, real = images.to_padded()
        v, _ = images.replace(x=images.x if values is None else values).to_padded()
        scores = F.silu(x) @ F.silu(k).transpose(1, 2)
        if self.drop and images.total:
            dropped = torch.tensor([int(self.drop * n) for n in images.lengths.tolist()]).to(scores.device, non_blocking=True)
            ranked = scores.detach().masked_fill(~real[:, None], torch.inf).sort(2).values
            # The threshold is the smallest score that stays. No index of what is dropped is needed, and equal scores stay together.
            least = ranked.gather(2, dropped[:, None, None].expand(-1, scores.shape[1], 1))
            scores = scores * (scores >= least)
        if images.size is not None:
            scores = scores * images.replace(x=images.size).to_padded()[0][:, None].to(scores.dtype)
        return Packed.from_padded(scores @ v, texts.lengths).x
