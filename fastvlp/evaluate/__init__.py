"""Scores of a model on any shards: zero-shot classification and image-text retrieval."""

from fastvlp.evaluate.classes import load_classes as load_classes
from fastvlp.evaluate.features import Features as Features
from fastvlp.evaluate.features import features as features
from fastvlp.evaluate.measure import embeds_both as embeds_both
from fastvlp.evaluate.measure import measure as measure
from fastvlp.evaluate.measure import table as table
from fastvlp.evaluate.retrieval import retrieval as retrieval
from fastvlp.evaluate.zero_shot import zero_shot as zero_shot
