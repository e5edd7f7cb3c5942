"""The Q-Former of BLIP-2: learned queries that read image tokens through cross-attention in every other layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp.layers.token_merger import even_segments
from fastvlp_kernels import packed_attention
from fastvlp_kernels.packed import Packed, check_packed


class _Output(nn.Module):
    """LayerNorm(residual + dense(x)), BERT's."""

    def __init__(self, fan_in: int, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(fan_in, width), nn.LayerNorm(width, eps), nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return cast(Tensor, self.LayerNorm(residual + self.dropout(self.dense(x))))


def _attention(width: int, source: int, eps: float, dropout: float) -> nn.ModuleDict:
    projections = nn.ModuleDict({"query": nn.Linear(width, width), "key": nn.Linear(source, width), "value": nn.Linear(source, width)})
    return nn.ModuleDict({"self": projections, "output": _Output(width, width, eps, dropout)})


class QFormer(nn.Module):
    """BLIP-2's Q-Former (https://arxiv.org/abs/2301.12597) for its queries, under LAVIS's state-dict keys (``bert.encoder.layer.0...``).

    The keys and values of all cross-attentions are one matrix product of the image tokens, which are most of its work (257 tokens of width
    1408 against 32 queries). Image tokens come packed: images of any numbers of tokens, without padding; merged ones weigh as many patches
    as they stand for. It has no text branch: load LAVIS's weights with ``strict=False`` where they include one. ``dropout`` acts on
    outputs, not on attention weights.

    Args:
        encoder_width: of the image tokens. hidden_size: of the queries, a multiple of ``num_heads``.
        cross_attention_freq: layers 0, freq, 2 freq, ... have a cross-attention.
    """

    def __init__(
        self,
        encoder_width: int = 1408,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        cross_attention_freq: int = 2,
        layer_norm_eps: float = 1e-12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"QFormer: hidden_size {hidden_size} with {num_heads} heads; the heads must divide the width")
        if cross_attention_freq < 1:
            raise ValueError(f"QFormer: cross_attention_freq={cross_attention_freq}; it must be 1 (every layer has one) or more")
        self.num_heads, self.encoder_width, self.hidden_size = num_heads, encoder_width, hidden_size
        # Nested ModuleDicts under these names give LAVIS's state-dict keys without its classes.
        layers = nn.ModuleList()
        for place in range(num_layers):
            layer = nn.ModuleDict({"attention": _attention(hidden_size, hidden_size, layer_norm_eps, dropout)})
            if place % cross_attention_freq == 0:
                layer["crossattention"] = _attention(hidden_size, encoder_width, layer_norm_eps, dropout)
            layer["intermediate_query"] = nn.ModuleDict({"dense": nn.Linear(hidden_size, intermediate_size)})
            layer["output_query"] = _Output(intermediate_size, hidden_size, layer_norm_eps, dropout)
            layers.append(layer)
        embeddings = nn.ModuleDict({"LayerNorm": nn.LayerNorm(hidden_size, layer_norm_eps), "dropout": nn.Dropout(dropout)})
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers})})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, query_embeds: Tensor, images: Packed | Tensor) -> Tensor:
        """Queries [Q, C], [1, Q, C] or [B, Q, C], and image tokens packed [T, encoder_width] or [B, N, encoder_width]: [B, Q, C].

        Raises:
            ValueError: there are other numbers of images than of queries' rows, or of another width.
        """
        images = images if isinstance(images, Packed) else Packed.from_padded(images)
        check_packed("QFormer", self.encoder_width, images=images)
        rows = query_embeds if query_embeds.ndim == 3 else query_embeds[None]
        if rows.shape[0] not in (1, len(images)) or rows.shape[2:] != (self.hidden_size,):
            raise ValueError(
                f"QFormer: queries {tuple(query_embeds.shape)} for {len(images)} images; they must be [Q, {self.hidden_size}], the same for"
                " all, or one such row for each"
            )
        embeddings = cast(nn.ModuleDict, self.bert["embeddings"])
        x = embeddings["dropout"](embeddings["LayerNorm"](rows)).expand(len(images), -1, -1)
        # Every image has as many queries; its tokens are ragged.
        starts, lengths = even_segments(len(images), x.shape[1], x.device)
        keys_and_values = iter(self._keys_and_values(images.x))
        for layer in self._layers():
            own, crossed = layer["attention"], layer.get("crossattention")
            q, k, v = (self._heads(own["self"][name](x)).transpose(1, 2) for name in ("query", "key", "value"))
            x = own["output"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), x)
            if crossed is not None:
                k, v = next(keys_and_values), next(keys_and_values)
                q = self._heads(crossed["self"]["query"](x)).flatten(0, 1)
                out = packed_attention(
                    q, self._heads(k), self._heads(v), starts, images.cu_seqlens, x.shape[1], images.max_seqlen, key_size=images.size,
                    lengths=lengths, lengths_k=images.lengths,
                )  # fmt: skip
                x = crossed["output"](cast(Tensor, out).reshape(x.shape), x)
            x = layer["output_query"](F.gelu(layer["intermediate_query"]["dense"](x)), x)
        return x

    def _layers(self) -> list[dict[str, Any]]:
        layers = cast(nn.ModuleDict, self.bert["encoder"])["layer"]
        return [dict(layer.named_children()) for layer in layers.children()]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _keys_and_values(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """[T, C] of each: keys and values of the first cross-attention, of the second, ..., as views of one product."""
        crossed = [layer["crossattention"]["self"] for layer in self._layers() if "crossattention" in layer]
        linears = [projections[name] for projections in crossed for name in ("key", "value")]
        # One wide product over the image tokens runs at a better rate than twelve narrow ones, and reads the tokens once.
        weight, bias = torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])
        return F.linear(tokens, weight, bias).chunk(len(linears), 1)
