"""AdamW over groups of parameters: which decay, and how fast each learns."""

from __future__ import annotations

import re

import torch
from torch import nn

from fastvlp._schema import ConfigError
from fastvlp.recipe import Optim

_POSITIONS = ("rows", "columns", "places")  # tables of positions in fastvlp.towers
_BLOCK = re.compile(r"(.*?)\bblocks\.(\d+)\.")


def parameter_groups(model: nn.Module, config: Optim) -> list[dict]:
    """Matrices decay; norms, biases, scalars and embeddings (tables of tokens and positions) do not. Frozen parameters are left out.

    Returns:
        Groups with "params", "weight_decay" and "scale", the factor of the learning rate.

    Raises:
        ConfigError: nothing is to be trained, or a key of ``optim.scales`` is the beginning of no parameter's name.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("the model has no parameter that trains; everything in it is frozen")
    for key in config.scales:
        if not any(_begins(name, key) for name, _ in named):
            parts = sorted({name.partition(".")[0] for name, _ in named})
            raise ConfigError(f"optim.scales names {key}, which is no part of the model that trains; its parts are {', '.join(parts)}")
    layer = _layers([name for name, _ in named])
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in named:
        # Decay pulls towards 0, which is right for matrices of products; a norm's scale, a bias or a row of a table is not one.
        free = parameter.ndim < 2 or id(parameter) in tables or name.rpartition(".")[2] in _POSITIONS
        scale = config.scales.get(max((key for key in config.scales if _begins(name, key)), key=len, default=""), 1.0)
        if config.layer_decay is not None:
            scale *= config.layer_decay ** layer[name]
        decay = 0.0 if free else config.weight_decay
        # As few groups as there are pairs of numbers: the fused optimizer makes one launch for each.
        groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "scale": scale})["params"].append(parameter)
    return list(groups.values())


def _begins(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _layers(names: list[str]) -> dict[str, int]:
    """How many blocks of its tower lie above each parameter; embeddings, registered before the blocks, lie below all of them."""
    depth: dict[str, int] = {}
    for name in names:
        if match := _BLOCK.match(name):
            depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    above, reached = {}, set()
    for name in names:
        if match := _BLOCK.match(name):
            reached.add(match[1])
            above[name] = depth[match[1]] - 1 - int(match[2])
        else:
            tower = max((prefix for prefix in depth if name.startswith(prefix)), key=len, default=None)
            above[name] = depth[tower] if tower is not None and tower not in reached else 0
    return above


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in its fused form, which can also skip a step without asking the device."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
