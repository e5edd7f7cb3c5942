"""NaViT over packed tokens: images of any sizes in one batch without padding, masks or groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlp_kernels import packed_attention, token_select
from fastvlp_kernels._check import plain_tensors
from fastvlp_kernels.packed import Packed


class _LayerNorm(nn.Module):
    """Without a learned bias, under vit-pytorch's names."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        # A buffer of zeros because vit-pytorch saves one: its state dicts have to load here.
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class _HeadNorm(nn.Module):
    """RMS norm of every head (Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, 2023)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        # Unit length times sqrt(d) is the root mean square norm.
        return F.normalize(x, dim=-1) * (x.shape[-1] ** 0.5 * self.gamma.squeeze(1))


class _Attention(nn.Module):
    """The tokens ``x``, normalised, to the tokens ``context`` of the same segment (None: to one another)."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = _LayerNorm(dim)
        self.q_norm, self.k_norm = _HeadNorm(heads, dim_head), _HeadNorm(heads, dim_head)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim, bias=False), nn.Dropout(dropout))

    def forward(self, x: Packed, context: Packed | None = None) -> Tensor:
        normed = self.norm(x.x)
        q = self.to_q(normed).unflatten(-1, (self.heads, -1))
        k, v = self.to_kv(normed if context is None else context.x).unflatten(-1, (2, self.heads, -1)).unbind(1)
        keys = x if context is None else context
        out = packed_attention(
            self.q_norm(q), self.k_norm(k), v, x.cu_seqlens, None if context is None else keys.cu_seqlens, x.max_seqlen, keys.max_seqlen,
            # Queries and keys are normalised and carry learned scales, so that there is no 1 / sqrt(d).
            scale=1.0, lengths=x.lengths, lengths_k=None if context is None else keys.lengths,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return cast(Tensor, self.to_out(cast(Tensor, out).flatten(1)))


class _Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList((
                _Attention(dim, heads, dim_head, dropout),
                nn.Sequential(
                    _LayerNorm(dim), nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
                ),
            ))
            for _ in range(depth)
        )  # fmt: skip
        self.norm = _LayerNorm(dim)

    def forward(self, packed: Packed) -> Packed:
        for layer in self.layers:
            attention, mlp = cast(nn.ModuleList, layer)
            packed = packed.replace(x=attention(packed) + packed.x)
            packed = packed.replace(x=mlp(packed.x) + packed.x)
        return packed.replace(x=self.norm(packed.x))


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"NaViT: token_dropout_prob is {share}; it must be the share that is left out, from 0 to below 1")


class NaViT(nn.Module):
    """NaViT (Dehghani et al., https://arxiv.org/abs/2307.06304) with vit-pytorch's constructor, call and state-dict keys.

    Attention never crosses images, so they need no grouping: ``group_images`` and lists of lists are taken and change nothing.
    ``dropout`` acts on attention weights (attention is then padded) and on the outputs of attention and MLP.

    Args:
        image_size: the largest height and width in pixels, multiples of ``patch_size``.
        token_dropout_prob: the share of each image's tokens that training leaves out: a number, or a function of height and width.

    Raises:
        ValueError: sizes that are no multiples of the patch, a share outside 0 to below 1.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        token_dropout_prob: float | Callable[[int, int], float] | None = None,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"NaViT: image_size is {height} x {width}; both must be multiples of patch_size={patch_size}")
        if not (token_dropout_prob is None or callable(token_dropout_prob)):
            _check_share(token_dropout_prob)
        self.patch_size, self.channels, self.token_dropout_prob = patch_size, channels, token_dropout_prob
        values = channels * patch_size**2
        self.to_patch_embedding = nn.Sequential(_LayerNorm(values), nn.Linear(values, dim), _LayerNorm(dim))
        self.pos_embed_height = nn.Parameter(torch.randn(height // patch_size, dim))
        self.pos_embed_width = nn.Parameter(torch.randn(width // patch_size, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = _Transformer(dim, depth, heads, dim_head, mlp_dim, dropout)
        self.attn_pool_queries = nn.Parameter(torch.randn(dim))
        self.attn_pool = _Attention(dim, heads, dim_head, 0.0)
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Sequential(_LayerNorm(dim), nn.Linear(dim, num_classes, bias=False))

    def forward(
        self, batched_images: Sequence[Tensor] | Sequence[Sequence[Tensor]], group_images: bool = False, group_max_seq_len: int = 2048
    ) -> Tensor:
        """Images [channels, h, w] of any sizes up to image_size, in one list or in lists: logits [images, num_classes] in their order.

        Raises:
            ValueError: an image of another number of channels, of a size that is no multiple of the patch or above image_size; no image.
            TypeError: an image that is no tensor, or not of the model's dtype (outside autocast) or not floating point.
        """
        images: list[Tensor] = []
        for part in batched_images:
            images += cast(Sequence[Tensor], part if isinstance(part, list | tuple) else [part])
        self._check(images)
        # Images of one size lie together: they are cut, and attended, as one tensor.
        order = sorted(range(len(images)), key=lambda i: tuple(images[i].shape[1:]))
        packed = self._embedded([images[i] for i in order])
        if self.training and self.token_dropout_prob is not None:
            kept = [self._kept(images[i], n) for i, n in zip(order, packed.lengths.tolist(), strict=True)]
            scores = torch.rand(packed.total, device=packed.x.device)
            packed = token_select(scores, packed.cu_seqlens, torch.tensor(kept), lengths=packed.lengths).apply(packed)
        packed = self.transformer(packed.replace(x=self.dropout(packed.x)))
        queries = Packed.of(self.attn_pool_queries.expand(len(images), -1), [1] * len(images))
        # vit-pytorch normalises what attends, here the queries, and adds them to what they read.
        pooled = self.attn_pool(queries, packed) + queries.x
        # The inverse of the sorting: logits come in the order of the caller's images.
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        logits: Tensor = self.mlp_head(self.to_latent(pooled.index_select(0, back.to(pooled.device))))
        return logits

    def _embedded(self, images: Sequence[Tensor]) -> Packed:
        """Tokens with their positions; ``images`` of one size are neighbours."""
        p, patches, places, lengths = self.patch_size, [], [], []
        first = 0
        while first < len(images):
            shape = images[first].shape
            last = first + 1
            while last < len(images) and images[last].shape == shape:
                last += 1
            rows, columns = shape[1] // p, shape[2] // p
            stack = torch.stack(list(images[first:last])).unflatten(2, (rows, p)).unflatten(4, (columns, p))
            patches.append(stack.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.channels * p * p))
            place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
            places.append(place.repeat(last - first, 1))
            lengths += [rows * columns] * (last - first)
            first = last
        at = torch.cat(places).to(self.pos_embed_height.device, non_blocking=True)
        x = self.to_patch_embedding(torch.cat(patches)) + self.pos_embed_height[at[:, 0]] + self.pos_embed_width[at[:, 1]]
        return Packed.of(x, lengths)

    def _kept(self, image: Tensor, tokens: int) -> int:
        prob = self.token_dropout_prob
        share = cast(float, prob(image.shape[1], image.shape[2]) if callable(prob) else prob)
        _check_share(share)
        # An image without tokens would have nothing to pool.
        return max(1, int(tokens * (1 - share)))

    def _check(self, images: Sequence[Tensor]) -> None:
        p, most = self.patch_size, (self.pos_embed_height.shape[0], self.pos_embed_width.shape[0])
        if not images:
            raise ValueError("NaViT: got no images; pass at least one [channels, h, w]")
        own, autocast = self.pos_embed_height, torch.is_autocast_enabled(self.pos_embed_height.device.type)
        for i, image in enumerate(images):
            plain_tensors("NaViT", 2, **{"the model": own, f"image {i}": image})
            if not image.is_floating_point() or (image.dtype != own.dtype and not autocast):
                raise TypeError(f"NaViT: image {i} is {image.dtype}; convert it to the model's {own.dtype} (divide uint8 by 255)")
            if image.ndim != 3 or image.shape[0] != self.channels or image.shape[1] % p or image.shape[2] % p or not image.numel():
                raise ValueError(
                    f"NaViT: image {i} has shape {tuple(image.shape)}; it must be [{self.channels}, h, w] with h and w multiples of {p}"
                )
            if image.shape[1] // p > most[0] or image.shape[2] // p > most[1]:
                got, allowed = f"{image.shape[1]} x {image.shape[2]}", f"{most[0] * p} x {most[1] * p}"
                raise ValueError(f"NaViT: image {i} is {got}; image_size allows {allowed}")
