"""The operators and the packed layout, under the name that most people import."""

from fastvlp_kernels import Packed as Packed
from fastvlp_kernels import maxsim as maxsim
from fastvlp_kernels import packed_attention as packed_attention
from fastvlp_kernels import pairwise_sigmoid as pairwise_sigmoid
from fastvlp_kernels import similarity_attend as similarity_attend
from fastvlp_kernels import similarity_logsumexp as similarity_logsumexp
