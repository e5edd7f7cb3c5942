"""What ``fastvlp.accelerate`` does to the blocks of an image tower, planned and checked before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from . import families, instances
from .blocks import Step, attention_forward, block_forward, thinned_forward
from .report import Replacement, Saving
from .tokens import merged_away


@dataclass(frozen=True)
class Switches:
    """What the caller asked for; checked by :func:`plan`."""

    merge: int | float | Sequence[int | float] | None
    drop: float | None
    attention: str | None
    pack: bool

    def __post_init__(self) -> None:
        if self.attention not in (None, "packed"):
            raise ValueError(f"fastvlp.accelerate: attention={self.attention!r} is unknown; allowed: 'packed' and None")
        if self.drop is not None and not 0 <= self.drop < 1:
            raise ValueError(f"fastvlp.accelerate: drop is {self.drop}; it must be the share of patches that is dropped, from 0 to below 1")

    @property
    def on(self) -> bool:
        """Whether anything of the towers is to change."""
        return self.merge is not None or self.drop is not None or self.attention is not None or self.pack

    def schedule(self, depth: int) -> list[int | float]:
        """What each of ``depth`` blocks merges."""
        merge = 0 if self.merge is None else self.merge
        each = [merge] * depth if isinstance(merge, int | float) else list(merge)
        if len(each) != depth:
            raise ValueError(f"fastvlp.accelerate: merge has {len(each)} numbers; this tower has {depth} blocks and needs one for each")
        for r in each:
            # True is an int, too, and would merge one token.
            if isinstance(r, bool) or not isinstance(r, int | float) or not r >= 0 or (isinstance(r, float) and r >= 1):
                raise ValueError(f"fastvlp.accelerate: merge is {r!r}; it must be a count of 0 or more, or a share of the tokens below 1")
        return each


@dataclass(frozen=True)
class Plan:
    """The steps of the blocks of one tower, what they should save, and the tower itself if it is to thin its masks."""

    blocks: tuple[tuple[str, nn.Module, Step], ...]
    savings: tuple[Saving, ...]
    thinned: tuple[str, nn.Module, float] | None


def find_all(model: nn.Module) -> tuple[list[tuple[str, families.Tower]], list[str]]:
    """The towers in ``model`` by path, and why others cannot be accelerated."""
    towers, unknown = [], []
    for path, module in model.named_modules():
        found = families.find(module)
        if isinstance(found, families.Tower):
            towers.append((path, found))
        elif found is not None:
            unknown.append(f"{path or 'the model'} ({type(module).__name__}): {found}")
    return towers, unknown


def plan(model: nn.Module, switches: Switches, found: Sequence[tuple[str, families.Tower]]) -> list[Plan]:
    """Which block of which tower does what; a block that two towers share is planned once.

    Raises:
        ValueError: the switches do not fit a tower, or a block would have to do two things.
    """
    if switches.drop:
        for module in model.modules():
            # By name, which spares importing transformers.
            if any(cls.__name__ == "ViTForMaskedImageModeling" for cls in type(module).__mro__):
                raise ValueError("fastvlp.accelerate: ViTForMaskedImageModeling rebuilds every patch, and drop= leaves holes; leave it out")
    seen: dict[nn.Module, Step] = {}
    return [_plan(path, tower, switches, seen) for path, tower in found]


def _plan(path: str, tower: families.Tower, switches: Switches, seen: dict[nn.Module, Step]) -> Plan:
    if switches.drop and tower.drops:
        raise ValueError(
            f"fastvlp.accelerate: drop= on a tower that drops {tower.drops:.0%} of its patches itself (patch_drop_rate of timm, "
            "patch_dropout of open_clip) would drop twice; build the model with that at 0, or leave drop out"
        )
    thinned = bool(switches.drop) and tower.padded
    if thinned and tower.family is families.TIMM:
        raise ValueError("fastvlp.accelerate: drop= is not for NaFlexVit; give it patch_drop_rate, which it has itself")
    schedule = switches.schedule(len(tower.blocks))
    blocks, savings, tokens = [], [], tower.tokens
    for place, ((name, block), r) in enumerate(zip(tower.blocks, schedule, strict=True)):
        step = Step(
            tower.family, r, any(schedule), (switches.drop or 0.0) if place == 0 and not thinned else 0.0, thinned,
            switches.attention == "packed", switches.pack, tower.prefix, place == len(schedule) - 1,
        )  # fmt: skip
        name = f"{path}.{name}" if path else name
        # A module has one forward: two towers that share it must ask for the same.
        if seen.setdefault(block, step) != step:
            raise ValueError(
                f"fastvlp.accelerate: {name} is a block that stands elsewhere in the model too, and would have to do something else there; "
                "leave merge and drop out, or give each place a block of its own"
            )
        blocks.append((name, block, step))
        if tokens is not None and tower.tokens is not None:
            left = tokens - merged_away(tokens, r, tower.prefix)
            attention = getattr(block, tower.family.attention)
            flops = _flops(block, attention, tokens, left)
            savings.append(Saving(name, (tokens, left), flops, _flops(block, attention, tower.tokens, tower.tokens)))
            # What a block merges is gone for all blocks after it.
            tokens = left
    if any(schedule) and tokens is not None and tokens == tower.tokens:
        warnings.warn(
            f"fastvlp.accelerate: merge={switches.merge} merges nothing in {path or 'the model'}: none of its blocks has tokens enough (an "
            f"image has {tokens}, {tower.prefix} of them protected); a share below 1 is rounded down to whole tokens",
            stacklevel=4,
        )
    return Plan(tuple(blocks), tuple(savings), (path, tower.module, switches.drop or 0.0) if thinned else None)


def _flops(block: nn.Module, attention: nn.Module, before: int, after: int) -> float:
    """Two for each weight and token, and 4 C n n for the attention itself."""
    # Matrices only: biases and norms are a thousandth of the work.
    weights = {part: sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (block, attention)}
    width = next((p.shape[-1] for p in attention.parameters() if p.ndim == 2), 0)
    return 2.0 * weights[attention] * before + 2.0 * (weights[block] - weights[attention]) * after + 4.0 * width * before**2


def replace(plan: Plan) -> list[Replacement]:
    """Change the blocks and their attentions."""
    savings = {saving.path: saving for saving in plan.savings}
    replaced = []
    if plan.thinned is not None:
        path, tower, drop = plan.thinned
        change = f"hides {drop:.0%} of the real patches in training"
        replaced.append(Replacement(path, tower, type(tower), change, "its blocks leave them out"))
        # Towers that take a mask of padding drop by hiding more of it.
        instances.change(tower, thinned_forward, drop)
    for path, block, step in plan.blocks:
        attention: nn.Module = getattr(block, step.family.attention)
        inner = f"{path}.{step.family.attention}"
        for name, module, build, change, expected in (
            (path, block, block_forward, _change(step, savings.get(path)), _expected(step, savings.get(path))),
            (inner, attention, attention_forward, "packed_attention where its block asks for it", "counted with its block"),
        ):
            if not instances.changed(module):
                replaced.append(Replacement(name, module, type(module), change, expected))
                instances.change(module, build, step)
    return replaced


def _change(step: Step, saving: Saving | None) -> str:
    changes = []
    if step.drop:
        changes.append(f"drops {step.drop:.0%} of the patches in training")
    if step.merge:
        what = f"{step.merge} token{'s' * (step.merge != 1)}" if isinstance(step.merge, int) else f"{step.merge:.0%} of the tokens"
        nothing = saving is not None and saving.tokens[0] == saving.tokens[1]
        changes.append(f"merges nothing (asked for {what})" if nothing else f"merges {what}")
    if step.packed:
        changes.append("attends by packed_attention")
    if step.pack:
        changes.append("leaves padding out")
    return ", ".join(changes) or "computes as before (nothing is switched on for it)"


def _expected(step: Step, saving: Saving | None) -> str:
    if saving is None:
        return "how much depends on the numbers of tokens"
    after, share = saving.tokens[1], 1 - saving.flops / saving.flops_before
    text = f"saves {share:.0%} of its operations ({saving.tokens[0]} tokens, {after} in the MLP)"
    return f"{text}, and all blocks {step.drop:.0%} of the patches in training" if step.drop else text
