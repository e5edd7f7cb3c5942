"""Pictures of the results, beside them: time and memory of every provider, accuracy over training time and over speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.registry import OPS
from benchmarks.report import load

_COLOURS = {"ours": "tab:red", "eager": "tab:gray", "compiled": "tab:blue", "rival": "tab:green"}


def plot(folder: Path, only: str | None = None) -> list[Path]:
    """Draw <op>.png for every result file below ``folder`` (or those of one name); returns what was written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures need matplotlib; install it with: pip install 'fastvlp[bench]'") from error
    matplotlib.use("Agg")
    written = []
    for device, files in load(folder).items():
        for name in [name for name in (*OPS, *ENDS) if name in files and only in (None, name)]:
            path = folder / device / f"{name}.png"
            ENDS.get(name, _bars)(files[name], path)
            written.append(path)
    return written


def _bars(content: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    rows = [row for row in content["rows"] if row["mode"] == content["rows"][-1]["mode"]]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(len(shapes), 2, figsize=(11, 1.2 + 2.2 * len(shapes)), squeeze=False, layout="constrained")
    figure.suptitle(f"{content['op']}, {rows[0]['mode']}, {rows[0]['dtype']}, {content['machine']['device']}")
    for (time, memory), shape in zip(axes, shapes, strict=True):
        some = [row for row in rows if row["shape"] == shape]
        names, colours = [row["provider"] for row in some], [_COLOURS[row["kind"]] for row in some]
        medians = [row["p50_ms"] for row in some]
        spread = [[row["p50_ms"] - row["p20_ms"] for row in some], [row["p80_ms"] - row["p50_ms"] for row in some]]
        time.barh(names, medians, xerr=spread, color=colours)
        time.set(xlabel="ms (median, 20th to 80th percentile)", title=shape)
        memory.barh(names, [row["extra_mb"] or 0 for row in some], color=colours)
        measured = any(row["extra_mb"] is not None for row in some)
        memory.set(xlabel="extra memory, MB" if measured else "extra memory (unmeasured)", title=shape)
        for axis in (time, memory):
            axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _accuracy(content: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for part in content["parts"]:
        points = part["curve"]
        marker = "." if len(points) > 1 else "o"
        axis.plot([point["seconds"] / 60 for point in points], [100 * point["top1"] for point in points], marker=marker, label=part["part"])
    axis.set(xlabel="training minutes", ylabel="zero-shot top-1, %", title=f"time to accuracy, mini set, {content['machine']['device']}")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _quality(content: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    fastest = max(system["images_per_second"] for system in content["systems"])
    for system in content["systems"]:
        scores = [100 * score for score in system["top1_of_seeds"]]
        mean, speed = 100 * system["top1"], system["images_per_second"]
        axis.errorbar(speed, mean, yerr=[[mean - min(scores)], [max(scores) - mean]], fmt="o", capsize=3)
        axis.annotate(system["system"], (speed, mean), ha="left" if speed < fastest else "right",
                      xytext=(6 if speed < fastest else -6, 6), textcoords="offset points")  # fmt: skip
    axis.set(xlabel="images/s in training", ylabel="zero-shot top-1, % (range of the seeds)",
             title=f"the same samples, fewer tokens, mini set\n{content['machine']['device']}")  # fmt: skip
    axis.margins(0.2)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


ENDS = {"mini": _accuracy, "quality": _quality}
