"""The operators and the packed layout, under the name that most people import."""

from fastvlp_kernels import MergePlan as MergePlan
from fastvlp_kernels import Packed as Packed
from fastvlp_kernels import TokenSelection as TokenSelection
from fastvlp_kernels import bi_wkv as bi_wkv
from fastvlp_kernels import bias_activation as bias_activation
from fastvlp_kernels import grouped_linear as grouped_linear
from fastvlp_kernels import linear_cross_entropy as linear_cross_entropy
from fastvlp_kernels import maxsim as maxsim
from fastvlp_kernels import merge_plan as merge_plan
from fastvlp_kernels import packed_attention as packed_attention
from fastvlp_kernels import pairwise_sigmoid as pairwise_sigmoid
from fastvlp_kernels import patch_embed as patch_embed
from fastvlp_kernels import residual_norm as residual_norm
from fastvlp_kernels import segment_pool as segment_pool
from fastvlp_kernels import similarity_attend as similarity_attend
from fastvlp_kernels import similarity_logsumexp as similarity_logsumexp
from fastvlp_kernels import similarity_topk as similarity_topk
from fastvlp_kernels import token_select as token_select
