"""What each process does in ``test_two_processes_need_what_their_tokens_need``: a step, held against the formulas of its layers."""

import dataclasses
import gc
import math
import sys
from types import SimpleNamespace

import torch

from fastvlp import config
from fastvlp.recipe import Recipe
from fastvlp.train import Trainer, loop
from fastvlp.train.parallel import World, join


def needed(recipe: Recipe) -> float:
    """Of the first batch, whole: a block is 24 C C n + 4 C n n, and backward is twice as much as forward but for the pixels."""
    _, stream = loop.prepare(recipe, World(0, 1, torch.device("cpu")))
    batch = next(iter(stream))
    image, text, wide = recipe.model.image, recipe.model.text, recipe.model.embed_dim
    patches, total = batch.image.lengths.double(), 3 * 2 * len(batch) ** 2 * wide
    for tower, n in ((image, patches), (text, batch.text.lengths.double())):
        total += 3 * tower.depth * float((24 * tower.width**2 * n + 4 * tower.width * n**2).sum())
        total += 3 * 2 * len(batch) * tower.width * wide
    return total + 2 * 2 * 3 * image.patch_size**2 * image.width * float(patches.sum())


def main() -> None:
    with join("cpu") as world:
        for shard, compiled in ((1, False), (2, False), (2, "eager")):
            recipe = config.load(sys.argv[1])
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, shard=shard, compile=compiled))
            system, stream = loop.prepare(recipe, world)
            trainer = Trainer(recipe, system, world)
            trainer.rate = SimpleNamespace(best=1e9 + world.rank * 2e9)
            pending = trainer.step(next(iter(stream)))
            assert math.isclose(pending.flops, needed(recipe)), (pending.flops, needed(recipe))
            assert pending.rate == 4e9
            print(f"shard {shard}, compile {compiled}: as the formulas say", flush=True)
            del system, trainer, pending
            gc.collect()


if __name__ == "__main__":
    main()
