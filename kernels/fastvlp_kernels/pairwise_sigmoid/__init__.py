from .op import pairwise_sigmoid as pairwise_sigmoid
from .op import sigmoid_forward as sigmoid_forward
