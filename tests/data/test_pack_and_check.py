"""``fastvlp pack`` and ``fastvlp check``: shards from any source, and what data holds."""

import io
import json
import re
import tarfile

import pytest
from PIL import Image
from sources import CAPTIONS, CLASSES, MAKERS, PICTURES, hugging_face
from tar_files import encoded, metadata, picture, write_tar

from fastvlp import cli
from fastvlp.data.pack import pack
from fastvlp.data.samples import samples
from fastvlp.data.shards import scan
from tests.train.conftest import COLOURS, write_shard


@pytest.mark.parametrize("kind", ["csv", "folder of files", "parquet", "datasets"])
def test_packed_samples_are_those_of_the_source(kind, tmp_path, capsys):
    source = MAKERS[kind](tmp_path)
    assert cli.main(["pack", source, "--out", str(tmp_path / "packed"), "--samples", "5"]) == 0
    assert f"12 samples are in {tmp_path / 'packed'}\n" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert files == [f"shard-0000{i}.tar{end}" for i in range(3) for end in ("", ".index.json")]
    found = list(samples(str(tmp_path / "packed")))
    assert [sample.labels for sample in found] == [sample.labels for sample in samples(source)]
    assert [sample.labels.captions for sample in found] == [(caption,) for caption in CAPTIONS]
    with tarfile.open(tmp_path / "packed" / "shard-00002.tar") as tar:
        assert tar.getnames() == ["000000010.png", "000000010.json", "000000011.png", "000000011.json"]
        assert tar.extractfile("000000011.png").read() == PICTURES[11]
        fields = json.load(tar.extractfile("000000011.json"))
    if kind == "csv":
        assert fields == {"captions": [CAPTIONS[11]], "filepath": "pictures/11.png", "title": CAPTIONS[11]}
    if kind == "datasets":
        assert fields["class"] == CLASSES[2] and fields["label"] == 2


def test_the_same_data_gives_the_same_bytes_and_nothing_is_overwritten(tmp_path):
    source = hugging_face(tmp_path / "saved")
    for name, options in (("a", {}), ("b", {}), ("c", {"seed": 3}), ("d", {"seed": 3}), ("e", {"seed": 4})):
        assert not pack(source, tmp_path / name, 7, **options)
    whole = {name: b"".join(path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))) for name in "abcde"}
    assert whole["a"] == whole["b"] and whole["c"] == whole["d"] and len(set(whole.values())) == 3
    for name in "ce":
        assert sorted(sample.labels.captions[0] for sample in samples(str(tmp_path / name))) == sorted(CAPTIONS)
    with pytest.raises(FileExistsError, match="holds shards already; name a new folder"):
        pack(source, tmp_path / "a")


def test_what_cannot_be_used_is_named_and_arrays_and_names_stay(tmp_path, capsys):
    array = b"\x93NUMPY" + bytes(30)
    shard = write_tar(tmp_path / "x.tar", [
        ("a.png", encoded(picture())), ("a.json", metadata("one", "two", boxes=[[0, 0, 1, 1]], **{"class": "dog"})), ("a.Depth.npy", array),
        ("b.png", b"no picture"), ("b.txt", b"b"), ("c.txt", b"c"), ("d.jpg", encoded(picture(), "WEBP")), ("d.txt", "ü".encode())])
    assert cli.main(["pack", shard, "--out", str(tmp_path / "packed")]) == 0
    out = capsys.readouterr().out
    assert "2 samples are in" in out and "left out: no image (1), not an image (1)" in out and f"left out, no image: {shard}: c\n" in out
    with tarfile.open(tmp_path / "packed" / "shard-00000.tar") as tar:
        assert tar.getnames() == ["000000000.png", "000000000.json", "000000000.depth.npy", "000000001.webp", "000000001.json"]
        assert tar.extractfile("000000000.depth.npy").read() == array
        assert json.load(tar.extractfile("000000000.json")) == {"captions": ["one", "two"], "class": "dog", "boxes": [[0, 0, 1, 1]]}
    assert cli.main(["pack", write_tar(tmp_path / "none.tar", []), "--out", str(tmp_path / "none")]) == 1
    assert not list((tmp_path / "none").iterdir())


def test_columns_that_json_cannot_hold_stay_behind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": PICTURES[:2], "text": ["a", "b"], "mask": [{"bytes": PICTURES[0], "path": None}] * 2, "n": [1, None],
                           "when": pyarrow.array([0, 1], pyarrow.timestamp("s")), "boxes": [[[0.0, 0.5]], []]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert not pack(str(tmp_path / "x.parquet"), tmp_path / "packed")
    with tarfile.open(tmp_path / "packed" / "shard-00000.tar") as tar:
        found = [json.load(tar.extractfile(f"00000000{i}.json")) for i in range(2)]
    assert found == [{"boxes": [[0.0, 0.5]], "captions": ["a"], "n": 1, "text": "a"},
                     {"boxes": [], "captions": ["b"], "n": None, "text": "b"}]


def test_pictures_are_made_smaller_and_never_larger(tmp_path):
    large, small = encoded(picture(0, (90, 30))), encoded(picture(1, (20, 14)))
    shard = write_tar(tmp_path / "x.tar", [("0.png", large), ("0.txt", b"x"), ("1.png", small), ("1.txt", b"x"), ("2.png", large[:200]),
                                           ("2.txt", b"cut")])
    assert pack(shard, tmp_path / "packed", size=45) == {"image is broken": 1}
    with tarfile.open(tmp_path / "packed" / "shard-00000.tar") as tar:
        pictures = [Image.open(io.BytesIO(tar.extractfile(f"00000000{i}.jpg").read())) for i in range(2)]
    assert [(image.format, image.size) for image in pictures] == [("JPEG", (45, 15)), ("JPEG", (20, 14))]
    assert len(scan(str(tmp_path / "packed" / "shard-00000.tar")).keys) == 2


def test_a_check_counts_what_there_is(tmp_path, capsys):
    """By hand: 24 boxes with two captions each, one of them twice, one caption that is long, and three samples that cannot be used."""
    boxes = write_shard(tmp_path / "boxes.tar", 24)
    with tarfile.open(boxes) as tar:
        first = [(f"again.{name.rpartition('.')[2]}", tar.extractfile(name).read()) for name in tar.getnames()[:2]]
    white = encoded(Image.new("RGB", (300, 100), "white"), "JPEG")
    write_tar(tmp_path / "more.tar", [*first, ("long.jpg", white), ("long.txt", b"word " * 100), ("cut.jpg", white[:200]),
                                      ("cut.txt", b"cut"), ("junk.jpg", b"junk"), ("junk.txt", b"junk"), ("mute.jpg", white)])
    command = ["check", str(boxes), str(tmp_path / "more.tar"), "--tokenizer", "mini", "--length", "20", "--size", "64", "--patch", "16",
               "--out", str(tmp_path / "page.html")]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "28 samples in 2 pieces; all were read, 26 of these can be used" in out
    for reason, name in (("image is broken", "cut"), ("not an image", "junk"), ("no caption", "mute")):
        assert f"  1 cannot: {reason} ({tmp_path / 'more.tar'}: {name})" in out
    assert "pictures: PNG 96%, JPEG 4%" in out and "most 300; 96.2% are smaller than 64" in out
    assert "captions: 1.96 a sample" in out and "2.0% are cut at 20 tokens" in out  # 1 of 51
    assert "duplicates: 1 pictures whose bytes came before, 1 first captions that came before" in out
    assert f"classes: {len(COLOURS)} in 25 samples, most often red (5)" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 26 and page.count("base64,") == 26 and "28 samples in 2 pieces" in page
    budgets = re.search(r"train.tokens=\{image: (\d+), text: (\d+)\}", out)
    assert 256 * 4 <= int(budgets[1]) <= 256 * 16 and int(budgets[2]) >= 20
    assert cli.main([*command, "--limit", "5"]) == 0
    assert "5 were read, spread evenly, " in capsys.readouterr().out


def test_a_check_of_hostile_names_writes_neither_tags_nor_escapes(tmp_path, capsys):
    image = encoded(picture())
    shard = write_tar(tmp_path / "x.tar", [("<b>\x1b[2J.png", image), ("<b>\x1b[2J.txt", b"<script>alert(1)</script>"),
                                           ("\x1b]0;.png", image)])
    assert cli.main(["check", shard, "--tokenizer", "mini", "--out", str(tmp_path / "page.html")]) == 0
    page, out = (tmp_path / "page.html").read_text(), capsys.readouterr().out
    assert "\x1b" not in page + out and "<script>" not in page and "&lt;script&gt;" in page
    assert cli.main(["check", write_tar(tmp_path / "none.tar", []), "--tokenizer", "mini", "--out", str(tmp_path / "none.html")]) == 1
