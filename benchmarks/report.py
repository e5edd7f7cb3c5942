"""The tables in the READMEs and in docs/ and a picture for each operator's page, made from the result files and never typed, and a page of
all results.

A table stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``; NAME is one of TABLES. What was not measured stays
empty and says so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import html
from benchmarks.changes import CHANGES
from benchmarks.machine import ROOT
from benchmarks.registry import MODES, OPS, find, suggest
from benchmarks.run import Row, write_text

FILES = (ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
UNMEASURED = "unmeasured"
MODELS = ("towers", "merging", "accelerate")  # cases of whole models, with tables of their own
LOSSES = ("matryoshka", "objectives")  # cases of losses, which are no operators
_BLOCK = re.compile(r"(<!-- begin: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end: (?P=name) -->)", re.DOTALL)

Results = dict[str, dict[str, dict[str, Any]]]  # device -> op -> content of the file


def load(folder: Path) -> Results:
    """Every result file below ``folder``, by device and name."""
    found: Results = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    """At least ``digits`` significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _best(rows: Sequence[Row], kind: str) -> Row | None:
    return min((row for row in rows if row["kind"] == kind), key=lambda row: row["p50_ms"], default=None)


def _named(rows: Sequence[Row], provider: str) -> Row | None:
    return next((row for row in rows if row["provider"] == provider), None)


def _ours(rows: Sequence[Row]) -> list[Row]:
    """Our rows, fastest first, without those that another beats in time and in memory."""
    chosen: list[Row] = []
    for row in sorted((row for row in rows if row["kind"] == "ours"), key=lambda row: row["p50_ms"]):
        if all(row["extra_mb"] is not None and row["extra_mb"] < 0.9 * other["extra_mb"] for other in chosen):
            chosen.append(row)
    return chosen


def _ms(row: Row | None, name: bool = False) -> str:
    if row is None:
        return ""
    graph = f", {_number(row['graph_ms'])} as a CUDA graph" if row.get("graph_ms") else ""
    return f"{_number(row['p50_ms'])}{' (' + row['provider'].removeprefix('fastvlp ') + ')' if name else ''}{graph}"


def _kind(device: str) -> str:
    return "cpu" if device.startswith("cpu-") else "cuda"


def _measurements(results: Results, op: str, mode: str) -> list[tuple[str, str, list[Row]]]:
    """(device, shape, rows), every shape of the case at least once: without rows where no device of that kind has measured it."""
    found = []
    for kind in ("cpu", "cuda"):
        devices = [device for device in results if _kind(device) == kind and op in results[device]]
        for shape in find(op).shapes(kind, False):
            for device in devices or [""]:
                rows = results[device][op]["rows"] if device else []
                found.append((device or {"cpu": "CPU", "cuda": "CUDA GPU"}[kind], shape.name,
                              [row for row in rows if row["shape"] == shape.name and row["mode"] == mode]))
    return found


def operator(op: str) -> Callable[[Results], str]:
    """The table of one operator, forward and, where it has a gradient, backward: ours, the others, memory and error."""

    def table(results: Results) -> str:
        header = ("device", "size", "fastvlp ms", "eager ms", "torch.compile ms", "best other package ms", "faster than it", "than eager",
                  "share of limit", "extra MB: ours", "eager", "error: ours", "eager")
        lines = []
        for device, shape, rows in _measurements(results, op, find(op).modes[-1]):
            eager, rival = _best(rows, "eager"), _best(rows, "rival")
            lines += [
                [device, shape, _ms(ours, name=True), _ms(eager), _ms(_best(rows, "compiled")), _ms(rival, name=True),
                 f"{ours['ratio_rival']:.2f}x" if rival else "", f"{ours['ratio_eager']:.2f}x" if eager else "",
                 f"{ours['share_of_limit']:.0%}", _number(ours["extra_mb"]), _number(eager["extra_mb"]) if eager else "",
                 f"{ours['error']:.1e}", f"{eager['error']:.1e}" if eager else ""]
                for ours in _ours(rows)
            ] or [[device, shape, UNMEASURED, *[""] * (len(header) - 3)]]  # fmt: skip
        return _table(header, lines)

    return table


def towers(results: Results) -> str:
    """Packed towers against the padded twin with the same weights, and against other packages'."""
    header = ("device", "size", "packed ms", "padded ms", "open_clip ms", "NaViT ms", "tokens padded / packed", "faster",
              "share of the token ratio")  # fmt: skip
    lines = []
    for device, shape, rows in _measurements(results, "towers", "forward+backward"):
        ours = _best(rows, "ours")
        if ours is None:
            lines.append([device, shape, UNMEASURED, *[""] * (len(header) - 3)])
            continue
        ratio = results[device]["towers"]["facts"][shape]["token_ratio"]
        faster = ours["ratio_eager"]
        times = [_ms(ours), _ms(_best(rows, "eager")), *(_ms(_named(rows, name)) for name in ("open_clip", "NaViT"))]
        lines.append([device, shape, *times, f"{ratio:.2f}", f"{faster:.2f}x", f"{faster / ratio:.0%}"])
    return _table(header, lines)


def merging(results: Results) -> str:
    """A model whose blocks merge tokens, inference: against the untouched model and against eager ToMe."""
    header = ("device", "model", "fastvlp ms", "eager ToMe ms", "unmerged ms", "operations saved", "faster than unmerged",
              "than eager ToMe")  # fmt: skip
    lines = []
    for device, shape, rows in _measurements(results, "merging", "forward"):
        ours = _best(rows, "ours")
        if ours is None:
            lines.append([device, shape, UNMEASURED, *[""] * (len(header) - 3)])
            continue
        times = [_ms(ours), _ms(_best(rows, "eager")), _ms(_best(rows, "rival"))]
        saved = results[device]["merging"]["facts"][shape]["flops_saved"]
        lines.append([device, shape, *times, f"{saved:.0%}", f"{ours['ratio_rival']:.2f}x", f"{ours['ratio_eager']:.2f}x"])
    return _table(header, lines)


def accelerate(results: Results) -> str:
    """``fastvlp.accelerate``: a training step of each image tower, and how many times faster it is with each switch."""
    switches = ("merge", "drop", "pack")
    header = ("device", "model", "untouched ms", *(f"{switch}{more}" for switch in switches for more in (" ms", ", faster")))
    lines = []
    for device, shape, rows in _measurements(results, "accelerate", "forward+backward"):
        untouched = _named(rows, "untouched")
        if untouched is None:
            lines.append([device, shape, UNMEASURED, *[""] * (len(header) - 3)])
            continue
        found = [_named(rows, f"fastvlp {switch}") for switch in switches]
        cells = [cell for row in found for cell in (_ms(row), f"{row['ratio_eager']:.2f}x" if row else "")]
        lines.append([device, shape, _ms(untouched), *cells])
    return _table(header, lines)


def dropping(results: Results) -> str:
    """``patch_embed`` with patches dropped before it, and after it."""
    header = ("device", "size", "pass", "dropped before, ms", "dropped after, ms", "cheaper")
    lines = []
    for mode in MODES:
        for device, shape, rows in _measurements(results, "patch_embed", mode):
            after = _best([row for row in rows if row["provider"].endswith(", dropped after")], "ours")
            before = _best([row for row in rows if not row["provider"].endswith(", dropped after")], "ours")
            if before and after:
                ratio = after["p50_ms"] / before["p50_ms"]
                lines.append([device, shape, mode, _ms(before), _ms(after), f"{ratio:.2f}x"])
    return _table(header, lines or [["CPU", "half of the patches", UNMEASURED, *[""] * (len(header) - 3)]])


def operators(results: Results) -> str:
    """One line per operator for kernels/README.md: what it computes and the fastest measured, with its share of the limit."""
    lines = []
    for op in OPS:
        if op in (*MODELS, *LOSSES):
            continue
        fastest = []
        for device, shape, rows in _measurements(results, op, find(op).modes[-1]):
            ours = _best(rows, "ours")
            if ours is not None:
                fastest.append(f"{_ms(ours)} ms, {ours['share_of_limit']:.0%} of the limit ({shape}, {device})")
        lines.append([f"`{op}`", f"`{find(op).formula}`", find(op).limit, "<br>".join(fastest) or UNMEASURED])
    return _table(("operator", "formula", "limit, forward + backward", "fastest measured"), lines)


def mini(results: Results) -> str:
    """Time to accuracy on the shipped data set."""
    header = ("device", "system", "seeds", "training minutes", "top-1 %", "of each seed", "top-5 %", "clip-art R@10 %", "images/s",
              "parameters of the towers")  # fmt: skip
    lines = []
    for device, files in results.items():
        for system in files.get("mini", {}).get("systems", []):
            lines.append([
                device, system["system"], str(len(system["seeds"])), f"{system['train_seconds'] / 60:.1f}", f"{100 * system['top1']:.1f}",
                ", ".join(f"{100 * x:.1f}" for x in system["top1_of_seeds"]), f"{100 * system['top5']:.1f}",
                f"{100 * system['i2t_r10']:.1f}", f"{system['images_per_second']:.0f}", f"{system['tower_parameters'] / 1e6:.2f} M",
            ])  # fmt: skip
    if not lines:
        lines = [["CPU", system, UNMEASURED, *[""] * (len(header) - 3)] for system in ("open_clip", "fastvlp")]
    reached = ["", *(f"{device}: {', '.join(_reached(system) for system in files['mini']['systems'])}.\n"
                     for device, files in results.items() if "mini" in files)]  # fmt: skip
    return _table(header, lines) + ("\n".join(reached) if len(reached) > 1 else "")


def quality(results: Results) -> str:
    """What dropping and merging patches cost and save on the same samples; below it the picture of ``benchmarks.plot``, where measured."""
    header = ("device", "training", "seeds", "images/s", "than all patches", "minutes", "top-1 %", "of each seed", "top-5 %")
    lines, pictures = [], []
    for device, files in results.items():
        systems = files.get("quality", {}).get("systems", [])
        base = next((system["images_per_second"] for system in systems if system["system"] == "all patches"), None)
        lines += [
            [device, system["system"], str(len(system["seeds"])), f"{system['images_per_second']:.0f}",
             f"{system['images_per_second'] / base:.2f}x" if base else "", f"{system['train_seconds'] / 60:.1f}",
             f"{100 * system['top1']:.1f}", ", ".join(f"{100 * x:.1f}" for x in system["top1_of_seeds"]), f"{100 * system['top5']:.1f}"]
            for system in systems
        ]  # fmt: skip
        if systems:
            pictures.append(f"\n![Zero-shot top-1 over images/s on {device}](benchmarks/results/{device}/quality.png)\n")
    return _table(header, lines or [["CPU", "all patches", UNMEASURED, *[""] * (len(header) - 3)]]) + "".join(pictures)


def recipes(results: Results) -> str:
    """What papers claim and what their recipes show on the shipped data."""
    header = ("id", "recipe", "the paper's claim", "measure, at equal", "recipe", "baseline", "difference, 95 % interval", "shown",
              "samples/s", "command")  # fmt: skip
    lines = [[str(row["id"]), f"`{row['row']}`", row["claim"], f"{row['measure']}, {row['equal']}", _number(row["ours"]),
              _number(row["baseline"]), f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})", row["shown"],
              f"{row['ours_samples_per_second']:.0f} and {row['baseline_samples_per_second']:.0f}", f"`{row['command']}`"]
             for files in results.values() for row in files.get("recipes", {}).get("rows", [])]  # fmt: skip
    return _table(header, lines or [["", "", UNMEASURED, *[""] * (len(header) - 3)]])


def ladder(results: Results) -> str:
    """Every rung from open_clip's training step to ours."""
    header = ("device", "rung", "what it is", "images/s", "than open_clip's", "than the one before", "extra MB")
    lines = [
        [device, row["rung"], row["about"], f"{row['images_per_second']:.0f}", f"{row['ratio_first']:.2f}x",
         f"{row['ratio_previous']:.2f}x", _number(row["extra_mb"])]
        for device, files in results.items() for row in files.get("ladder", {}).get("rows", [])
    ]  # fmt: skip
    return _table(header, lines or [["CPU", "open_clip", UNMEASURED, *[""] * (len(header) - 3)]])


def scaling(results: Results) -> str:
    """Time and memory of ours and of open_clip's as a batch, a picture or the number of processes grows."""
    header = ("device", "what grows", "to", "ours", "ms", "extra MB", "open_clip ms", "its extra MB", "faster")
    lines = []
    for device, files in results.items():
        rows = files.get("scaling", {}).get("rows", [])
        others = {(row["sweep"], row["x"]): row for row in rows if row["kind"] == "rival"}
        for row in (row for row in rows if row["kind"] == "ours"):
            other = others.get((row["sweep"], row["x"]), {})
            cells = [row.get("note") or _number(row["p50_ms"]), _number(row.get("extra_mb"))]
            cells += [other.get("note") or _number(other.get("p50_ms")), _number(other.get("extra_mb"))]
            ratio = row.get("ratio_rival")
            lines.append([device, row["sweep"], str(row["x"]), row["provider"], *cells, f"{ratio:.2f}x" if ratio else ""])
    return _table(header, lines or [["CPU", "batch", UNMEASURED, *[""] * (len(header) - 3)]])


def systems(results: Results) -> str:
    """The systems that ship, by the first lines of their files: nothing in it is measured."""
    from fastvlp import config

    lines = []
    for name in config.names():
        first = (sys.modules[f"fastvlp.systems.{name}"].__doc__ or "").splitlines()[0]
        system, _, what = first.partition(": ")
        lines.append([f"`{name}`", system, what.rstrip(".")])
    return _table(("recipe", "system", "what it does"), lines)


def soak(results: Results) -> str:
    """What the last soak on each device tried, and what it lost."""
    parts = [(device, part) for device, content in results.items() for part in content.get("soak", {}).get("parts", ())]
    lines = [[device, part["part"], part["about"], f"{part['cases']:,}", f"{part['faults']:,}", (part["failure"] or "none").splitlines()[0]]
             for device, part in parts]
    return _table(("device", "part", "what", "cases", "faults survived", "lost"), lines or [[UNMEASURED, *[""] * 5]])


def changes(results: Results) -> str:
    """Changes that have to be noticed, and by what: nothing in it is measured."""
    lines = [(change.about, f"`{change.file}`", f"`{change.test}`") for change in CHANGES]
    return _table(("change", "file", "test that notices"), lines)


def _reached(system: dict[str, Any]) -> str:
    return f"{system['system']} {100 * system['top1']:.1f} % top-1 after {system['train_seconds'] / 60:.1f} minutes"


TABLES: dict[str, Callable[[Results], str]] = {
    **{op.replace("_", "-"): operator(op) for op in OPS if op not in MODELS}, "towers": towers, "merging": merging, "operators": operators,
    "accelerate": accelerate, "patch-dropping": dropping,
    "mini": mini, "quality": quality, "recipes": recipes, "ladder": ladder, "scaling": scaling,
    "systems": systems, "soak": soak, "changes": changes,
}  # fmt: skip


def render(text: str, results: Results, source: str) -> str:
    """The text with every marked table replaced.

    Raises:
        ValueError: a marker names no table, or has no end.
    """
    begun, closed = len(re.findall(r"<!-- begin: ", text)), len(_BLOCK.findall(text))
    if begun != closed:
        need = "every <!-- begin: NAME --> line needs its <!-- end: NAME -->"
        raise ValueError(f"{source}: {begun} tables begin and {closed} of them end; {need}")

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"{source}: {suggest(name, list(TABLES), 'table')}")
        return f"{match[1]}{TABLES[name](results)}{match[4]}"

    return _BLOCK.sub(replace, text)


def main(folder: Path, check: bool, files: Sequence[Path] = FILES, page: Path | None = None) -> int:
    """Write the tables into the files that exist, operators/OP.md's picture to assets/OP.svg, and the page (index.html, or ``page``).

    With ``check`` only compare what exists, and return 1 where something is out of date.
    """
    results, stale = load(folder), []
    wanted = {path: render(path.read_text(encoding="utf-8"), results, str(path)) for path in files if path.exists()}
    wanted |= {path.parents[1] / "assets" / f"{path.stem}.svg": html.picture(path.stem, results) for path in wanted
               if path.parent.name == "operators" and path.stem in OPS}  # fmt: skip
    page = page or folder / "index.html"
    if page.exists() or not check:
        wanted[page] = html.page(results)
    for path, new in wanted.items():
        if not path.exists() or new != path.read_text(encoding="utf-8"):
            stale.append(path)
            if not check:
                write_text(path, new)
    for path in stale:
        print(f"{path}: {'out of date; run python -m benchmarks report' if check else 'written'}", file=sys.stderr if check else sys.stdout)
    return int(check and bool(stale))
