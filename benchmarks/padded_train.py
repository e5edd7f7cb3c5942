"""``fastvlp train`` with padded towers: the same weights and results, computed the way that packing replaces.

    python -m benchmarks.padded_train run.name=padded
"""

import sys
from unittest import mock

from torch import Tensor

from fastvlp import cli
from fastvlp.models import padded
from fastvlp.models.towers import ImageTower, TextTower
from fastvlp_kernels import Packed


def encode_image(tower: ImageTower, images: Packed) -> Tensor:
    """Packed patches -> features [S, embed_dim], padded to the longest picture of the batch."""
    assert images.pos is not None
    patches, mask = images.to_padded()
    return padded.encode_image(tower, patches, images.replace(x=images.pos).to_padded()[0], mask)


def encode_text(tower: TextTower, texts: Packed) -> Tensor:
    """Packed token ids -> features [S, embed_dim], padded to the context length as CLIP's captions are."""
    return padded.encode_text(tower, *texts.to_padded(width=tower.config.context_length))


def main(arguments: list[str]) -> int:
    """The exit code of ``fastvlp train`` with these changes of the default recipe."""
    with mock.patch.object(ImageTower, "forward", encode_image), mock.patch.object(TextTower, "forward", encode_text):
        return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
