"""Operators for vision-language pre-training; each folder holds one, with its mathematics, its implementations and its PyTorch op."""

from fastvlp_kernels.bi_wkv import bi_wkv as bi_wkv
from fastvlp_kernels.bias_activation import bias_activation as bias_activation
from fastvlp_kernels.grouped_linear import grouped_linear as grouped_linear
from fastvlp_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fastvlp_kernels.maxsim import maxsim as maxsim
from fastvlp_kernels.packed import Packed as Packed
from fastvlp_kernels.packed_attention import packed_attention as packed_attention
from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid as pairwise_sigmoid
from fastvlp_kernels.patch_embed import patch_embed as patch_embed
from fastvlp_kernels.residual_norm import residual_norm as residual_norm
from fastvlp_kernels.segment_pool import segment_pool as segment_pool
from fastvlp_kernels.similarity_attend import similarity_attend as similarity_attend
from fastvlp_kernels.similarity_logsumexp import similarity_logsumexp as similarity_logsumexp
from fastvlp_kernels.similarity_topk import similarity_topk as similarity_topk
from fastvlp_kernels.token_merge import MergePlan as MergePlan
from fastvlp_kernels.token_merge import merge_plan as merge_plan
from fastvlp_kernels.token_select import TokenSelection as TokenSelection
from fastvlp_kernels.token_select import token_select as token_select
