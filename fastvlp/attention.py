"""The old place of :mod:`fastvlp.integrations.attention`."""

from fastvlp.integrations.attention import BlockDiagonalMask as BlockDiagonalMask
from fastvlp.integrations.attention import flash_attn_varlen_func as flash_attn_varlen_func
from fastvlp.integrations.attention import memory_efficient_attention as memory_efficient_attention
from fastvlp.integrations.attention import varlen_attn as varlen_attn
