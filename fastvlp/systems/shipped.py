"""What recipes on the shipped data have in common: towers that train in minutes on two cores, the streams, and the measures."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import fiddle as fdl

from fastvlp.data.batch import Stage
from fastvlp.data.fields import Caption, Image
from fastvlp.recipe import Data, Eval, Optim, Schedule
from fastvlp.towers import Joint, Patches, Text, Vit, Words

VOCABULARY = 4096  # of the shipped tokenizer
MASK = VOCABULARY  # the id after it, for towers that see hidden words
ENDS = (VOCABULARY + 1, VOCABULARY + 2)  # of captions that are predicted: the shipped tokenizer has no start and no end

CAPTIONER = VOCABULARY + 3

PAIRS = Data(fields={"image": Image(), "text": Caption(max_captions=2)}, batch_size=128)
EVAL = Eval(zero_shot=("mini:val-emoji",), classes="mini:emoji", retrieval=("mini:val-openclipart",))
OPTIM = Optim(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.2)


def captions(part: str = "text", **image: Any) -> Data:
    """Pictures with captions that start and end, for captioners, whose vocabulary is ``CAPTIONER``; ``image``: of the ``Image`` field."""
    return Data(fields={"image": Image(**image), "text": Caption(max_captions=2, part=part, ends=ENDS)}, batch_size=128)


def masked(caption: Caption, mask_id: int = MASK) -> dict[str, Caption]:
    """The streams ``text`` and ``masked``: captions, and the same with 0.15 of their words hidden (BERT)."""
    return {"text": caption, "masked": replace(caption, mask=0.15, mask_id=mask_id)}


def image(**changes: Any) -> fdl.Config:
    """A ViT of 64 pixels in patches of 16."""
    return fdl.Config(Vit, **{"width": 192, "depth": 6, "heads": 3, "patch_size": 16, "image_size": 64, **changes})


def text(**changes: Any) -> fdl.Config:
    """A text tower for the shipped tokenizer's captions."""
    return fdl.Config(Text, **{"width": 192, "depth": 4, "heads": 3, "vocab_size": VOCABULARY, "context_length": 24, **changes})


def patches() -> fdl.Config:
    """The embedding of that ViT alone."""
    return embedding(image())


def words(**changes: Any) -> fdl.Config:
    """The embedding alone of captions that are predicted."""
    return embedding(text(**{"vocab_size": CAPTIONER, **changes}))


def embedding(tower: fdl.Config) -> fdl.Config:
    """What embeds in a ``Vit`` or a ``Text``, for systems whose transformer is another part: the blocks would be weights without use."""
    made = fdl.get_callable(tower)
    kind = Patches if made is Vit else Words
    known = {name: one.default for name, one in inspect.signature(made).parameters.items()} | tower.__arguments__
    return fdl.Config(kind, **{name: known[name] for name in inspect.signature(kind).parameters})


def joint(**changes: Any) -> fdl.Config:
    """A transformer over patches and words."""
    return fdl.Config(Joint, **{"width": 192, "depth": 6, "heads": 3, **changes})


def schedule(steps: int = 840, keep: float = 0.5) -> Schedule:
    """Half of the patches for the first four fifths, all of them at the end."""
    return Schedule(steps=steps, warmup=max(1, steps // 14), stages=(Stage(0.8, keep=keep, augment=0.5), Stage(augment=0.5)))
