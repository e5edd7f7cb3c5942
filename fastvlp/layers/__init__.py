"""Building blocks of the towers: thin modules over the operators of ``fastvlp_kernels``."""

from importlib import import_module
from typing import Any

from fastvlp.layers.adaptive_pool import AdaptiveAveragePool as AdaptiveAveragePool
from fastvlp.layers.adaptive_pool import PyramidPool as PyramidPool
from fastvlp.layers.attention import AttentionPool as AttentionPool
from fastvlp.layers.attention import PackedAttention as PackedAttention
from fastvlp.layers.attention_drop import drop_least_read as drop_least_read
from fastvlp.layers.cosine_attention import CosineAttention as CosineAttention
from fastvlp.layers.cosine_attention import RelativePositions as RelativePositions
from fastvlp.layers.cross_attention import CrossAttention as CrossAttention
from fastvlp.layers.facets import FacetMask as FacetMask
from fastvlp.layers.facets import facet_mask as facet_mask
from fastvlp.layers.fusion import FusedBlocks as FusedBlocks
from fastvlp.layers.learned_centres import LearnedCentres as LearnedCentres
from fastvlp.layers.parameter_free import ParameterFreeAttention as ParameterFreeAttention
from fastvlp.layers.patch_dropout import PatchDropout as PatchDropout
from fastvlp.layers.patch_dropout import PatchDropoutWithIndices as PatchDropoutWithIndices
from fastvlp.layers.pool import Pool as Pool
from fastvlp.layers.pool import segment_mean as segment_mean
from fastvlp.layers.q_shift import neighbours as neighbours
from fastvlp.layers.q_shift import previous_and_next as previous_and_next
from fastvlp.layers.q_shift import q_shift as q_shift
from fastvlp.layers.q_shift import shift as shift
from fastvlp.layers.qformer import QFormer as QFormer
from fastvlp.layers.residual_mlp import ResidualMlp as ResidualMlp
from fastvlp.layers.routed import RoutedBlock as RoutedBlock
from fastvlp.layers.rwkv import RwkvBlock as RwkvBlock
from fastvlp.layers.token_learner import TokenLearner as TokenLearner
from fastvlp.layers.token_merger import TokenMerger as TokenMerger
from fastvlp.layers.transformer import Attend as Attend
from fastvlp.layers.transformer import Block as Block
from fastvlp.layers.transformer import SquaredReLU as SquaredReLU
from fastvlp.layers.transformer import packed_attend as packed_attend
from fastvlp.layers.transformer import packed_blocks as packed_blocks
from fastvlp.layers.transformer import padded_attend as padded_attend
from fastvlp.layers.transformer import transformer_blocks as transformer_blocks
from fastvlp.layers.video import TemporalContext as TemporalContext
from fastvlp.layers.video import VideoMerger as VideoMerger


def __getattr__(name: str) -> Any:
    if name == "NaViT":  # it lives beside the other signatures of other libraries, which import layers
        return import_module("fastvlp.integrations.vit_pytorch").NaViT
    raise AttributeError(f"module 'fastvlp.layers' has no attribute {name!r}")
