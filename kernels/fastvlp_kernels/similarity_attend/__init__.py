from .arguments import Grads as Grads
from .arguments import Needs as Needs
from .arguments import ResultGrads as ResultGrads
from .arguments import Results as Results
from .op import attend_backward as attend_backward
from .op import attend_forward as attend_forward
from .op import similarity_attend as similarity_attend
