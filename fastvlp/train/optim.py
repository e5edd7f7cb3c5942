"""AdamW over two groups: weights that decay and weights that do not."""

from __future__ import annotations

import torch
from torch import nn

from fastvlp.config import OptimConfig

_POSITIONS = ("rows", "columns", "places")  # tables of positions in fastvlp.models.towers


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms, biases, scalars and embeddings (tables of tokens and positions) do not. Frozen parameters are left out."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or id(parameter) in tables or name.rpartition(".")[2] in _POSITIONS
            (no_decay if free else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in its fused form."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
