"""``fastvlp train`` with padded towers: the same weights and results, computed the way that packing replaces.

    python -m benchmarks.padded_train run.name=padded
"""

import sys
from unittest import mock

from fastvlp import cli
from fastvlp.towers import Text, Vit, padded
from fastvlp_kernels import Packed


def encode_image(tower: Vit, images: Packed) -> Packed:
    """Packed patches -> tokens, computed over pictures padded to the longest of the batch."""
    assert images.pos is not None
    patches, mask = images.to_padded()
    tokens = padded.encode(tower, patches, mask, images.replace(x=images.pos).to_padded()[0])
    return images.replace(x=Packed.from_padded(tokens, images.lengths).x)


def encode_text(tower: Text, texts: Packed) -> Packed:
    """Packed token ids -> tokens, computed over captions padded to the context length as CLIP's are."""
    tokens = padded.encode(tower, *texts.to_padded(width=tower.context_length))
    return texts.replace(x=Packed.from_padded(tokens, texts.lengths).x)


def main(arguments: list[str]) -> int:
    """The exit code of ``fastvlp train`` with these changes of the default recipe."""
    with mock.patch.object(Vit, "forward", encode_image), mock.patch.object(Text, "forward", encode_text):
        return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
