"""The default recipe at a size that runs in milliseconds."""

import torch

from fastvlp.recipe import Recipe
from fastvlp.systems import clip
from fastvlp.systems.files import build_system, save
from fastvlp.systems.system import System


def small() -> tuple[Recipe, System]:
    """A CLIP of one narrow block in each tower, from seed 0."""
    recipe = clip.recipe()
    for tower in (recipe.model.image, recipe.model.text):
        tower.width, tower.depth, tower.heads = 32, 1, 2
    recipe.model.embed_dim = 24
    torch.manual_seed(0)
    return recipe, build_system(recipe).eval()


def save_small(folder) -> System:
    """The same as ``fastvlp.load`` reads it from ``folder``."""
    recipe, system = small()
    save(folder, system, recipe)
    return system
