from .op import residual_norm as residual_norm
