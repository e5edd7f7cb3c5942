"""compare: what counts as slower, what is said about the rest, and what is refused."""

import csv

import pytest

from benchmarks import __main__ as command_line
from benchmarks import compare, run

FIELDS = ("op", "provider", "kind", "shape", "mode", "dtype", "p20_ms", "p50_ms", "p80_ms", "device")


def row(p20, p50, p80, provider="fastvlp cpu", kind="ours", shape="n=8", device="here"):
    return dict(zip(FIELDS, ("toy", provider, kind, shape, "forward", "float32", p20, p50, p80, device), strict=True))


def write(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def pair(tmp_path):
    """Calls the command on two files of rows; returns its exit code."""
    def call(a, b, *options):
        paths = write(tmp_path / "a.csv", *a), write(tmp_path / "b.csv", *b)
        return command_line.main(["compare", *map(str, paths), *options])

    return call


@pytest.mark.parametrize(("before", "after", "verdict"), [
    ((9, 10, 11), (12, 13, 14), "slower"),
    ((9, 10, 11), (6, 7, 8), "faster"),
    ((9, 10, 11), (9, 10, 11), "unchanged"),
    ((9, 10, 13), (12, 13, 14), "unchanged"),  # the middle samples overlap
    ((9, 10, 11), (6, 7, 9.5), "unchanged"),
    ((9.99, 10, 10.01), (10.3, 10.4, 10.5), "unchanged"),  # apart, but smaller than the minimal change
    ((9.99, 10, 10.01), (10.5, 10.6, 10.7), "slower"),
    ((9.99, 10, 10.01), (9.5, 9.6, 9.7), "unchanged"),
])  # fmt: skip
def test_a_change_is_larger_than_the_noise_and_than_the_minimum(before, after, verdict, pair, capsys):
    assert pair([row(*before)], [row(*after)]) == int(verdict == "slower")
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith(f"{after[1] / before[1]:.2f}x  {verdict}")
    assert f"1 {verdict}" in out.splitlines()[-1]


def test_the_minimal_change_is_an_option(pair):
    assert pair([row(9, 10, 11)], [row(12, 13, 14)], "--minimal", "0.5") == 0
    assert pair([row(9.99, 10, 10.01)], [row(10.3, 10.4, 10.5)], "--minimal", "0.01") == 1


def test_rows_match_by_every_part_of_the_key_and_the_others_are_named(pair, capsys):
    a = [row(9, 10, 11), row(9, 10, 11, shape="n=9"), row(9, 10, 11, provider="eager", kind="eager")]
    b = [row(19, 20, 21, "eager", "eager", device="there"), row(9, 10, 11, device="there"), row(1, 1, 1, "new", device="there")]
    assert pair(a, b) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[1] == "eager"  # the worst is first
    assert "a.csv: toy / fastvlp cpu / n=9 / forward / float32" in out and "b.csv: toy / new / n=8 / forward / float32" in out
    assert "measured on different devices: here and there" in out
    assert "rows that are not ours: 2.00x as long (median of 1)" in out
    assert "1 slower, 0 faster, 1 unchanged" in out


def test_a_file_equals_itself(tmp_path):
    content = {"op": "toy", "machine": {"device": "here"}, "rows": [row(9.0, 10.0, 11.0)]}
    path = run.write(content, tmp_path).with_suffix(".csv")
    assert compare.main(path, path) == 0


@pytest.mark.parametrize(("text", "message"), [
    ("op,provider\n", "has no column shape, mode, dtype, p20_ms, p50_ms, p80_ms; compare reads the <op>.csv"),
    ("", "has no column op"),
    (",".join(FIELDS) + "\n", "has no rows; measure again"),
    (",".join(FIELDS) + "\ntoy,a,ours,n,forward,float32,1,fast,2,x\n", "line 2: p20_ms, p50_ms and p80_ms must be positive numbers"),
    (",".join(FIELDS) + "\ntoy,a,ours,n,forward,float32,3,2,1,x\n", "and are '3', '2', '1'; measure again"),
    (",".join(FIELDS) + "\ntoy,a,ours,n,forward,float32,1,nan,2,x\n", "must be positive numbers"),
    (",".join(FIELDS) + "\ntoy,a,ours,n,forward,float32,1\n", "and are '1', None, None"),
    (",".join(FIELDS) + 2 * "\ntoy,a,ours,n,forward,float32,1,2,3,x" + "\n", "line 3: toy / a / n / forward / float32 is there twice"),
    (b"\xff\xfe\x00\x80", "not a text file; python -m benchmarks run"),
    (None, "No such file or directory; python -m benchmarks run"),
])  # fmt: skip
def test_unreadable_files_are_refused_with_a_sentence(text, message, tmp_path, capsys):
    good, bad = write(tmp_path / "good.csv", row(9, 10, 11)), tmp_path / "bad.csv"
    if text is not None:
        bad.write_bytes(text if isinstance(text, bytes) else text.encode())
    for paths in ((good, bad), (bad, good)):
        assert command_line.main(["compare", *map(str, paths)]) == 2
        error = capsys.readouterr().err
        assert str(bad) in error and message in error and "Traceback" not in error


def test_files_without_a_common_row_and_wrong_shares_are_refused(pair, capsys):
    assert pair([row(9, 10, 11)], [row(9, 10, 11, shape="n=9")]) == 2
    assert "share no row" in capsys.readouterr().err
    assert pair([row(9, 10, 11)], [row(9, 10, 11)], "--minimal", "-1") == 2
    assert "--minimal -1.0 is no share; give 0.05 for 5 %" in capsys.readouterr().err
