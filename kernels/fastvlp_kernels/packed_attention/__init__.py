from .op import packed_attention as packed_attention
