"""Two-tower models over the packed layout."""

from fastvlp.models.config import ImageConfig as ImageConfig
from fastvlp.models.config import ModelConfig as ModelConfig
from fastvlp.models.config import TextConfig as TextConfig
from fastvlp.models.config import TowerConfig as TowerConfig
from fastvlp.models.two_tower import TwoTower as TwoTower
from fastvlp.models.two_tower import load as load
