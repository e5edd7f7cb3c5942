"""What recipes for one's own pictures and captions have in common: they fit one GPU, and name no data."""

from __future__ import annotations

import fiddle as fdl

from fastvlp.data.batch import Stage
from fastvlp.data.fields import Caption, Image
from fastvlp.recipe import NO_DATA, Data, Optim, Recipe, Schedule, Train

PAIRS = Data(train=NO_DATA, fields={"image": Image(), "text": Caption()}, tokenizer="clip", batch_size=1024, workers=4)


def trained(model: fdl.Config) -> Recipe:
    """32 epochs in batches of 1,024 with CLIP's tokenizer, in micro-batches of 32,768 tokens; nothing is evaluated unless it is named."""
    return Recipe(model, Schedule(epochs=32, warmup=500, stages=(Stage(augment=0.2),)), PAIRS,
                  optim=Optim(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, grad_clip=1.0),
                  train=Train(tokens={"image": 32768, "text": 32768}, checkpoint_every=1000))
