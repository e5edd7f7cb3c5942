"""Data where it lies: every kind of source gives the same samples in an exact order, and what is broken is named."""

import csv
import itertools
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from sources import (
    CAPTIONS,
    CLASSES,
    MAKERS,
    PICTURES,
    arrow_table,
    delimited,
    features,
    files,
    hugging_face,
    json_lines,
    parquet,
    pictures,
)
from tar_files import encoded, picture, small_tokenizer, write_tar

from fastvlp.data import Caption, Image, Stage, Stream, expand
from fastvlp.data.fields import bind
from fastvlp.data.samples import Reader, samples
from fastvlp.data.shards import Index
from fastvlp_kernels.packed import Packed

FIELDS = bind({"image": Image(16, patch=8), "text": Caption(9)}, None, small_tokenizer())


def _all(source):
    skipped = []
    return list(samples(source, on_skip=lambda *skip: skipped.append(skip))), skipped


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_holds_the_same_samples(kind, tmp_path):
    found, skipped = _all(MAKERS[kind](tmp_path))
    assert not skipped
    assert [sample.labels.captions for sample in found] == [(caption,) for caption in CAPTIONS]
    for number, sample in enumerate(found):
        assert sample.image.tobytes() == picture(number).tobytes()
    assert len({sample.key for sample in found}) == 12 or kind == "datasets"  # two files, whose rows are counted in each


@pytest.mark.parametrize("kind", ["csv", "json lines", "folder of files", "parquet", "datasets"])
def test_batches_are_a_function_of_their_number(kind, tmp_path):
    """The same when read ahead by workers, when a run starts in the middle, and put together from the slices of three ranks."""
    source = MAKERS[kind](tmp_path)

    def take(n, **options):
        return list(itertools.islice(Stream(source, FIELDS, 5, 3, Stage(), **options), n))

    def facts(batch):
        return batch.keys, batch.ids.tolist(), batch.image.x, batch.text.x

    whole = take(7)
    assert Counter(key for batch in whole[:5] for key in batch.keys).total() == 25
    same = {"workers": take(7, workers=2), "restart": [*whole[:4], *take(3, start=4)]}
    parts = list(zip(*(take(7, rank=rank, world_size=3) for rank in range(3)), strict=True))
    for how, batches in same.items():
        for a, b in zip(whole, batches, strict=True):
            assert facts(a)[:2] == facts(b)[:2] and torch.equal(a.image.x, b.image.x) and torch.equal(a.text.x, b.text.x), how
    for a, ranks in zip(whole, parts, strict=True):
        assert a.keys == [key for part in ranks for key in part.keys]
        assert torch.equal(a.image.x, Packed.cat([part.image for part in ranks]).x)
    pictures_of_an_epoch = {batch.image.segments()[i].numpy().tobytes() for batch in whole[:3] for i in range(5)}
    assert len(pictures_of_an_epoch) == 12


@pytest.mark.parametrize("separator", ["\t", ","])
def test_rows_are_those_of_pandas(tmp_path, separator):
    """open_clip reads tables by pandas; quotes, line ends within them and letters of any script come out as there."""
    pandas = pytest.importorskip("pandas")
    pictures(tmp_path / "pictures")
    rng = np.random.default_rng(0)
    letters = np.array(list('ab "\'\t,\n;ü名🙂'))
    captions = ["x" + "".join(rng.choice(letters, rng.integers(1, 30))) + "y" for _ in range(300)]
    frame = pandas.DataFrame({"title": captions, "filepath": [f"pictures/{i % 12:02d}.png" for i in range(300)], "n": range(300)})
    frame.to_csv(tmp_path / "x.csv", sep=separator, index=False)
    read = pandas.read_csv(tmp_path / "x.csv", sep=separator)
    index = Index(expand(tmp_path / "x.csv"), print)
    reader = Reader(index)
    assert index.count(0) == 300
    assert [reader.labels(0, i).captions[0] for i in range(300)] == read["title"].str.strip().tolist()
    assert [reader.values(0, i)["n"] for i in range(300)] == [str(i) for i in range(300)]


def test_folders_of_classes(tmp_path):
    """ImageFolder: a picture's class is its folder, by the names in classnames.txt where there are as many."""
    for number, data in enumerate(PICTURES):
        folder = tmp_path / f"n{number % 3}_x" / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(data)
    (tmp_path / "loose.png").write_bytes(PICTURES[0])
    found, skipped = _all(str(tmp_path))
    assert [(sample.labels.name, sample.labels.captions) for sample in found] == [
        (f"n{i}_x", (f"n{i} x",)) for i in range(3) for _ in range(4)]
    assert skipped == [("no caption", f"{tmp_path}: loose.png")] and len({sample.labels.id for sample in found}) == 3
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES))
    assert [sample.labels.name for sample in _all(str(tmp_path))[0]] == [name for name in CLASSES for _ in range(4)]


def test_clip_benchmark_s_shards(tmp_path):
    """Class numbers in .cls, their names in a file above the split's folder; a caption beside them stays the caption."""
    (tmp_path / "test").mkdir()
    members = [member for i in range(4) for member in ((f"{i}.png", PICTURES[i]), (f"{i}.cls", str(i).encode()))]
    write_tar(tmp_path / "test" / "0.tar", [*members, ("5.png", PICTURES[5]), ("5.cls", b"1\n"), ("5.txt", b"my house")])
    assert [sample.labels.name for sample in _all(str(tmp_path / "test"))[0]] == ["0", "1", "2", "3", "1"]
    (tmp_path / "classnames.txt").write_text("dog\nhouse\ntree\n")
    found, skipped = _all(str(tmp_path / "test"))
    assert [(sample.labels.name, sample.labels.captions[0]) for sample in found] == [
        ("dog", "dog"), ("house", "house"), ("tree", "tree"), ("house", "my house")]
    assert skipped == [("no class has this number", f"{tmp_path}/test/0.tar: 3")]


def test_hugging_face_s_classes_and_splits(tmp_path):
    found, _ = _all(hugging_face(tmp_path / "saved", "train"))
    assert [sample.labels.name for sample in found] == [CLASSES[i % 3] for i in range(12)]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=f"name one of them: {tmp_path}/saved/train, {tmp_path}/saved/test"):
        expand(tmp_path / "saved")
    state = tmp_path / "saved" / "train" / "state.json"
    state.write_text('{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}')
    with pytest.raises(ValueError, match="chosen by a file of indices"):
        expand(state.parent)


def test_numbers_of_classes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    types = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    cells = pyarrow.array([{"bytes": data, "path": None} for data in PICTURES[:5]])
    table = pyarrow.table({"image": cells, "label": [2, -1, 0, 3, None], "text": ["two", "none", "zero", "three", "null"]})
    pyarrow.parquet.write_table(features(table, **types), tmp_path / "x.parquet")
    found, skipped = _all(str(tmp_path / "x.parquet"))
    assert [(sample.labels.captions[0], sample.labels.name) for sample in found] == [
        ("two", "tree"), ("none", None), ("zero", "dog"), ("null", None)]
    assert skipped == [("no class has this number", f"{tmp_path}/x.parquet: row 4")]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "class": [0.0, 1.0, 2.0, 3.5, float("nan")]}), tmp_path / "y.parquet")
    found, skipped = _all(str(tmp_path / "y.parquet"))
    assert [sample.labels.name for sample in found] == ["0", "1", "2", "3.5"] and [reason for reason, _ in skipped] == ["no caption"]


def test_parquet_of_hugging_face_and_of_failed_downloads(tmp_path):
    import pyarrow
    import pyarrow.parquet

    cells = pyarrow.array([{"bytes": data, "path": "x.png"} for data in PICTURES])
    table = features(pyarrow.table({"pixels": cells, "n": [[f"{c} a", f"{c} b"] for c in CAPTIONS]}), pixels={"_type": "Image"})
    pyarrow.parquet.write_table(table, tmp_path / "hub.parquet")
    found, _ = _all(f"{tmp_path}/hub.parquet?caption=n")
    assert [sample.labels.captions for sample in found] == [(f"{c} a", f"{c} b") for c in CAPTIONS]
    lost = arrow_table("jpg").set_column(1, "jpg", pyarrow.array([None, *PICTURES[1:]]))
    pyarrow.parquet.write_table(lost, tmp_path / "lost.parquet")
    found, skipped = _all(str(tmp_path / "lost.parquet"))
    assert len(found) == 11 and skipped == [("no image", f"{tmp_path}/lost.parquet: row 1")]


@pytest.mark.parametrize("make, message", [
    (lambda folder: delimited(folder / "x.csv", ",", ("where", "what")), r"x.csv has no picture among its columns where, what; .*\?image="),
    (lambda folder: delimited(folder / "x.csv", ",", ("path", "what")), "x.csv has no caption and no class among its columns path, what"),
    (lambda folder: delimited(folder / "x.csv", ",") + "?caption=words", "has no caption and no class among its columns filepath, title"),
    (lambda folder: delimited(folder / "x.csv", ",") + "?sep=ab", "the separator 'ab' of .* is no single character"),
    (lambda folder: parquet(folder / "x.parquet") + "?image=photo", "x.parquet has no picture among its columns key, jpg, caption"),
])
def test_tables_without_pictures_or_captions_are_refused_at_once(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        expand(make(tmp_path))


def test_without_pyarrow_one_sentence(tmp_path, monkeypatch):
    source = parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"parquet and arrow files need pyarrow: pip install 'fastvlp\[arrow\]'"):
        expand(source)


def test_broken_rows_are_named_and_the_rest_is_read(tmp_path):
    pictures(tmp_path / "pictures")
    (tmp_path / "words.txt").write_text("no picture")
    os.mkfifo(tmp_path / "fifo.png")
    long = b"l" * 140_000
    rows = [b"\xef\xbb\xbffilepath,title", b"pictures/00.png,good", b"", b"pictures/01.png", b"pictures/01.png,latin \xe9", b",nothing",
            b"https://host/a.png,far", b"nowhere.png,lost", b"words.txt,text", b"fifo.png,waits", b"/dev/zero,endless", b"pictures,folder",
            b"pictures/02.png," + long, b"x," + b"y,".join([b"z" * 1000] * 1100), b"pictures/03.png,\0", b"pictures/04.png,also good"]
    (tmp_path / "x.csv").write_bytes(b"\r\n".join(rows))
    found, skipped = _all(str(tmp_path / "x.csv"))
    assert [sample.labels.captions[0] for sample in found] == ["good", "also good"]
    named = [("row is broken", 12), ("row is too long", 13), ("no caption", 3), ("caption is not UTF-8", 4), ("no image", 5),
             ("picture is an address, which is not fetched", 6), ("picture file is missing", 7), ("not an image", 8),
             ("picture is not a plain file", 9), ("picture is not a plain file", 10), ("picture is not a plain file", 11),
             ("caption is not UTF-8", 14)]
    assert skipped == [(reason, f"{tmp_path}/x.csv: row {number}") for reason, number in named]


def test_a_quote_that_is_never_closed_loses_little(tmp_path):
    pictures(tmp_path / "pictures")
    rows = [f"pictures/{i % 12:02d}.png,caption {i}\n" for i in range(20_000)]
    rows[100] = 'pictures/00.png,"never closed\n'
    (tmp_path / "x.csv").write_text("filepath,title\n" + "".join(rows))
    problems = []
    index = Index(expand(tmp_path / "x.csv"), lambda *problem: problems.append(problem))
    assert 14_000 < index.count(0) < 20_000 and problems == [("row is broken", f"{tmp_path}/x.csv: row 101")]


def test_json_lines_that_are_none(tmp_path):
    path = json_lines(tmp_path / "x.jsonl")
    with open(path, "ab") as file:
        file.write(b"\n[1]\n{broken\n" + b'{"file_name": "' + b"x" * (1 << 21) + b'"}\n{"file_name": 3, "text": "a"}\n' + b"[" * 100_000)
    found, skipped = _all(path)
    assert len(found) == 12
    assert Counter(reason for reason, _ in skipped) == {"row is broken": 3, "row is too long": 1, "no image": 1}


def test_what_changes_while_it_is_read_is_refused(tmp_path):
    for kind in ("csv", "parquet", "datasets"):
        source = MAKERS[kind](tmp_path / kind) if (tmp_path / kind).mkdir() is None else None
        index = Index(expand(source), print)
        assert index.count(0) > 0
        with open(index.paths[0], "ab") as file:
            file.write(b"more\n")
        with pytest.raises(Exception, match="shard was replaced while it was read"):
            Reader(index).labels(0, 0)


@pytest.mark.parametrize("kind", ["parquet", "datasets", "csv"])
def test_damage_loses_samples_and_nothing_else(kind, tmp_path):
    """Bytes turned at random anywhere: what is left is read, what is not is named, in a few words."""
    path = expand(MAKERS[kind](tmp_path))[0]
    whole = open(path, "rb").read()
    rng = np.random.default_rng(7)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.integers(256)
        if rng.random() < 0.2:
            del data[rng.integers(len(data)):]
        open(path, "wb").write(data)
        try:
            pieces = expand(path)
        except (ValueError, OSError):
            continue
        reader = Reader(Index(pieces, lambda reason, name: None))
        found, skipped = _all(pieces)
        assert len(found) + len(skipped) <= 40 and all(len(reason) < 60 for reason, _ in skipped)
        del reader


def test_digests_name_the_data(tmp_path):
    source = files(tmp_path / "files")
    first = Index(expand(source), print).digest()
    assert Index(expand(source), print).digest() == first
    (tmp_path / "files" / "000" / "99.png").write_bytes(encoded(picture()))
    assert Index(expand(source), print).digest() != first


def test_links_are_followed_to_files_and_not_to_folders(tmp_path):
    source = files(tmp_path / "files")
    (tmp_path / "files" / "again").symlink_to(tmp_path / "files", target_is_directory=True)
    (tmp_path / "files" / "000" / "20.png").symlink_to(tmp_path / "files" / "000" / "00.png")
    (tmp_path / "files" / "000" / "20.txt").write_text("linked")
    found, skipped = _all(source)
    assert len(found) == 13 and found[-1].labels.captions == ("linked",) and not skipped


def test_open_clip_s_own_reader_sees_the_same(tmp_path):
    """Its CsvDataset over the same file, keys and separator."""
    from benchmarks.rivals import import_open_clip

    import_open_clip()
    data, pandas = pytest.importorskip("open_clip_train.data"), pytest.importorskip("pandas")
    source = delimited(tmp_path / "x.csv", "\t")
    frame = pandas.read_csv(source, sep="\t")
    frame["filepath"] = [str(tmp_path / path) for path in frame["filepath"]]
    frame.to_csv(source, sep="\t", index=False, quoting=csv.QUOTE_MINIMAL)
    theirs = data.CsvDataset(source, transforms=lambda image: image, img_key="filepath", caption_key="title", tokenizer=lambda texts: texts)
    ours, _ = _all(source)
    assert [sample.labels.captions[0] for sample in ours] == [theirs[i][1] for i in range(12)]
    assert all(sample.image.tobytes() == theirs[i][0].tobytes() for i, sample in enumerate(ours))
