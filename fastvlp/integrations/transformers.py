"""Contrastive models of transformers 5 whose loss never makes the batch x batch logits, and outputs that make them when they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPModel, Siglip2Model, SiglipModel
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.models.siglip2.modeling_siglip2 import Siglip2Output
from transformers.utils import ModelOutput

from fastvlp.losses import ALONE, ClipLoss, SigLipLoss
from fastvlp.losses.across.group import Group
from fastvlp.losses.inputs import align, check
from fastvlp_kernels.pairwise_sigmoid import pairwise_sigmoid
from fastvlp_kernels.similarity_logsumexp import similarity_logsumexp

from . import exported, instances
from .instances import OPTIONS
from .report import Replacement

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")
LOGITS = ("logits_per_image", "logits_per_text")


@dataclass(frozen=True)
class Options:
    """What ``fastvlp.accelerate`` was asked for, kept on the model."""

    group: Group
    logits: bool | None

    # A process group cannot be copied, and a copy of the model belongs to the same one.
    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        return self


def _on_demand(name: str) -> property:
    """An attribute of :class:`LogitsOnDemand` that is made when it is read; what is set is kept by ``ModelOutput`` in its mapping."""

    def read(self: Any) -> Any:
        return dict.__getitem__(self, name) if name in self.keys() else self._logits()[LOGITS.index(name)]

    return property(read, lambda self, value: None)


class LogitsOnDemand(ModelOutput):
    """An output whose logits enter its mapping when they are read; ``logit_scale`` (exponentiated) and ``logit_bias`` are in it."""

    logits_per_image = _on_demand("logits_per_image")
    logits_per_text = _on_demand("logits_per_text")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return getattr(self, key) if key in LOGITS else super().__getitem__(key)
        names = self._names()[key]
        return self._plain(names) if isinstance(names, str) else tuple(self._plain(name) for name in names)

    def to_tuple(self) -> tuple[Any, ...]:
        """Loss, logits and the rest, in the order of the model's own output."""
        return self[:]

    def _names(self) -> list[str]:
        added = ("logit_scale", "logit_bias")
        return [field.name for field in fields(self) if field.name not in added and (field.name in LOGITS or field.name in self.keys())]

    def _plain(self, name: str) -> Any:
        value = getattr(self, name)
        return value.to_tuple() if isinstance(value, ModelOutput) else value

    def _logits(self) -> tuple[Tensor, Tensor]:
        of_text = torch.matmul(self["text_embeds"], self["image_embeds"].t()) * self["logit_scale"]
        if "logit_bias" in self.keys():
            of_text = of_text + self["logit_bias"]
        self["logits_per_image"], self["logits_per_text"] = of_text.t(), of_text
        return of_text.t(), of_text


@dataclass
class CLIPLogitsOnDemand(LogitsOnDemand, CLIPOutput):
    """The output of an accelerated CLIPModel."""

    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None


@dataclass
class SiglipLogitsOnDemand(LogitsOnDemand, SiglipOutput):
    """The output of an accelerated SiglipModel."""

    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None


@dataclass
class Siglip2LogitsOnDemand(LogitsOnDemand, Siglip2Output):
    """The output of an accelerated Siglip2Model."""

    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None


def _softmax(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, group: Group) -> Any:
    if group != ALONE:
        return ClipLoss(group=group)(image, text, scale)
    # Per-row differences before the mean: log-sum-exp and positive are both large where they nearly cancel.
    row, column, positive = similarity_logsumexp(image, text, scale, offset=0)
    return ((row - positive) + (column - positive)).mean() / 2


def _sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, group: Group) -> Any:
    if group != ALONE:
        return SigLipLoss(group=group)(image, text, scale, bias)
    assert bias is not None
    return pairwise_sigmoid(image, text, scale, bias, offset=0, factor=1 / len(image))


@dataclass(frozen=True)
class Kind:
    """A family of models: the class whose ``forward`` is replaced, its output with and without logits, and its loss."""

    model: Any
    output: Any
    on_demand: Any
    loss: Callable[..., Any]
    operator: str


KINDS = (
    Kind(CLIPModel, CLIPOutput, CLIPLogitsOnDemand, _softmax, "similarity_logsumexp"),
    Kind(SiglipModel, SiglipOutput, SiglipLogitsOnDemand, _sigmoid, "pairwise_sigmoid"),
    Kind(Siglip2Model, Siglip2Output, Siglip2LogitsOnDemand, _sigmoid, "pairwise_sigmoid"),
)


def find_all(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module, Kind]]:
    """Those of the modules whose loss can be computed without logits.

    Raises:
        RuntimeError: it is transformers 4.
    """
    found = [(path, module, kind) for path, module in modules if (kind := _kind(type(module))) is not None]
    if found and int(transformers.__version__.split(".")[0]) < 5:
        raise RuntimeError(f"fastvlp.accelerate: transformers {transformers.__version__} is installed; models of version 5 are supported")
    return found


def replace(loss: tuple[str, nn.Module, Kind], group: Group, logits: bool | None) -> Replacement:
    """Give a model that :func:`find_all` found the class that computes its loss without logits."""
    path, module, kind = loss
    expected = "the B x B logits of a batch of B pairs are not stored, forward or backward"
    change = f"loss from {kind.operator}, logits made when they are read"
    replacement = Replacement(path, module, type(module), change, expected)
    instances.change(module, loss_forward, Options(group, logits))
    return replacement


def _kind(cls: Any) -> Kind | None:
    """The kind whose ``forward`` the class has, its own or inherited."""
    return next((kind for kind in KINDS if issubclass(cls, kind.model) and cls.forward is kind.model.forward), None)


def loss_forward(cls: Any) -> Callable[..., Any]:
    """The forward of a model's class that computes the loss our way."""
    kind = _kind(cls)
    assert kind is not None
    original = cls.forward
    signature = inspect.signature(original)

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        options: Options | None = getattr(self, OPTIONS, None)
        if options is None or exported.exporting():
            return original(self, *args, **kwargs)
        # return_dict is taken out, since with our output the tuple is made at the end.
        tuples = not (self.config.return_dict if (wanted := kwargs.pop("return_dict", None)) is None else wanted)
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        # Without a loss to compute, the logits are the answer: the model's own way.
        if not given.pop("return_loss", None):
            return original(self, *args, **kwargs, return_dict=not tuples)
        result = _with_loss(self, kind, given.pop("kwargs", {}), given)
        if tuples:
            return result.to_tuple()
        # In evaluation logits are what is asked for; in training nobody reads them.
        if options.logits or (options.logits is None and not torch.is_grad_enabled()):
            return kind.output(**{field.name: getattr(result, field.name) for field in fields(kind.output)})
        return result

    return forward


def _with_loss(model: Any, kind: Kind, shared: dict[str, Any], given: dict[str, Any]) -> Any:
    """The output of a call with ``return_loss=True``, without logits. ``shared`` goes to both towers."""
    texts = {name: value for name, value in given.items() if name in TEXT_INPUTS}
    images = {name: value for name, value in given.items() if name not in TEXT_INPUTS}
    vision = model.get_image_features(**images, **shared, return_dict=True)
    text = model.get_text_features(**texts, **shared, return_dict=True)
    image_embeds, text_embeds = (tower.pooler_output / tower.pooler_output.norm(dim=-1, keepdim=True) for tower in (vision, text))
    # Towers may lie on different devices (device_map); transformers compares them where the texts are.
    image_embeds = image_embeds.to(text_embeds.device)
    scale = model.logit_scale.exp().to(text_embeds.device)
    bias = None if (bias := getattr(model, "logit_bias", None)) is None else bias.to(text_embeds.device)
    check(type(model).__name__, image_embeds, text_embeds)
    loss = kind.loss(*align(type(model).__name__, image_embeds, text_embeds), scale, bias, getattr(model, OPTIONS).group)
    return kind.on_demand(
        loss=loss,
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        text_model_output=text,
        vision_model_output=vision,
        logit_scale=scale,
        logit_bias=bias,
    )
