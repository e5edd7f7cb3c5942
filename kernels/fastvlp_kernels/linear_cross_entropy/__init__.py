from .op import linear_cross_entropy as linear_cross_entropy
