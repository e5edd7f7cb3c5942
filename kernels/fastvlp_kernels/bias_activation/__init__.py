from .op import bias_activation as bias_activation
