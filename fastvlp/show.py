"""``fastvlp show tokens``: which patches of a picture are dropped, or merge with which others, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvlp_kernels import Packed, merge_plan, token_select

if TYPE_CHECKING:
    from PIL import Image

    from fastvlp.models import TwoTower

ENLARGED = 448  # the longest side of what is drawn, about
WHITE, FADED = 255.0, 0.15
LINE = (194, 65, 12)


def tokens(image: Image.Image, *, keep: float | None = None, merge: float | None = None, model: TwoTower | None = None,
           image_size: int = 224, patch_size: int = 16) -> tuple[Image.Image, Tensor]:
    """What becomes of the patches of a picture.

    Patches are compared by their pixels, or, with a model, by its embedding of them, at the model's own size.

    Args:
        keep: the share of patches that stays: those that differ most from the mean of all; the others are faded.
        merge: the share of patches that merge away (ToMe), at most a half; those that are one token now are drawn in their mean
            colour, with lines between tokens. One of the two is given.

    Returns:
        The picture, and int64 [rows, columns]: the token that each patch went to, -1 where it was dropped.

    Raises:
        ValueError: both or none of ``keep`` and ``merge``, or a share outside 0..1.
    """
    from PIL import Image as pil

    from fastvlp.data import pack_images
    from fastvlp.data.images import as_pixels

    if (keep is None) == (merge is None):
        raise ValueError(f"keep is {keep} and merge is {merge}; give one of the two, a share of the patches")
    share = keep if keep is not None else merge
    if share is None or not 0 < share < 1:
        raise ValueError(f"the share of the patches is {share}; it lies between 0 and 1, as 0.5 does")
    if model is not None:
        image_size, patch_size = model.config.image.image_size, model.config.image.patch_size
    pixels = as_pixels(image, image_size, patch_size)
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    packed = pack_images([pixels], patch_size)
    features = packed.x.float() / 255 - 0.5
    if model is not None and packed.pos is not None:
        with torch.no_grad():
            features = model.image.embed(packed.x, packed.pos)
    token = _kept(packed, features, share) if keep is not None else merge_plan(
        features, packed.cu_seqlens, share, lengths=packed.lengths).source
    drawn = _draw(packed.x.float(), token.view(rows, columns), patch_size, max(1, ENLARGED // max(pixels.shape[:2])))
    return pil.fromarray(drawn.numpy()), token.view(rows, columns)


def save(picture: str, out: str, keep: float | None, merge: float | None, model: TwoTower | None) -> str:
    """Draw the tokens of a picture file into ``out``; returns what was drawn in one line.

    Raises:
        FileNotFoundError: there is no such picture. ValueError: it is not one, or as for :func:`tokens`.
    """
    from fastvlp.data.images import Unusable, decode

    try:
        image = decode(Path(picture).read_bytes())
    except Unusable as error:
        raise ValueError(f"{picture} cannot be shown: {error}") from error
    drawn, token = tokens(image, keep=keep, merge=merge, model=model)
    drawn.save(out)
    left = len(token[token >= 0].unique())
    return f"{out}: {token.numel()} patches, {left} tokens {'stay' if merge is None else 'after merging'}"


def _kept(packed: Packed, features: Tensor, keep: float) -> Tensor:
    scores = (features - features.mean(0)).norm(dim=1)
    kept = token_select(scores, packed.cu_seqlens, keep, lengths=packed.lengths).index
    return torch.full((packed.total,), -1).index_copy(0, kept, torch.arange(len(kept)))


def _draw(patches: Tensor, token: Tensor, size: int, enlarge: int) -> Tensor:
    """uint8 [h, w, 3]: patches [T, P*P*3] in 0..255 with what became of them."""
    rows, columns = token.shape
    tiles = patches.view(rows, columns, size, size, 3)
    dropped = token < 0
    tiles = torch.where(dropped[..., None, None, None], FADED * tiles + (1 - FADED) * WHITE, tiles)
    for merged in token[~dropped].unique().tolist():
        members = token == merged
        if int(members.sum()) > 1:
            tiles[members] = tiles[members].mean((0, 1, 2))
    drawn = tiles.permute(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)
    drawn = drawn.repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1).round().to(torch.uint8)
    owner = token.repeat_interleave(size * enlarge, 0).repeat_interleave(size * enlarge, 1)
    line = torch.zeros(owner.shape, dtype=torch.bool)
    line[1:] |= owner[1:] != owner[:-1]
    line[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    drawn[line] = torch.tensor(LINE, dtype=torch.uint8)
    return drawn
