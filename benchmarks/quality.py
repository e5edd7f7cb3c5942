"""What dropping, merging and packing do to speed and accuracy: the default recipe, on the same number of samples each time.

Every part (one variant with one seed) runs in a process of its own and leaves results/<device>/quality/<part>.json at once. --variant runs
some of them now and keeps what is there of the others; --resume runs what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import tempfile
from pathlib import Path

from benchmarks import e2e, ladder, plot

STAGES = ("schedule.stages.0.keep=1.0", "schedule.stages.1.keep=1.0")
MERGE = f"model.image.merge={list(ladder.MERGE)}"  # 16 patches to 7, a little below the half that the recipe keeps
QUICK = ("schedule.steps=5", "schedule.warmup=1", "data.batch_size=8", "model.image.width=24", "model.text.width=24")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Changes of the default recipe, and whether the towers are padded."""

    changes: tuple[str, ...] = ()
    padded: bool = False


VARIANTS = {
    "all patches": Variant(STAGES),
    "half dropped": Variant(),
    "merged": Variant((*STAGES, MERGE)),
    "half dropped and merged": Variant((MERGE,)),
    "all patches padded": Variant(STAGES, padded=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run --e2e quality`` beside those of ``mini`` (--seeds, --resume, --set)."""
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="quality: only this one now; may be repeated")


def parts(arguments: argparse.Namespace) -> list[e2e.Part]:
    """Every variant with every seed."""
    extra = [*(QUICK if arguments.quick else ()), *arguments.set]
    return [
        e2e.ours(name, seed, [*variant.changes, *extra], ("benchmarks.padded_train",) if variant.padded else ("fastvlp", "train"))
        for name, variant in VARIANTS.items() for seed in arguments.seeds
    ]  # fmt: skip


def run(arguments: argparse.Namespace, out: Path | None) -> None:
    """Measure, and draw quality.png where matplotlib is installed; without ``out`` nothing stays."""
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            run(arguments, Path(scratch))
        return
    e2e.run_parts("quality", parts(arguments), out, arguments.resume, arguments.variant)
    if importlib.util.find_spec("matplotlib") is not None:
        plot.plot(out, only="quality")
