"""The softmax objectives of the literature as one function whose keywords compose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvlp_kernels import _check, _inputs
from fastvlp_kernels.similarity_logsumexp import LogSumExp

from .across.contrastive import SideBatches, gather_sides, shared_negatives
from .across.gather import merge_columns
from .across.group import Group, Members
from .across.split_batch import tell_refusal
from .autograd import differentiable_once
from .inputs import align, check
from .queue import NegativeQueue
from .softmax_terms import Sweep, Terms

NAME = "contrastive_loss"
EQUAL_IDS = ("mean", "sum", "exclude")


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: float | Tensor = 1.0,
    *,
    weights: Tensor | tuple[Tensor, Tensor] | None = None,
    log_weights: Tensor | tuple[Tensor, Tensor] | None = None,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    equal_ids: str = "mean",
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    tau_plus: float | Tensor | None = None,
    text_negatives: Tensor | NegativeQueue | None = None,
    image_negatives: Tensor | NegativeQueue | None = None,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    compute_dtype: torch.dtype | None = None,
    stash_bytes: int = 0,
    impl: str | None = None,
    group: Group = None,
) -> Tensor:
    """The symmetric softmax loss of images and texts, and what was proposed on top of it; S is never stored.

    With S_ij = scale * <image_i, text_j> and p its softmax over rows, the loss is the mean of -w_i log p_ii over images, averaged with the
    texts' over columns (CLIP, arXiv:2103.00020). Keywords change one thing each, and compose:

    * ``weights``: w (ALIP, arXiv:2308.08428); means divide by the count. ``log_weights``: of u, v: exp(S_ij) counts u_i v_j times.
    * ``ids``: all pairs of equal id are positive. ``equal_ids="mean"``: the mean of -log p over an anchor's positives (UniCL,
      arXiv:2204.03610; SupCon, arXiv:2004.11362; for DreamLIP and FLAME see :func:`multi_caption_loss`). "sum": -log of the sum of their p
      (MIL-NCE, arXiv:1912.06430). "exclude": pairs stay (i, i), others of equal id are no negatives. Without a positive: no loss, not
      counted.
    * ``label_smoothing``: e: targets are (1 - e) times the positives plus e times uniform over the candidates.
    * ``focal_gamma``: g: (1 - p)^g * -log p (arXiv:1708.02002); the sigmoid's is :func:`focal_sigmoid_loss`.
    * ``tau_plus``: the prior of a negative being positive: -log(exp(S_ii) / (exp(S_ii) + n g)), g = max((mean over the n negatives of
      exp(S_ij) - tau_plus * exp(S_ii)) / (1 - tau_plus), exp(-scale)) (debiased, arXiv:2007.00224).
    * ``text_negatives``: more candidates for the images: for all (TripletCLIP, arXiv:2411.02545; Jina CLIP, arXiv:2405.20204), for each, or
      a queue. ``image_negatives``: likewise for the texts.
    * ``prefixes``: the weighted sum of the losses of the first p_1 < ... < p_K = D features, each normalised (Matryoshka,
      arXiv:2205.13147).

    Args:
        image: [M, D] and text: [N, D], float32, bfloat16 or float16 (float64 on the CPU). Row i of both is a pair (M = N), except with ids
            of "mean" and "sum".
        scale: number, 0-d or [1].
        weights, log_weights: [N] for pairs, or ([M], [N]). ids: integers, likewise; below zero: equal to nothing; "exclude": [N].
        label_smoothing: below 1. tau_plus: below 1, a number or [N] (range checked on the CPU only).
        text_negatives: [J, D], [M, J, D] or :class:`NegativeQueue`. image_negatives: [J, D], [N, J, D] or a queue.
        prefixes: widths. prefix_weights: K numbers; None: 1.
        compute_dtype, stash_bytes, impl: see :func:`fastvlp.ops.similarity_logsumexp`.
        group: the processes that share the batch; None: all; ``ALONE``: this one. The mean of the losses, and all gradients once DDP has
            averaged, are one process's. M, N, J may differ; queues must be alike (enqueue what :func:`gather_batch` gives).

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the inputs do not fit, or two keywords do not compose. In a group all raise when one refuses (the others a
            RuntimeError), or when keywords, widths or dtypes differ.
    """
    members = Members.of(NAME, group)
    several = ids is not None and equal_ids != "exclude"
    try:
        _check_options(ids is not None, equal_ids, label_smoothing, focal_gamma, tau_plus, log_weights is not None)
        check(NAME, image, text, pairs=not several)
        image, text = align(NAME, image, text)
        weight = _two_sides("weights", weights, image, text)
        bias = _two_sides("log_weights", log_weights, image, text)
        if ids is not None and not several and not isinstance(ids, Tensor):
            raise ValueError(f"{NAME}: equal_ids='exclude' takes one id for each pair, shape ({text.shape[0]},), not two tensors")
        numbers = _two_sides("ids", ids, image, text, integer=True)
        _check_negatives("text_negatives", text_negatives, image)
        _check_negatives("image_negatives", image_negatives, text)
        dtype = _inputs.product_dtype(NAME, image, compute_dtype)
        factor = _inputs.scalar(NAME, "scale", scale, image, _inputs.sum_dtype(dtype))
        how_much = _check_prefixes(prefixes, prefix_weights)
        prior = None if tau_plus is None else _prior(tau_plus, factor, text.shape[0])
    except (TypeError, ValueError):
        if members.size > 1:
            tell_refusal(members)
        raise
    widths = None if prefixes is None else tuple(prefixes)
    # Where 1 - p has to keep its digits, or ids say so, the positive is left out of the sums; elsewhere the comparison would cost time.
    excludes = not several and (ids is not None or focal_gamma > 0 or prior is not None)
    averages = several and equal_ids == "mean"
    shared = label_smoothing > 0 or prefixes is not None or text_negatives is not None or image_negatives is not None
    given = {"weights": weights, "log_weights": log_weights, "ids": ids, "tau_plus": tau_plus if isinstance(tau_plus, Tensor) else None}
    keywords: dict[str, object] = {f"presence of {name}": value is not None for name, value in given.items()}
    keywords |= {"equal_ids": equal_ids, "label_smoothing": label_smoothing, "focal_gamma": focal_gamma, "prefixes": widths}
    keywords |= {"prefix_weights": list(how_much), "tau_plus": None if isinstance(tau_plus, Tensor) else tau_plus}
    batches = SideBatches.of(NAME, members, image, text, (text_negatives, image_negatives), (factor, *bias), dtype, keywords)
    if members.size > 1:
        image, text, factor = differentiable_once(image, text, factor)
    sweep = Sweep(factor, dtype, widths, stash_bytes, impl)
    terms = Terms(sweep, several, averages, excludes, label_smoothing, focal_gamma, prior)

    with torch.autocast(image.device.type, enabled=False):
        more_texts = shared_negatives(text_negatives, batches.text_negatives)
        more_images = shared_negatives(image_negatives, batches.image_negatives)
        images, texts, all_images, all_texts = gather_sides(image, text, bias, numbers, terms, shared, batches)
        mode = "sums" if averages else "both" if several else "exclude" if excludes else None
        found = sweep(images, all_texts, None if several else batches.images.start(members.rank), mode)
        of_images, col, of_texts = found.row_positives, found.col, found.col_positives
        if not several:
            of_images = of_texts = LogSumExp(found.positive, torch.zeros_like(found.positive))
        if members.size > 1:
            col = merge_columns(col, batches.texts)
            of_texts = merge_columns(of_texts, batches.texts, averages) if several else of_texts
        by_images = terms.direction(images, all_texts, found.row, of_images, more_texts, weight[0], batches.images)
        by_texts = terms.direction(texts, all_images, col, of_texts, more_images, weight[1], batches.texts)
        parts = zip([*how_much, *how_much], by_images + by_texts, strict=True)
        return sum((much / 2 * part for much, part in parts), factor.new_zeros(()))


def multi_caption_loss(image: Tensor, text: Tensor, scale: float | Tensor = 1.0, **options: Any) -> Tensor:
    """The mean over K of :func:`contrastive_loss` of the images with their k-th captions: K softmaxes over B, where ``ids`` makes one over
    K * B.

    The loss of DreamLIP's sub-captions (Zheng et al. 2024, arXiv:2403.17007) and FLAME's facets (Cao et al. 2024, arXiv:2411.11927).

    Args:
        image: [B, D]. text: [K, B, D], caption k of image i at [k, i]. scale, options: as there, for B pairs.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as there; or ``text`` is not [K, B, D].
    """
    if not isinstance(text, Tensor) or text.ndim != 3 or 0 in text.shape:
        got = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise ValueError(f"multi_caption_loss: text is {got}; it must be a tensor [captions of an image, images, width], at least one each")
    return torch.stack([contrastive_loss(image, captions, scale, **options) for captions in text]).mean()


def _check_options(
    has_ids: bool, equal_ids: str, label_smoothing: float, focal_gamma: float, tau_plus: float | Tensor | None, has_log_weights: bool
) -> None:
    """Refuse values out of range, and keywords that have no common meaning."""
    if equal_ids not in EQUAL_IDS:
        raise ValueError(f"{NAME}: equal_ids={equal_ids!r} is unknown; allowed: {', '.join(EQUAL_IDS)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{NAME}: label_smoothing={label_smoothing}; it must be at least 0 and below 1")
    if not focal_gamma >= 0:
        raise ValueError(f"{NAME}: focal_gamma={focal_gamma}; it must be 0 (no focus) or more")
    if isinstance(tau_plus, (int, float)) and not 0 <= tau_plus < 1:
        raise ValueError(f"{NAME}: tau_plus={tau_plus}; a prior must be at least 0 and below 1")
    several = has_ids and equal_ids != "exclude"
    for together, these, why in (
        (focal_gamma and label_smoothing, "focal_gamma and label_smoothing", "the focus is on the one probability of the positive"),
        (focal_gamma and has_ids and equal_ids == "mean", "focal_gamma and equal_ids='mean'",
         "each of several positives would need a weight of its own, which takes the whole matrix; equal_ids='sum' has one probability"),
        (tau_plus is not None and label_smoothing, "tau_plus and label_smoothing",
         "the corrected sum of the negatives is an estimate, which leaves no distribution over the candidates to smooth"),
        (tau_plus is not None and several, f"tau_plus and equal_ids={equal_ids!r}",
         "the estimate corrects for positives that are not known, given one that is; equal_ids='exclude' leaves known ones out"),
        (tau_plus is not None and has_log_weights, "tau_plus and log_weights", "the lower bound exp(-scale) is that of similarities alone"),
    ):  # fmt: skip
        if together:
            raise ValueError(f"{NAME}: {these} do not compose: {why}")


def _two_sides(
    name: str, value: Tensor | tuple[Tensor, Tensor] | None, image: Tensor, text: Tensor, integer: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """``value`` for images and for texts."""
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{NAME}: {name} has {len(sides)} tensors; give one for pairs, or two, for images and for texts")
    for side, features, of in zip(sides, (image, text), ("images", "texts"), strict=True):
        _check.plain_tensors(NAME, **{"image": image, f"{name} of {of}": side})
        _check.vector(NAME, f"{name} of {of}", side, features.shape[0], integer=integer)
    return sides[0], sides[1]


def _check_negatives(name: str, extra: Tensor | NegativeQueue | None, anchors: Tensor) -> None:
    if extra is None:
        return
    features = extra.features if isinstance(extra, NegativeQueue) else extra
    _check.plain_tensors(NAME, **{"image": anchors, name: features})
    (count, width), shape = anchors.shape, tuple(features.shape)
    if features.dtype not in _check.FLOATS:
        raise TypeError(f"{NAME}: {name} are {features.dtype}; features must be float32, bfloat16 or float16 (or float64 on the CPU)")
    if len(shape) not in (2, 3) or shape[-1] != width or 0 in shape or (len(shape) == 3 and shape[0] != count):
        raise ValueError(
            f"{NAME}: {name} have shape {shape}; allowed: [J, {width}] (for all), [{count}, J, {width}] (J for each), or a NegativeQueue"
        )


def _check_prefixes(prefixes: Sequence[int] | None, weights: Sequence[float] | None) -> Sequence[float]:
    """The weight of each prefix's loss. The operator checks the range of the widths."""
    if prefixes is not None and not all(isinstance(width, int) for width in prefixes):
        raise TypeError(f"{NAME}: prefixes={list(prefixes)}; they must be ints, numbers of features")
    if weights is None:
        return [1.0] * (1 if prefixes is None else len(prefixes))
    if prefixes is None or len(weights) != len(prefixes):
        widths = "no prefixes" if prefixes is None else f"{len(prefixes)} prefixes"
        raise ValueError(f"{NAME}: {len(weights)} prefix_weights for {widths}; give one number for each prefix")
    return weights


def _prior(tau_plus: float | Tensor, like: Tensor, pairs: int) -> Tensor:
    """``tau_plus``, 0-d or [N], as a tensor like ``like``."""
    if not isinstance(tau_plus, Tensor):
        return torch.full_like(like, tau_plus, requires_grad=False)
    if tau_plus.ndim:
        _check.vector(NAME, "tau_plus", tau_plus, pairs)
    _check.plain_tensors(NAME, scale=like, tau_plus=tau_plus)
    if tau_plus.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(((tau_plus >= 0) & (tau_plus < 1)).all()):
        raise ValueError(f"{NAME}: tau_plus={tau_plus.tolist()}; a prior must be at least 0 and below 1")
    return tau_plus.to(like.dtype)
