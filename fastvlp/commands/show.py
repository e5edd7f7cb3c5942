"""``fastvlp show tokens``: which patches of a picture are dropped, merge with which others, or are attended to, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastvlp.systems.files import load
from fastvlp_kernels import Packed, merge_plan, packed_attention, token_select

if TYPE_CHECKING:
    from PIL import Image

    from fastvlp.systems.clip import Clip

ENLARGED = 448  # the longest side of what is drawn, about
GAP = 12  # between pictures
MERGE, KEEP = 0.4, 0.5  # of the picture that shows everything
WHITE, FADED = 255.0, 0.15
LINE = (194, 65, 12)


def command(options: argparse.Namespace) -> int:
    """Draw a picture's tokens."""
    model: Any = None if options.model is None else load(options.model, recipe=options.recipe)
    print(save(options.image, options.out, model, keep=options.keep, merge=options.merge, attend=options.attend))
    return 0


def tokens(image: Image.Image, *, keep: float | None = None, merge: float | None = None, model: Clip | None = None,
           image_size: int = 224, patch_size: int = 16) -> tuple[Image.Image, Tensor]:
    """What becomes of the patches of a picture.

    Patches are compared by their pixels, or, with a model, by its embedding of them, at the model's own size.

    Args:
        keep: the share of patches that stays: those that differ most from the mean of all; the others are faded.
        merge: the share of patches that merge away (ToMe), in steps of at most a half; those that are one token now are drawn in their
            mean colour, with lines between tokens. One of the two is given.

    Returns:
        The picture, and int64 [rows, columns]: the token that each patch went to, -1 where it was dropped.

    Raises:
        ValueError: both or none of ``keep`` and ``merge``, or a share outside 0..1.
    """
    if (keep is None) == (merge is None):
        raise ValueError(f"keep is {keep} and merge is {merge}; give one of the two, a share of the patches")
    share = keep if keep is not None else merge
    if share is None or not 0 < share < 1:
        raise ValueError(f"the share of the patches is {share}; it lies between 0 and 1, as 0.5 does")
    packed, features, grid = _patches(image, model, image_size, patch_size)
    token = (_merged(packed.replace(x=features), share) if keep is None else _kept(packed, features, share)).view(grid)
    tiles = _tiles(packed, grid)
    dropped = token < 0
    tiles = torch.where(dropped[..., None, None, None], FADED * tiles + (1 - FADED) * WHITE, tiles)
    for merged in token[~dropped].unique().tolist():
        members = token == merged
        if int(members.sum()) > 1:
            tiles[members] = tiles[members].mean((0, 1, 2))
    return _picture(tiles, token), token


def attention(image: Image.Image, *, model: Clip | None = None, image_size: int = 224,
              patch_size: int = 16) -> tuple[Image.Image, Tensor]:
    """How much attention each patch of a picture receives, in colour over the picture in grey.

    With a model: the mean over queries, heads and blocks of its image tower, nothing merged. Without one: by the products of the pixels,
    less their mean and normalised, in the place of those of queries and keys.

    Returns:
        The picture, and float32 [rows, columns]: the attention received, of which an equal share is 1.
    """
    packed, features, grid = _patches(image, model, image_size, patch_size)
    mass = torch.zeros(packed.total)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, received = packed_attention(q, k, v, packed.cu_seqlens, lengths=packed.lengths, return_key_mass=True)
        mass.add_(received)
        return cast(Tensor, out)

    with torch.no_grad():
        if model is None:
            # Without a model: similarity of patches to one another, once what all of them share is taken away.
            rows = torch.nn.functional.normalize(features - features.mean(0), dim=1)[:, None]
            attend(rows * rows.shape[2] ** 0.5, rows, rows)
        else:
            for block in cast(Any, model.image).blocks:
                features = block(features, attend)
    # In units of an equal share, so that 1 means "as much as any other".
    mass = (mass / mass.mean()).view(grid)
    strength = (mass / mass.max())[..., None, None, None]
    grey = _tiles(packed, grid).mean(-1, keepdim=True)
    return _picture((1 - 0.8 * strength) * grey + 0.8 * strength * torch.tensor(LINE)), mass


def save(picture: str, out: str, model: Clip | None = None, *, keep: float | None = None, merge: float | None = None,
         attend: bool = False) -> str:
    """Draw the tokens of a picture file into ``out``; returns what was drawn in one line.

    What is not asked for is not drawn; if nothing is, merging, dropping and attention are drawn side by side.

    Raises:
        FileNotFoundError: there is no such picture. ValueError: it is not one, or as for :func:`tokens`.
    """
    from PIL import Image as pil

    from fastvlp.data.images import Unusable, decode

    if not Path(picture).exists():
        raise FileNotFoundError(f"there is no picture {picture}; give the path of an image file, such as a PNG or JPEG")
    try:
        image = decode(Path(picture).read_bytes())
    except Unusable as error:
        raise ValueError(f"{picture} cannot be shown: {error}") from error
    if keep is None and merge is None and not attend:
        keep, merge, attend = KEEP, MERGE, True
    views, said = [], []
    if merge is not None:
        views.append(tokens(image, merge=merge, model=model))
        said.append(f"{len(views[-1][1].unique())} tokens after merging")
    if keep is not None:
        views.append(tokens(image, keep=keep, model=model))
        said.append(f"{int((views[-1][1] >= 0).sum())} tokens stay")
    if attend:
        views.append(attention(image, model=model))
        said.append(f"attention from {views[-1][1].min():.2g} to {views[-1][1].max():.2g} times an equal share")
    width, height = views[0][0].size
    whole = pil.new("RGB", (len(views) * (width + GAP) - GAP, height), "white")
    for place, (view, _) in enumerate(views):
        whole.paste(view, (place * (width + GAP), 0))
    whole.save(out)
    return f"{out}: {views[0][1].numel()} patches, {', '.join(said)}{', from left to right' if len(views) > 1 else ''}"


def _patches(image: Image.Image, model: Clip | None, image_size: int, patch_size: int) -> tuple[Packed, Tensor, tuple[int, int]]:
    """Patches [T, P*P*3] in 0..255 as one segment, what is compared of them [T, C], and how many rows and columns they are."""
    from fastvlp.data import pack_images
    from fastvlp.data.images import as_pixels

    tower: Any = None if model is None else model.image
    if tower is not None:
        image_size, patch_size = tower.image_size, tower.patch_size
    pixels = as_pixels(image, image_size, patch_size)
    packed = pack_images([pixels], patch_size)
    features = packed.x.float() / 255 - 0.5
    if tower is not None:
        with torch.no_grad():
            features = tower.embed(packed).x
    return packed, features, (pixels.shape[0] // patch_size, pixels.shape[1] // patch_size)


def _merged(packed: Packed, share: float) -> Tensor:
    """int64 [T]: one matching merges at most half of the tokens, so that a greater share takes several."""
    token, left = torch.arange(packed.total), packed.total - int(share * packed.total)
    while packed.total > left:
        plan = merge_plan(packed.x, packed.cu_seqlens, packed.total - left, lengths=packed.lengths)
        token, packed = plan.source[token], plan.apply(packed)
    return token


def _kept(packed: Packed, features: Tensor, keep: float) -> Tensor:
    # What differs most from the mean patch says most about the picture.
    scores = (features - features.mean(0)).norm(dim=1)
    kept = token_select(scores, packed.cu_seqlens, keep, lengths=packed.lengths).index
    return torch.full((packed.total,), -1).index_copy(0, kept, torch.arange(len(kept)))


def _tiles(packed: Packed, grid: tuple[int, int]) -> Tensor:
    """Patches [T, P*P*3] as float [rows, columns, P, P, 3]."""
    size = int((packed.x.shape[1] // 3) ** 0.5)
    return packed.x.float().view(*grid, size, size, 3)


def _picture(tiles: Tensor, token: Tensor | None = None) -> Image.Image:
    """[rows, columns, P, P, 3] as a picture, with lines between patches of different ``token``."""
    from PIL import Image as pil

    rows, columns, size = tiles.shape[:3]
    # A whole factor keeps the edges of patches sharp.
    enlarge = max(1, ENLARGED // (max(rows, columns) * size))
    drawn = tiles.permute(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3)
    drawn = drawn.repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1).round().to(torch.uint8)
    if token is not None:
        owner = token.repeat_interleave(size * enlarge, 0).repeat_interleave(size * enlarge, 1)
        line = torch.zeros(owner.shape, dtype=torch.bool)
        line[1:] |= owner[1:] != owner[:-1]
        line[:, 1:] |= owner[:, 1:] != owner[:, :-1]
        drawn[line] = torch.tensor(LINE, dtype=torch.uint8)
    return pil.fromarray(drawn.numpy())
