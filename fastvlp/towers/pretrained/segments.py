"""Others' transformer blocks over packed tokens: they get one row of all tokens, and where their attention mask goes, the segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed

TRANSFORMERS = "fastvlp_packed"  # the name of our function among the attention functions of transformers


@dataclass(frozen=True)
class Segments:
    """Who sees whom: tokens see those of their own segment, and if ``causal`` none that come later.

    It goes through blocks as an argument, and not by the side, so that recomputing a block (checkpointing) has the right one.
    """

    cu_seqlens: Tensor
    lengths: Tensor
    max_seqlen: int
    causal: bool = False

    @classmethod
    def of(cls, packed: Packed, causal: bool = False) -> Segments:
        """Those of ``packed``."""
        return cls(packed.cu_seqlens, packed.lengths, packed.max_seqlen, causal)

    def to(self, *_: Any) -> Segments:
        """Itself: open_clip's blocks cast their mask."""
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool | None = None,
               dropout: float = 0.0) -> Tensor:
        """q [T, H, d], k and v [T, Hkv, d] -> [T, H, d]. ``dropout``: of attention weights, has to be 0."""
        if dropout:
            raise ValueError(f"this pretrained tower drops attention weights in training (p={dropout}), which packed attention does not; "
                             "build it with that dropout at 0, or freeze it")
        causal = self.causal if causal is None else causal
        out = packed_attention(q, k, v, self.cu_seqlens, max_seqlen_q=self.max_seqlen, causal=causal, scale=scale, lengths=self.lengths)
        return cast(Tensor, out)


class TimmAttention(nn.Module):
    """timm's ``Attention`` (in ``inner``) inside segments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, x: Tensor, attn_mask: Segments, is_causal: bool = False) -> Tensor:
        """x [1, T, C] -> [1, T, C]."""
        a = self.inner
        q, k, v = a.qkv(x[0]).unflatten(-1, (3, a.num_heads, a.head_dim)).unbind(1)
        out = attn_mask.attend(a.q_norm(q), a.k_norm(k), v, dropout=a.attn_drop.p if self.training else 0.0).flatten(1)
        out = a.norm(out)
        if a.gate is not None:
            out = out * a.gate(x[0]).sigmoid()
        projected: Tensor = a.proj_drop(a.proj(out))
        return projected[None]


class OpenClipAttention(nn.Module):
    """The attention of open_clip's blocks, PyTorch's or its own (in ``inner``), inside segments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Segments, **__: Any) -> Any:
        """x [1, T, C] -> [1, T, C], in a pair where PyTorch's attention gives one."""
        a = self.inner
        plain = isinstance(a, nn.MultiheadAttention)
        q, k, v = F.linear(x[0], a.in_proj_weight, a.in_proj_bias).unflatten(-1, (3, a.num_heads, -1)).unbind(1)
        if plain:
            return a.out_proj(attn_mask.attend(q, k, v, dropout=a.dropout if self.training else 0.0).flatten(1))[None], None
        out = attn_mask.attend(a.ln_q(q), a.ln_k(k), v, dropout=a.attn_drop.p if self.training else 0.0)
        if a.head_scale is not None:
            out = out * a.head_scale.view(-1, 1)
        return a.out_drop(a.out_proj(a.ln_inner(out.flatten(1))))[None]


def attention_of_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, dropout: float = 0.0,
    is_causal: bool | None = None, fastvlp_segments: Segments | None = None, **options: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers registers them: [1, H, T, d] -> [1, T, H, d].

    Segments come as the mask, or where models make a mask of their own, as a keyword that they pass on.
    """
    if isinstance(attention_mask, Segments):
        fastvlp_segments = attention_mask
    if fastvlp_segments is None:
        raise RuntimeError(f"this {type(module).__name__} belongs to a fastvlp tower, which gives it packed tokens; call the tower, or use "
                           "model.set_attn_implementation('sdpa') to call the model itself")
    window = options.get("sliding_window")
    if window is not None and window < fastvlp_segments.max_seqlen:
        raise ValueError(f"this {type(module).__name__} sees {window} tokens at a time, not {fastvlp_segments.max_seqlen}; cut texts there")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"this {type(module).__name__} attends with {name}, which packed attention has not; use packed=False")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return fastvlp_segments.attend(q, k, v, scale=scaling, causal=causal, dropout=dropout)[None], None


def segment_maximum(values: Tensor, packed: Packed) -> Tensor:
    """The largest of ``values`` [T, n] in each segment: [S, n]; 0 for an empty one."""
    counts = packed.lengths.to(values.device, non_blocking=True)
    owner = torch.arange(len(packed), device=values.device).repeat_interleave(counts, output_size=packed.total)
    # The zeros take part, too: rows and columns are not negative, and an empty segment has 0.
    return values.new_zeros(len(packed), values.shape[1]).scatter_reduce(0, owner[:, None].expand_as(values), values, "amax")
