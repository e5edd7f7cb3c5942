from .op import segment_pool as segment_pool
