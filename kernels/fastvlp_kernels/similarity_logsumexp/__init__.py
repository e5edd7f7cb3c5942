from .arguments import Grads as Grads
from .arguments import Needs as Needs
from .arguments import ResultGrads as ResultGrads
from .arguments import Results as Results
from .op import logsumexp_backward as logsumexp_backward
from .op import logsumexp_forward as logsumexp_forward
from .op import similarity_logsumexp as similarity_logsumexp
