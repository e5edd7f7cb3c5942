"""One self-contained page of all results: tables, bars, curves over size, a roofline picture, versions. No script, no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from benchmarks.run import Row
from benchmarks.svg import Bar, Mark, Series, bars, curves, number, roofline

_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_MODES = ("forward+backward", "forward")
_COLUMNS = ("provider", "size", "ms", "20–80 %", "faster than the best other", "than eager", "of the limit", "TFLOP/s", "extra MB",
            "error", "dtype", "version")  # fmt: skip
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2128;--soft:#59636e;--rule:#d8dee4;--shade:#f6f8fa;
--ours:#c2410c;--eager:#6b7280;--compiled:#2563eb;--rival:#15803d}
@media(prefers-color-scheme:dark){:root{--paper:#0f1318;--ink:#e6eaef;--soft:#9aa5b1;--rule:#323a44;--shade:#181e25;
--ours:#fb923c;--eager:#9ca3af;--compiled:#60a5fa;--rival:#4ade80}}
*{box-sizing:border-box}body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.3rem;margin:2.2em 0 .4em;border-bottom:1px solid var(--rule)}h3{margin:2em 0 .2em}
p{margin:.4em 0}.soft,figcaption{color:var(--soft);font-size:.9rem}a{color:inherit}nav a{margin-right:1em;display:inline-block}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem 2rem;margin:1rem 0}
figure{margin:0;max-width:30rem}figcaption{margin-bottom:.3em}svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto;max-width:100%;border:1px solid var(--rule);border-radius:6px;margin:.6em 0}
table{border-collapse:collapse;font-size:.85rem;white-space:nowrap;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3em .7em;text-align:left;border-top:1px solid var(--rule)}th{background:var(--shade);border-top:0}
tr.ours td{font-weight:600}.key::before{content:"";display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em;
background:var(--c)}.key{margin-right:1em;white-space:nowrap}
text{font:11px system-ui,sans-serif;fill:var(--ink)}text.strong{font-weight:600}
.ours{fill:var(--ours);--c:var(--ours)}.eager{fill:var(--eager);--c:var(--eager)}.compiled{fill:var(--compiled);--c:var(--compiled)}
.rival{fill:var(--rival);--c:var(--rival)}.curve{fill:none;stroke:var(--c);stroke-width:2}.roof{--c:var(--soft)}
.grid{stroke:var(--rule)}.mark{stroke:var(--paper)}
.limit{stroke:var(--ink);stroke-dasharray:2 2}text.inside{fill:var(--paper);font-weight:700;font-size:10px}
"""
_ALONE = """text{font:11px system-ui,sans-serif;fill:#808890}text.strong{font-weight:600}.limit{stroke:#808890;stroke-dasharray:2 2}
.ours{fill:#ea580c}.eager{fill:#8b929c}.compiled{fill:#3b82f6}.rival{fill:#16a34a}"""  # an image follows no page: hues for light and dark


def _anchor(*words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], styles: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f'<tr class="{style}">{"".join(f"<td>{escape(cell)}</td>" for cell in line)}</tr>\n'
                   for line, style in zip(lines, styles, strict=True))  # fmt: skip
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>\n"


def _optional(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form) if form else number(value)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _row(row: Row) -> list[str]:
    return [
        row["provider"], row["shape"], number(row["p50_ms"]), f"{number(row['p20_ms'])}–{number(row['p80_ms'])}",
        f"{_times(row['ratio_rival'])} {row['rival']}" if row.get("rival") else "", _times(row["ratio_eager"]),
        _optional(row["share_of_limit"], ".0%"), _optional(row.get("tflops")), _optional(row["extra_mb"]), _optional(row["error"], ".1e"),
        row["dtype"], row.get("version", ""),
    ]  # fmt: skip


def _by_size(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["shape"], []).append(row)
    return found


def _share_bars(rows: Sequence[Row], mode: str) -> str:
    groups = [(shape, [Bar(row["provider"], row["kind"], row["share_of_limit"], f"{row['share_of_limit']:.0%} {number(row['p50_ms'])} ms")
                       for row in sorted(some, key=lambda row: row["p50_ms"])]) for shape, some in _by_size(rows).items()]  # fmt: skip
    return _figure(f"{mode}: share of the device's limit (dashed) and median time", bars(groups, f"share of the limit, {mode}"))


def picture(op: str, results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One operator as an SVG file: forward + backward, everybody's time at each size; the dashed line is eager PyTorch's."""
    groups = []
    for device, files in results.items():
        rows = (row for row in files.get(op, {}).get("rows", []) if row["mode"] == _MODES[0])
        for shape, some in _by_size(rows).items():
            whole = min((row["p50_ms"] for row in some if row["kind"] == "eager"), default=max(row["p50_ms"] for row in some))
            groups.append((f"{shape}, {device}", [Bar(row["provider"], row["kind"], row["p50_ms"] / whole, f"{number(row['p50_ms'])} ms")
                                                  for row in sorted(some, key=lambda row: row["p50_ms"])]))  # fmt: skip
    drawn = bars(groups or [("unmeasured", [])], f"{op}: time at each size, eager's dashed")
    head, rest = drawn.removeprefix("<svg").split(">", 1)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="540"{head}><style>{_ALONE}</style>{rest}\n'


def varying(shapes: Sequence[str]) -> tuple[str, dict[str, float]] | None:
    """What grows over sizes named like ``B=2048 D=512``: its name, and its value at each; None unless it is exactly one number."""
    values = [dict(re.findall(r"([A-Za-z]+)=([\d.]+)(?= |$)", shape)) for shape in shapes]
    if len(shapes) < 2 or any(re.sub(r"=[\d.]+", "=", shape) != re.sub(r"=[\d.]+", "=", shapes[0]) for shape in shapes):
        return None
    changing = [name for name in values[0] if len({value[name] for value in values}) > 1]
    if len(changing) != 1:
        return None
    return changing[0], {shape: float(value[changing[0]]) for shape, value in zip(shapes, values, strict=True)}


def _size_curves(rows: Sequence[Row], mode: str) -> str:
    """Time over size, where the sizes differ in one number."""
    by_shape = _by_size(rows)
    found = varying(list(by_shape))
    if found is None:
        return ""
    name, sizes = found
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for shape, some in sorted(by_shape.items(), key=lambda item: sizes[item[0]]):
        for row in some:
            points.setdefault((row["kind"], row["provider"]), []).append((sizes[shape], row["p50_ms"]))
    seen: dict[str, int] = {}
    series = []
    for (kind, provider), some_points in points.items():
        series.append(Series(provider, kind, some_points, _DASHES[seen.get(kind, 0) % len(_DASHES)]))
        seen[kind] = seen.get(kind, 0) + 1
    return _figure(f"{mode}: time over {name}", curves(series, (name, "ms"), f"time over {name}, {mode}"))


def _accuracy(parts: Sequence[dict[str, Any]]) -> str:
    """Zero-shot accuracy over training time, for parts that carry a curve."""
    series = []
    for part in [part for part in parts if part.get("curve")]:
        points = [(point["seconds"] / 60, 100 * point["top1"]) for point in part["curve"]]
        series.append(Series(part["part"], "rival" if part.get("system") == "open_clip" else "ours", points))
    if not series:
        return ""
    chart = curves(series, ("training minutes", "zero-shot top-1, %"), "accuracy over training time", log=False)
    return f'<div class="charts">{_figure("accuracy over training time", chart)}</div>\n'


def _ladder(rungs: Sequence[dict[str, Any]]) -> str:
    """Images per second of every rung; the line is the first one."""
    some = [Bar(rung["rung"], "ours" if number else "rival", rung["ratio_first"],
                f"{rung['images_per_second']:.0f}/s {rung['ratio_first']:.2f}x") for number, rung in enumerate(rungs)]  # fmt: skip
    return _figure("images per second, as a multiple of the first rung (dashed)", bars([("training step", some)], "ladder"))


def _scaling(rows: Sequence[dict[str, Any]]) -> str:
    """Time, and memory where it was measured, of every sweep."""
    charts = []
    for sweep in dict.fromkeys(row["sweep"] for row in rows):
        for key, unit in (("p50_ms", "ms"), ("extra_mb", "extra MB")):
            series: list[Series] = []
            for provider, kind in dict.fromkeys((row["provider"], row["kind"]) for row in rows if row["sweep"] == sweep):
                points = [(float(row["x"]), row[key]) for row in rows
                          if (row["sweep"], row["provider"]) == (sweep, provider) and row.get(key)]  # fmt: skip
                if points:
                    series.append(Series(provider, kind, points, _DASHES[sum(line.style == kind for line in series) % len(_DASHES)]))
            if series and len({x for line in series for x, _ in line.points}) > 1:
                charts.append(_figure(f"{unit} over {sweep}", curves(series, (sweep, unit), f"{unit} over {sweep}")))
    return "".join(charts)


_CHARTS = {"ladder": _ladder, "scaling": _scaling}


def _generic(content: dict[str, Any]) -> str:
    """A table for every list of records in a result file of another kind, such as time to accuracy; the machine is said once, above."""
    parts = []
    if content.get("op") in _CHARTS and content.get("rows"):
        parts.append(f'<div class="charts">{_CHARTS[content["op"]](content["rows"])}</div>\n')
    for name, records in content.items():
        if not (isinstance(records, list) and records and all(isinstance(record, dict) for record in records)):
            continue
        header = list(dict.fromkeys(key for record in records for key, value in record.items()
                                    if isinstance(value, str | int | float) and key not in content.get("machine", {})))  # fmt: skip
        lines = [[_cell(record.get(key)) for key in header] for record in records]
        parts.append(f'<p class="soft">{escape(name)}</p>{_table(header, lines, [""] * len(lines))}')
        parts.append(_accuracy(records))
    return "".join(parts)


def _cell(value: Any) -> str:
    return "" if value is None else number(value) if isinstance(value, float) else str(value)


def _operator(content: dict[str, Any]) -> str:
    modes = {mode: rows for mode in _MODES if (rows := [row for row in content["rows"] if row["mode"] == mode])}
    charts = [chart(rows, mode) for chart in (_share_bars, _size_curves) for mode, rows in modes.items()]
    out = [f'<div class="charts">{"".join(charts)}</div>\n']
    for mode, rows in modes.items():
        out.append(f'<p class="soft">{mode}</p>')
        out.append(_table(_COLUMNS, map(_row, rows), ["ours" if row["kind"] == "ours" else "" for row in rows]))
    if content.get("absent"):
        out.append(f'<p class="soft">Not measured: {escape("; ".join(f"{who}: {why}" for who, why in content["absent"].items()))}.</p>\n')
    return "".join(out)


def _roofline(files: dict[str, dict[str, Any]]) -> str:
    """The fastest of ours and of the others at every size, under the best limits that these runs measured."""
    peaks: dict[str, float] = {}
    marks: list[Mark] = []
    legend: list[str] = []
    copy = 0.0
    for content in files.values():
        sizes = _by_size(row for row in content["rows"] if row["mode"] == _MODES[0] and row.get("bytes") and row["flops"])
        if not sizes:
            continue
        legend.append(f"{len(legend) + 1} {content['op']}")
        copy = max(copy, content["limits"]["copy_gb_s"] / 1e3)
        for dtype, rate in content["limits"]["tflops"].items():
            peaks[dtype] = max(peaks.get(dtype, 0.0), rate)
        for shape, rows in sizes.items():
            for some in ([row for row in rows if row["kind"] != "ours"], [row for row in rows if row["kind"] == "ours"]):
                if some:
                    best = min(some, key=lambda row: row["p50_ms"])
                    reached = f"{best['tflops']:.3g} TFLOP/s, {best['share_of_limit']:.0%} of the limit"
                    title = f"{content['op']}, {shape}, {best['provider']}: {reached}"
                    marks.append(Mark(str(len(legend)), best["kind"], (best["flops"] / best["bytes"], best["tflops"]), title))
    if not marks:
        return '<p class="soft">No roofline: these results do not say their operations and bytes; measure again.</p>\n'
    picture = roofline([(dtype, rate, copy) for dtype, rate in peaks.items()], marks, "roofline")
    caption = f"{_MODES[0]}: the fastest of ours and of the others at each size, under the limits measured here. {', '.join(legend)}"
    return f'<div class="charts">{_figure(caption, picture)}</div>\n'


def _versions(files: dict[str, dict[str, Any]]) -> str:
    header = ("result", "measured", "commit", "torch", "triton", "Python", "threads", "load before", "TFLOP/s by dtype", "copy GB/s")
    lines = []
    for name, content in files.items():
        machine, limits = content.get("machine", {}), content.get("limits", {})
        rates = ", ".join(f"{dtype} {number(rate)}" for dtype, rate in limits.get("tflops", {}).items())
        software = [str(machine.get(key, "")) for key in ("commit", "torch", "triton", "python", "threads")]
        measured = machine.get("timestamp", "")[:16].replace("T", " ")
        lines.append([name, measured, *software, _optional(content.get("load_before")), rates, _optional(limits.get("copy_gb_s"))])
    return _table(header, lines, [""] * len(lines))


def _device(device: str, files: dict[str, dict[str, Any]]) -> str:
    measured = {name: content for name, content in files.items() if content.get("rows") and "share_of_limit" in content["rows"][0]}
    out = [f'<h2 id="{_anchor(device)}">{escape(device)}</h2>\n', _versions(files), _roofline(measured) if measured else ""]
    for name, content in files.items():
        out.append(f'<h3 id="{_anchor(device, name)}">{escape(name)}</h3>\n<p class="soft">{escape(content.get("about", ""))}</p>\n')
        out.append(_operator(content) if name in measured else _generic(content))
    return "".join(out)


def page(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The page, as text; it depends on the results alone. ``results`` are the files' contents by device and name."""
    links = "".join(f'<a href="#{_anchor(device, name)}">{escape(name or device)}</a>'
                    for device, files in results.items() for name in ("", *files))  # fmt: skip
    names = (("ours", "fastvlp"), ("eager", "eager PyTorch"), ("compiled", "torch.compile"), ("rival", "other packages"))
    kinds = "".join(f'<span class="key {kind}">{name}</span>' for kind, name in names)
    body = "".join(_device(device, files) for device, files in results.items()) or "<p>Nothing has been measured yet.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastvlp benchmarks</title><style>{_STYLE}</style></head><body>
<h1>fastvlp benchmarks</h1>
<p>Medians of interleaved calls with flushed caches; parity with float64 is checked before anything is timed. The limit is the larger of
arithmetic and traffic at the best rates that the device reached in the same run. Written by <code>python -m benchmarks report</code>.</p>
<p>{kinds}</p>
<nav>{links}</nav>
{body}</body></html>
"""
