"""The tables: made from result files alone, idempotent, empty where nothing was measured."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import plot, report
from benchmarks.registry import find

MARKED = "# Title\n\nBefore.\n\n<!-- begin: {0} -->\n<!-- end: {0} -->\n\nAfter.\n"


def rows(op: str, device: str = "cpu-test-2core"):
    """A result file with round numbers."""
    times = {"fastvlp cpu": ("ours", 100.0, 10), "fastvlp large": ("ours", 80.0, 20), "fastvlp both": ("ours", 90.0, 30),
             "eager": ("eager", 250.0, 25), "open_clip": ("rival", 300.0, 30)}
    shape = find(op).shapes("cpu", False)[-1].name
    return {
        "op": op, "machine": {"device": device}, "facts": {shape: {"token_ratio": 2.0}}, "rows": [
            {"op": op, "provider": name, "kind": kind, "mode": "forward+backward", "shape": shape, "dtype": "float32", "p20_ms": ms,
             "p50_ms": ms, "p80_ms": ms, "ratio_rival": 300 / ms, "ratio_eager": 250 / ms, "share_of_limit": 50 / ms,
             "extra_mb": extra, "error": 1e-7}
            for name, (kind, ms, extra) in times.items()],
    }  # fmt: skip


def mini():
    system = {"seeds": [0], "top1_of_seeds": [0.06], "train_seconds": 900.0, "images_per_second": 146.0, "top1": 0.06, "top5": 0.168,
              "i2t_r10": 0.298, "tower_parameters": 4695552}  # fmt: skip
    ours = system | {"seeds": [0, 1], "top1_of_seeds": [0.05, 0.07], "train_seconds": 300.0}
    systems = [system | {"system": "open_clip"}, ours | {"system": "fastvlp"}]
    return {"op": "mini", "machine": {"device": "cpu-test-2core"}, "systems": systems,
            "parts": [{"part": "a", "curve": [{"seconds": 60, "top1": 0.01}, {"seconds": 900, "top1": 0.06}]}]}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "cpu-test-2core"
    folder.mkdir(parents=True)
    for content in [*(rows(op) for op in ("similarity_logsumexp", "packed_attention", "towers")), mini()]:
        (folder / f"{content['op']}.json").write_text(json.dumps(content))
    return tmp_path / "results"


def test_numbers_come_from_the_files(results):
    table = report.render(MARKED.format("similarity-logsumexp"), report.load(results), "x")
    assert table.startswith("# Title\n\nBefore.\n\n<!-- begin: similarity-logsumexp -->\n| device |") and table.endswith("-->\n\nAfter.\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "B=8192" in line]
    others = ["250", "", "300 (open_clip)"]
    assert lines == [  # the one that is neither fastest nor smallest is left out
        ["cpu-test-2core", "B=8192 D=512", "80 (large)", *others, "3.75x", "3.12x", "62%", "20", "25", "1.0e-07", "1.0e-07"],
        ["cpu-test-2core", "B=8192 D=512", "100 (cpu)", *others, "3.00x", "2.50x", "50%", "10", "25", "1.0e-07", "1.0e-07"],
    ]


def test_the_share_of_the_token_ratio_is_the_speed_up_over_the_ratio(results):
    line = next(line for line in report.towers(report.load(results)).splitlines() if "256 pairs" in line)
    assert [cell.strip() for cell in line.split("|")[-4:-1]] == ["2.00", "3.12x", "156%"]


def test_dropping_before_the_embedding_is_compared_with_dropping_after_it():
    shape = find("patch_embed").shapes("cpu", False)[-1].name
    found = [{"provider": name, "kind": "ours", "shape": shape, "mode": "forward", "p50_ms": ms}
             for name, ms in (("fastvlp cpu", 10.0), ("fastvlp cpu, dropped after", 18.0))]  # fmt: skip
    table = report.dropping({"cpu-x": {"patch_embed": {"rows": found}}})
    assert table.splitlines()[2:] == [f"| cpu-x | {shape} | forward | 10 | 18 | 1.80x |"]


def test_time_to_accuracy_shows_every_seed_and_one_sentence(results):
    table = report.mini(report.load(results))
    assert "| cpu-test-2core | fastvlp | 2 | 5.0 | 6.0 | 5.0, 7.0 |" in table
    assert table.endswith("\n\ncpu-test-2core: open_clip 6.0 % top-1 after 15.0 minutes, fastvlp 6.0 % top-1 after 5.0 minutes.\n")


@pytest.mark.parametrize("name", sorted({*report.TABLES} - {"systems", "changes"}))  # which hold no measurement
def test_without_results_a_table_says_unmeasured_and_holds_no_measurement(name):
    table = report.TABLES[name]({})
    assert report.UNMEASURED in table
    if name != "operators":  # whose formulas and limits are words
        after = [line.partition(report.UNMEASURED) for line in table.splitlines()[2:]]
        assert all(word and set(rest) == {" ", "|"} for _, word, rest in after)


def test_every_table_is_rectangular(results):
    for name, table in report.TABLES.items():
        lines = [line for line in table(report.load(results)).splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1, name


def test_report_is_idempotent_and_check_tells_whether_it_is_needed(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("".join(MARKED.format(name) for name in report.TABLES))
    files = (readme, tmp_path / "absent.md")
    assert report.main(results, check=True, files=files) == 1
    assert "out of date; run python -m benchmarks report" in capsys.readouterr().err
    assert report.main(results, check=False, files=files) == 0
    first = readme.read_text()
    assert report.main(results, check=True, files=files) == 0
    assert report.main(results, check=False, files=files) == 0 and readme.read_text() == first
    readme.write_text(first.replace("| 300 (open_clip) |", "| 301 (open_clip) |"))
    assert report.main(results, check=True, files=files) == 1


def test_an_operator_page_has_a_picture_whose_bars_are_times_over_eager(results, tmp_path):
    pages = [tmp_path / "docs" / "operators" / name for name in ("similarity_logsumexp.md", "maxsim.md", "packed.md")]
    pages[0].parent.mkdir(parents=True)
    for page in pages:
        page.write_text("words\n")
    assert report.main(results, check=True, files=pages) == 1
    assert report.main(results, check=False, files=pages) == 0 and report.main(results, check=True, files=pages) == 0
    folder = tmp_path / "docs" / "assets"
    assert sorted(path.name for path in folder.iterdir()) == ["maxsim.svg", "similarity_logsumexp.svg"]
    drawn = {path.stem: ElementTree.fromstring(path.read_text()) for path in folder.iterdir()}
    svg = "{http://www.w3.org/2000/svg}"
    assert [text.text for text in drawn["maxsim"].iter(f"{svg}text")] == ["unmeasured"]
    bars = [(bar.get("class"), float(bar.get("width"))) for bar in drawn["similarity_logsumexp"].iter(f"{svg}rect")]
    assert [kind for kind, _ in bars] == ["ours", "ours", "ours", "eager", "rival"]
    eager = dict(bars)["eager"]
    assert [width / eager for _, width in bars] == pytest.approx([80 / 250, 90 / 250, 100 / 250, 1, 300 / 250], rel=0.01)
    limit = next(drawn["similarity_logsumexp"].iter(f"{svg}line"))
    assert float(limit.get("x1")) == pytest.approx(122 + eager, abs=0.2)
    (folder / "maxsim.svg").write_text("<svg/>")
    assert report.main(results, check=True, files=pages) == 1


def test_the_readme_shows_the_picture_of_quality_where_it_was_measured(results, tmp_path):
    """The link from the repository's README leads to what ``plot`` draws from the same file."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    folder = tmp_path / "benchmarks" / "results"
    (folder / "cpu-test-2core").mkdir(parents=True)
    systems = [system | {"system": name} for system, name in zip(mini()["systems"], ("all patches", "half dropped"), strict=True)]
    (folder / "cpu-test-2core" / "quality.json").write_text(json.dumps(mini() | {"op": "quality", "systems": systems}))
    readme = tmp_path / "README.md"
    readme.write_text(MARKED.format("quality"))
    assert report.main(folder, check=False, files=(readme,)) == 0 and plot.plot(folder, only="quality")
    (link,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", readme.read_text())
    assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("text", "message"), [
    (MARKED.format("packed-atention"), "unknown table 'packed-atention'; did you mean 'packed-attention'?"),
    ("<!-- begin: mini -->\n", "every <!-- begin: NAME --> line needs its <!-- end: NAME -->"),
])  # fmt: skip
def test_wrong_markers_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        report.render(text, {}, "README.md")


def test_plots_are_drawn_beside_the_results(results):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    written = plot.plot(results)
    assert sorted(path.name for path in written) == ["mini.png", "packed_attention.png", "similarity_logsumexp.png", "towers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
