"""The page of all results: complete, self-contained, well-formed, and drawn to scale."""

import functools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from toys import EAGER, square, toy

from benchmarks import __main__ as command_line
from benchmarks import html, report, run, svg
from benchmarks.registry import Provider

VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; collects attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def row(shape, provider, kind, ms, mode="forward+backward", **more):
    return {"op": "toy", "provider": provider, "kind": kind, "mode": mode, "shape": shape, "dtype": "float32", "p20_ms": 0.9 * ms,
            "p50_ms": ms, "p80_ms": 1.1 * ms, "rival": "eager", "ratio_rival": 1.5, "ratio_eager": 1.25, "tflops": 0.5 / ms,
            "flops": 5e8, "bytes": 1e6, "share_of_limit": 5 / ms, "extra_mb": None, "error": 1e-7, "version": "1.0"} | more  # fmt: skip


def content(*rows, **more):
    machine = {"device": "here", "torch": "2.99", "timestamp": "2026-01-02T03:04:05+00:00"}
    limits = {"tflops": {"float32": 0.2}, "copy_gb_s": 30.0}
    return {"op": "toy", "about": "a <toy> & more", "machine": machine, "limits": limits, "absent": {"elsewhere": "not <installed>"},
            "rows": list(rows)} | more  # fmt: skip


ROWS = [row(f"B={b} D=4", provider, kind, ms * b / 8, mode) for mode in ("forward", "forward+backward") for b in (8, 32)
        for provider, kind, ms in (("ours", "ours", 10), ("ours, stash", "ours", 12), ("eager", "eager", 25))]  # fmt: skip
CURVE = [{"seconds": 60, "top1": 0.01}, {"seconds": 900, "top1": 0.06}]
MINI = {"op": "mini", "machine": {}, "systems": [{"system": "open_clip", "top1": 0.0671, "seeds": [0]}],
        "parts": [{"part": "a", "system": "open_clip", "curve": CURVE}]}  # fmt: skip


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere():
    page = html.page({"here": {"toy": content(*ROWS), "mini": MINI}})
    found = parsed(page)
    assert "script" not in found.tags and "link" not in found.tags and "img" not in found.tags
    assert not {name for name, _ in found.attributes} & {"src", "style", "onclick"}
    assert "http" not in page and "url(" not in page and "@import" not in page
    links, names = ([value for name, value in found.attributes if name == kind] for kind in ("href", "id"))
    assert links == ["#here", "#here-toy", "#here-mini"] and {link[1:] for link in links} == set(names)
    assert 'name="viewport" content="width=device-width' in page and "prefers-color-scheme:dark" in page


def test_every_table_scrolls_in_a_container_of_its_own():
    page = html.page({"here": {"toy": content(*ROWS), "mini": MINI}})
    assert page.count("<table") == page.count('<div class="scroll"><table') == 5
    assert ".scroll{overflow-x:auto" in page


def test_everything_measured_is_on_the_page_and_escaped():
    page = html.page({"here": {"toy": content(*ROWS), "mini": MINI}})
    for text in ("a &lt;toy&gt; &amp; more", "elsewhere: not &lt;installed&gt;", "2.99", "2026-01-02 03:04", "<td>1.50x eager</td>",
                 "<td>50%</td>", "<td>1.0e-07</td>", "<td>22.5–27.5</td>", "time over B", "accuracy over training time", "<td>0.0671</td>",
                 "1 toy", "float32, 0.2 TFLOP/s"):  # fmt: skip
        assert text in page, text
    assert "<toy>" not in page


def test_results_from_before_work_was_recorded_say_so_instead_of_a_roofline():
    old = [{name: value for name, value in r.items() if name not in ("flops", "bytes")} for r in ROWS]
    assert "these results do not say their operations and bytes; measure again" in html.page({"here": {"toy": content(*old)}})


def test_an_operator_that_only_moves_bytes_is_no_mark_of_the_roofline():
    moves = [{**r, "flops": 0.0, "tflops": 0.0} for r in ROWS]
    page = html.page({"here": {"toy": content(*ROWS), "moves": {**content(*moves), "op": "moves"}}})
    assert "1 toy" in page and "2 moves" not in page and "moves" in page


def test_the_page_of_nothing_says_so():
    assert "Nothing has been measured yet." in html.page({})


def test_a_result_file_of_another_kind_becomes_tables():
    cases = [{"what": "shards", "tried": 1000, "lost": 0, "inner": {"a": 1}}, {"what": "images", "late": 1.5}]
    soak = {"op": "soak", "machine": {}, "cases": cases}
    page = html.page({"here": {"soak": soak, "odd": {"rows": [{"size": 4}]}}})
    assert "<td>shards</td><td>1000</td><td>0</td><td></td>" in page and "<td>images</td><td></td><td></td><td>1.5</td>" in page
    assert "<th>size</th>" in page and "inner" not in page


def test_a_real_run_is_drawn(tmp_path):
    import torch

    result = run.run_case(toy(Provider("ours", "ours", square()), EAGER), torch.device("cpu"), True, lambda text: None)
    assert {(r["flops"], r["bytes"]) for r in result["rows"]} == {(16.0, 32.0)}
    run.write(result, tmp_path)
    page = html.page(report.load(tmp_path))
    parsed(page)
    assert "roofline" in page and "n=8" in page


@pytest.mark.parametrize(("shapes", "expected"), [
    (["B=2048 D=512", "B=8192 D=512"], ("B", {"B=2048 D=512": 2048, "B=8192 D=512": 8192})),
    (["B=2048 D=512", "B=8192 D=768"], None),  # two things change
    (["B=2048 D=512"], None),
    (["256 captions", "64 x 16-256"], None),
    (["B=1 D=2", "B=2 C=2"], None),
])  # fmt: skip
def test_curves_are_drawn_where_sizes_differ_in_one_number(shapes, expected):
    assert html.varying(shapes) == expected


def elements(picture, tag):
    return list(ElementTree.fromstring(picture).iter(tag))


def test_bars_are_to_scale_and_stay_inside():
    some = [svg.Bar("a", "ours", 0.5, ""), svg.Bar("b", "eager", 0.25, ""), svg.Bar("c", "rival", 1.25, "")]
    picture = svg.bars([("n=8", some)], "title")
    widths = [float(bar.get("width")) for bar in elements(picture, "rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2) and widths[2] == pytest.approx(2.5 * widths[0], abs=0.3)
    limit = float(elements(picture, "line")[0].get("x1"))
    assert limit == pytest.approx(122 + 2 * widths[0], abs=0.2) and 122 + widths[2] < svg.WIDTH


def test_curves_keep_their_labels_apart_and_their_points_inside():
    series = [svg.Series(f"line {i}", "ours", [(1, 1 + 0.001 * i), (100, 50 + 0.001 * i)]) for i in range(9)]
    picture = svg.curves(series, ("B", "ms"), "title")
    places = sorted(float(text.get("y")) for text in elements(picture, "text") if (text.text or "").startswith("line"))
    assert len(places) == 9 and all(b - a >= 12.9 for a, b in zip(places, places[1:], strict=False))
    height = float(ElementTree.fromstring(picture).get("viewBox").split()[-1])
    assert 0 < places[0] and places[-1] < height
    for circle in elements(picture, "circle"):
        assert 46 <= float(circle.get("cx")) <= 252 and 12 <= float(circle.get("cy")) <= 202


def test_long_names_are_cut_to_the_room_they_have():
    name = "a-provider-with-a-long-name"
    assert "a-provider-with-a-lo…<" in svg.bars([("n=8", [svg.Bar(name, "rival", 0.5, "")])], "title")
    assert "a-provider-with-…<" in svg.curves([svg.Series(name, "rival", [(1, 1), (2, 2)])], ("B", "ms"), "title")


def test_a_roofline_has_its_ridge_where_traffic_and_arithmetic_meet():
    marks = [svg.Mark("1", "ours", (10.0, 0.1), "at the ridge"), svg.Mark("2", "eager", (1.0, 0.01), "on the slope")]
    picture = svg.roofline([("float32", 0.1, 0.01)], marks, "title")
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in elements(picture, "circle")]
    corner, slope = [tuple(map(float, pair.split(","))) for pair in elements(picture, "polyline")[0].get("points").split()][1], circles[1]
    assert circles[0] == pytest.approx(corner, abs=0.11)
    start = [float(x) for x in elements(picture, "polyline")[0].get("points").split()[0].split(",")]
    assert (slope[0] - start[0]) / (corner[0] - start[0]) == pytest.approx((slope[1] - start[1]) / (corner[1] - start[1]), abs=0.02)


@pytest.mark.parametrize(("low", "high", "log"), [
    (0, 7.3, False), (0, 0.04, False), (3, 4, True), (0.001, 5000, True), (1e-9, 1e9, True), (90, 900, True),
])  # fmt: skip
def test_ticks_are_few_and_inside(low, high, log):
    found = svg.ticks(low, high, log)
    assert 1 <= len(found) <= 7 and found == sorted(found) and low <= found[0] and found[-1] <= high


def test_report_writes_the_page_and_check_knows_when_it_is_old(tmp_path, capsys):
    results = tmp_path / "results"
    (results / "here").mkdir(parents=True)
    (results / "here" / "toy.json").write_text(json.dumps(content(*ROWS)))
    assert report.main(results, check=True, files=()) == 0  # where there is no page, none is old
    assert report.main(results, check=False, files=()) == 0
    page = results / "index.html"
    assert page.read_text(encoding="utf-8") == html.page(report.load(results)) and report.main(results, check=True, files=()) == 0
    (results / "here" / "toy.json").write_text(json.dumps(content(*ROWS, about="changed")))
    capsys.readouterr()
    assert report.main(results, check=True, files=()) == 1
    assert re.search(r"index.html: out of date; run python -m benchmarks report", capsys.readouterr().err)


def test_the_page_goes_where_html_says(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "main", functools.partial(report.main, files=()))
    assert command_line.main(["report", "--results", str(tmp_path), "--html", str(tmp_path / "there" / "page.html")]) == 0
    assert "fastvlp benchmarks" in (tmp_path / "there" / "page.html").read_text(encoding="utf-8")
