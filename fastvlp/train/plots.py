"""Pictures of a run: curves of its log, and a sheet of retrievals."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastvlp.train.log import lines, series


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(log: Path, target: Path) -> None:
    """Loss, learning rate, gradient norm and speed of a log.jsonl over steps, and the scores where they were measured, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = lines(log)
    panels = [("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm"), ("images_per_second", "images per second")]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        steps, values = series(records, name)
        axes.plot(steps, values, color="tab:blue", linewidth=0.8, alpha=0.35 if name != "lr" else 1.0)
        if name != "lr":
            axes.plot(steps, smooth(values), color="tab:blue", linewidth=1.5)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if name == "grad_norm" and values and min(values) > 0:
            axes.set_yscale("log")
    scores = figure.axes[0].twinx()
    for name, colour in (("zero_shot_top1", "tab:orange"), ("retrieval_i2t_r10", "tab:green")):
        steps, values = series(records, name)
        if steps:
            scores.plot(steps, [100 * value for value in values], "o-", color=colour, label=name)
    if scores.lines:
        scores.set_ylabel("%")
        scores.legend(loc="upper center")
    else:
        scores.set_axis_off()
    figure.savefig(target, dpi=110)


def smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start."""
    result, average = [], 0.0
    for i, value in enumerate(values, 1):
        average = keep * average + (1 - keep) * value
        result.append(average / (1 - keep**i))
    return result


def retrieval_sheet(queries: Sequence[str], ranked: Sequence[Sequence[Tensor]], hits: Sequence[int | None], target: Path) -> None:
    """One row per query: its text and its pictures by falling similarity, as a PNG.

    Args:
        ranked: for each query the best pictures, uint8 [h, w, 3], the same number for each.
        hits: place of the query's own picture among them, which gets a frame, or None.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(queries), len(ranked[0])
    figure = Figure(figsize=(3 + 1.3 * columns, 1.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[2.3] + [1] * columns)
    for row, (query, pictures, hit) in enumerate(zip(queries, ranked, hits, strict=True)):
        label = figure.add_subplot(grid[row, 0])
        label.axis("off")
        label.text(0.98, 0.5, query if len(query) < 60 else query[:57] + "...", ha="right", va="center", wrap=True, parse_math=False)
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column + 1], xticks=[], yticks=[])
            axes.imshow(picture.numpy())
            for side in axes.spines.values():
                side.set(visible=column == hit, color="tab:green", linewidth=3)
    figure.savefig(target, dpi=90)
