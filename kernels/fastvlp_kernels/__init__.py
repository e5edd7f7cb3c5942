"""Operators for vision-language pre-training; each folder holds one, with its mathematics, its implementations and its PyTorch op."""

from fastvlp_kernels.maxsim import maxsim as maxsim
from fastvlp_kernels.packed import Packed as Packed
from fastvlp_kernels.packed_attention import packed_attention as packed_attention
from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid as pairwise_sigmoid
from fastvlp_kernels.similarity_attend import similarity_attend as similarity_attend
from fastvlp_kernels.similarity_logsumexp import similarity_logsumexp as similarity_logsumexp
