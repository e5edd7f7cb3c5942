from .op import similarity_topk as similarity_topk
