"""Towers of open_clip, timm and transformers, with weights or without: packed where their blocks allow it, padded where not."""

from fastvlp.towers.pretrained.open_clip import open_clip_tower as open_clip_tower
from fastvlp.towers.pretrained.timm import timm_tower as timm_tower
from fastvlp.towers.pretrained.transformers import transformers_tower as transformers_tower
