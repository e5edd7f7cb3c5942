"""What ``fastvlp.accelerate`` does to the blocks of an image tower, planned and checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fastvlp.layers.token_merger import mergeable

from . import families, instances
from .accelerate import Replacement, Saving
from .tokens import Step, attention_forward, block_forward


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
            if isinstance(r, bool) or not isinstance(r, int | float) or not r >= 0 or (isinstance(r, float) and r >= 1):
                raise ValueError(f"fastvlp.accelerate: merge is {r!r}; it must be a count of 0 or more, or a share of the tokens below 1")
        return each


@dataclass(frozen=True)
class Plan:
    """The steps of the blocks of one tower, and what they should save."""

    blocks: tuple[tuple[str, nn.Module, Step], ...]
    savings: tuple[Saving, ...]


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


def plan(path: str, tower: families.Tower, switches: Switches) -> Plan:
    """Which block does what.

    Raises:
        ValueError: the switches do not fit the tower.
    """
    if switches.drop and tower.padded:
        raise ValueError(
            "fastvlp.accelerate: drop= takes towers whose pooling needs no mask of the tokens; NaFlexVit has patch_drop_rate, and for "
            "SigLIP 2 drop patches where its batches are made"
        )
    schedule = switches.schedule(len(tower.blocks))
    blocks, savings, tokens = [], [], tower.tokens
    for place, ((name, block), r) in enumerate(zip(tower.blocks, schedule, strict=True)):
        step = Step(
            tower.family, r, (switches.drop or 0.0) if place == 0 else 0.0, switches.attention == "packed", switches.pack, any(schedule),
            tower.prefix, place == len(schedule) - 1,
        )  # fmt: skip
        name = f"{path}.{name}" if path else name
        blocks.append((name, block, step))
        if tokens is not None and tower.tokens is not None:
            left = tokens - mergeable(tokens, r, tower.prefix)
            attention = getattr(block, tower.family.attention)
            flops = _flops(block, attention, tokens, left)
            savings.append(Saving(name, (tokens, left), flops, _flops(block, attention, tower.tokens, tower.tokens)))
            tokens = left
    return Plan(tuple(blocks), tuple(savings))


def _flops(block: nn.Module, attention: nn.Module, before: int, after: int) -> float:
    """Two for each weight and token, and 4 C n n for the attention itself."""
    weights = {part: sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (block, attention)}
    width = next(p.shape[-1] for p in attention.parameters() if p.ndim == 2)
    return 2.0 * weights[attention] * before + 2.0 * (weights[block] - weights[attention]) * after + 4.0 * width * before**2


def replace(plan: Plan) -> list[Replacement]:
    """Change the blocks and their attentions."""
    savings = {saving.path: saving for saving in plan.savings}
    replaced = []
    for path, block, step in plan.blocks:
        attention: nn.Module = getattr(block, step.family.attention)
        inner = f"{path}.{step.family.attention}"
        for name, module, build, change, expected in (
            (path, block, block_forward, _change(step), _expected(step, savings.get(path))),
            (inner, attention, attention_forward, "packed_attention where its block asks for it", "counted with its block"),
        ):
            replaced.append(Replacement(name, module, type(module), build, change, expected))
            instances.change(module, build, step)
    return replaced


def _change(step: Step) -> str:
    changes = []
    if step.drop:
        changes.append(f"drops {step.drop:.0%} of the patches in training")
    if step.merge:
        changes.append(f"merges {step.merge if isinstance(step.merge, int) else f'{step.merge:.0%} of the'} token{'s' * (step.merge != 1)}")
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
