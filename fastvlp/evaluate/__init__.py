"""Scores of a model on any shards: each function measures one thing, ``measure`` what a recipe asks for."""

from fastvlp.evaluate.caption_nll import caption_nll as caption_nll
from fastvlp.evaluate.classes import load_classes as load_classes
from fastvlp.evaluate.encode_all import encode_all as encode_all
from fastvlp.evaluate.features import Features as Features
from fastvlp.evaluate.features import features as features
from fastvlp.evaluate.knn import knn as knn
from fastvlp.evaluate.measure import can as can
from fastvlp.evaluate.measure import embeds_both as embeds_both
from fastvlp.evaluate.measure import measure as measure
from fastvlp.evaluate.measure import table as table
from fastvlp.evaluate.pair_scores import pair_scores as pair_scores
from fastvlp.evaluate.probe import probe as probe
from fastvlp.evaluate.reading import How as How
from fastvlp.evaluate.retrieval import retrieval as retrieval
from fastvlp.evaluate.zero_shot import zero_shot as zero_shot
