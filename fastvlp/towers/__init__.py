"""Towers: packed tokens in, packed tokens out. Pooling and projection are the system's (``fastvlp.layers.Pool``)."""

from fastvlp.towers.adapters import lora as lora
from fastvlp.towers.decoder import Decoder as Decoder
from fastvlp.towers.facets import facet_features as facet_features
from fastvlp.towers.joint import Joint as Joint
from fastvlp.towers.rwkv import RwkvImage as RwkvImage
from fastvlp.towers.rwkv import RwkvText as RwkvText
from fastvlp.towers.text import Text as Text
from fastvlp.towers.text import Words as Words
from fastvlp.towers.vit import Patches as Patches
from fastvlp.towers.vit import Vit as Vit
