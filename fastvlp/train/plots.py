"""Pictures of a run: curves of its log, and a sheet of retrievals."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastvlp.train.log import lines, series

if TYPE_CHECKING:
    from PIL import Image

CELL, FRAME, TEXT = 100, 3, 2.5  # pixels of a cell and of its frame; width of the texts in inches of CELL pixels
GREEN = (44, 160, 44)
PANELS = (("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm"), ("samples_per_second", "samples per second"))


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(log: Path, target: Path) -> None:
    """Loss, learning rate, gradient norm and speed of a log.jsonl over steps, and the scores where they were measured, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = lines(log)
    figure = Figure(figsize=(11, 7), layout="tight")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
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


def retrieval_sheet(queries: Sequence[str], ranked: Sequence[Sequence[Image.Image]], hits: Sequence[int | None], target: Path) -> None:
    """One row per query: its text and its pictures by falling similarity, as a PNG.

    Args:
        ranked: for each query the best pictures, the same number for each.
        hits: place of the query's own picture among them, which gets a green frame, or None.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(queries), len(ranked[0])
    sheet = np.full((rows * CELL, columns * CELL, 3), 255, np.uint8)
    for row, (pictures, hit) in enumerate(zip(ranked, hits, strict=True)):
        for column, picture in enumerate(pictures):
            cell = sheet[row * CELL:(row + 1) * CELL, column * CELL:(column + 1) * CELL]
            if column == hit:
                cell[1:-1, 1:-1] = GREEN
                cell[1 + FRAME:-1 - FRAME, 1 + FRAME:-1 - FRAME] = 255
            inside = picture.copy()
            inside.thumbnail((CELL - 2 * FRAME - 4,) * 2)
            top, left = (CELL - inside.height) // 2, (CELL - inside.width) // 2
            cell[top:top + inside.height, left:left + inside.width] = np.asarray(inside)

    width, height = TEXT + columns, rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((TEXT / width, 0, columns / width, 1))
    axes.imshow(sheet)
    axes.axis("off")
    for row, query in enumerate(queries):
        figure.text(0.95 * TEXT / width, 1 - (row + 0.5) / rows, textwrap.fill(textwrap.shorten(query, 90, placeholder=" ..."), 30),
                    ha="right", va="center", fontsize=9, parse_math=False)
    figure.savefig(target, dpi=CELL)
