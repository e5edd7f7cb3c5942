from .op import grouped_linear as grouped_linear
