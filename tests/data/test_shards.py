"""Shard lists, and the tar reader against the standard library's."""

import io
import os
import re
import tarfile
from pathlib import Path

import pytest
from tar_files import encoded, metadata, picture, sound, write_tar

from fastvlp.data import expand
from fastvlp.data.shards import MINI, NAMED, Index, scan
from fastvlp.data.tar import BrokenTar, tar_members

ROOT = Path(__file__).parent.parent.parent


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def _short(paths):
    return [os.path.basename(path) for path in paths]


def test_shard_lists(tmp_path):
    _touch(tmp_path, "a-0008.tar", "a-0009.tar", "a-0010.tar", "b.tar", "notes.txt", "odd[1].tar", "odd{1}.tar", "sub/c.tar")
    assert _short(expand(tmp_path / "b.tar")) == ["b.tar"]
    assert _short(expand(tmp_path / "odd{1}.tar")) == ["odd{1}.tar"]
    assert _short(expand(f"{tmp_path}/a-*.tar")) == ["a-0008.tar", "a-0009.tar", "a-0010.tar"]
    assert _short(expand(f"{tmp_path}/a-{{0008..0010}}.tar")) == ["a-0008.tar", "a-0009.tar", "a-0010.tar"]
    assert _short(expand(f"{tmp_path}/{{b,sub/c}}.tar")) == ["b.tar", "c.tar"]
    assert _short(expand(f"{tmp_path}/{{a,b}}*.tar")) == ["a-0008.tar", "a-0009.tar", "a-0010.tar", "b.tar"]
    assert _short(expand(tmp_path / "sub")) == _short(expand(f"{tmp_path}/su*")) == ["c.tar"]
    assert _short(expand([f"{tmp_path}/b.tar", tmp_path / "sub/c.tar"])) == ["b.tar", "c.tar"]
    assert _short(expand(f"{tmp_path}/odd[1].tar")) == ["odd[1].tar"]
    assert _short(expand(f"{tmp_path}/b.tar::{tmp_path}/a-*.tar")) == ["b.tar", "a-0008.tar", "a-0009.tar", "a-0010.tar"]  # open_clip's
    # a lost member of a range is reported when it is read
    assert _short(expand(f"{tmp_path}/a-{{0010..0011}}.tar")) == ["a-0010.tar", "a-0011.tar"]


def test_the_shipped_data_has_names():
    assert _short(expand("mini:train")) == ["train-emoji-0000.tar", "train-emoji-0001.tar", "train-openclipart-0000.tar",
                                            "train-openclipart-0001.tar"]
    assert _short(expand("mini:val-emoji")) == ["val-emoji-0000.tar"]
    with pytest.raises(FileNotFoundError, match="mini:val-openclipart"):
        expand("mini:val")


def test_the_licences_of_the_shipped_pictures_travel_with_them():
    """Every source in the shards is named with its licence, and the wheel lists that page among its licence files."""
    sources = (MINI / "SOURCES.md").read_text()
    named = tuple(f"{name}-" for name in re.findall(r"`([a-z-]+)-\*`", sources))
    assert len(named) == 4 and all(key.startswith(named) for path in expand(list(NAMED)) for key in scan(path).keys)
    assert '"fastvlp/data/mini/SOURCES.md"' in re.search(r"^license-files = .*$", (ROOT / "pyproject.toml").read_text(), re.M)[0]


@pytest.mark.parametrize("pattern", ["{}/none-*.tar", "{}/none.tar", "{}/none-{{00..03}}.tar", "{}/deep/er/x*.tar"])
def test_a_list_that_matches_nothing_says_what_is_there(tmp_path, pattern):
    _touch(tmp_path, *(f"train-{i}.tar" for i in range(7)))
    with pytest.raises(FileNotFoundError) as error:
        expand(pattern.format(tmp_path))
    assert pattern.format(tmp_path) in str(error.value) and str(tmp_path) in str(error.value)
    assert "7 .tar files: train-0.tar, train-1.tar" in str(error.value)


def test_empty_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="list of shards is empty"):
        expand([])
    _touch(tmp_path, "readme.txt")
    with pytest.raises(FileNotFoundError, match="no .tar file but 1 other entries: readme.txt"):
        expand(tmp_path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, form):
    names = ["a.txt", "folder/b.txt", "ünïcödé-名前.txt", "p" * 60 + "/" + "q" * 90 + ".txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long/" * 40 + "n" * 180 + ".txt", "ß" * 120 + ".txt"]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            folder = tarfile.TarInfo(f"dir{i}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            info = tarfile.TarInfo(name)
            info.size = 511 + i  # around one block
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
            link = tarfile.TarInfo(f"link{i}")
            link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
            tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]
    with open(path, "rb") as file:
        assert [member[:3] for member in tar_members(file) if not member.refused] == expected


def test_sizes_in_base_256(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"12345")])
    data = bytearray(open(path, "rb").read())
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    open(path, "wb").write(data)
    with open(path, "rb") as file:
        assert list(tar_members(file)) == [("a.txt", 512, 5, "")]


@pytest.mark.parametrize("shard", ["mini:train", "mini:val-emoji", "mini:val-openclipart"])
def test_the_shipped_shards_are_whole(shard):
    for path in expand(shard):
        with tarfile.open(path) as tar:
            samples = sum(member.name.endswith(".json") for member in tar.getmembers())
        found = scan(path)
        assert len(found.keys) == samples and not found.problems and (found.members[:, :3, 1] > 0).all()


def test_grouping(tmp_path):
    image, text = encoded(picture()), b"words"
    path = write_tar(tmp_path / "x.tar", [
        ("d.1/one.jpg", image), ("d.1/one.txt", text), ("d.1/one.seg.png", image),  # a dot in the folder, a second extension
        ("two.JPG", image), ("two.Txt", text),
        ("three.webp", image), ("three.json", metadata("w")), ("three.webp", image), ("three.json", metadata("w")),  # a key twice
        ("__skip__", b""), (".hidden.jpg", image), ("four.txt", text), ("five.png", image), ("six.cls", b"3"),
    ])
    found = scan(path)
    assert found.keys == ["d.1/one", "two", "three", "three"]
    assert found.members[..., 1].tolist()[0] == [len(image), 5, -1, -1] and found.members[2, 1, 1] == -1
    assert found.problems == [("no image", f"{path}: four"), ("no caption", f"{path}: five"), ("no image", f"{path}: six")]


def _broken(tmp_path, damage):
    path = write_tar(tmp_path / "x.tar", [member for i in range(4) for member in sound(i)])
    data = bytearray(open(path, "rb").read())
    with tarfile.open(path) as tar:
        places = {member.name: member for member in tar.getmembers()}
    open(path, "wb").write(damage(data, places))
    return path


def test_a_broken_header_ends_its_shard(tmp_path):
    def damage(data, places):
        data[places["sample0002.png"].offset + 130] ^= 0xFF
        return data

    path = _broken(tmp_path, damage)
    found = scan(path)
    assert found.keys == ["sample0000", "sample0001"] and found.problems == [("broken tar header", f"{path}: after sample0001")]


def test_a_shard_that_is_cut_short_keeps_what_is_whole(tmp_path):
    path = _broken(tmp_path, lambda data, places: data[:places["sample0002.json"].offset_data + 10])
    found = scan(path)
    assert found.keys == ["sample0000", "sample0001"]
    assert found.problems == [("shard is cut short", f"{path}: after sample0002"), ("no caption", f"{path}: sample0002")]


@pytest.mark.parametrize("content, reason", [(b"", "shard is empty"), (b"x" * 100, "shard is cut short"),
                                             (b"hello" * 1000, "broken tar header"), (b"\x1f\x8b" + b"z" * 2000, "shard is cut short"),
                                             (b"PK\x03\x04" * 200, "shard is packed in a way that is not read (gzip and zstd are)")])
def test_files_that_are_no_shards(tmp_path, content, reason):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    assert scan(str(path)).problems == [(reason, str(path))] and scan(str(path)).keys == []


def test_shards_that_cannot_be_opened(tmp_path):
    path = str(tmp_path / "gone.tar")
    assert scan(path).problems == [("shard cannot be opened", f"{path}: No such file or directory")]
    assert scan(str(tmp_path)).problems[0][0] == "shard cannot be opened"


@pytest.mark.parametrize("record", [b"99 path=x\n", b"x path=y\n", b"0 path=y\n"])
def test_a_broken_extended_header_is_refused(tmp_path, record):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf() + record.ljust(512, b"\0"))
    with open(path, "rb") as file, pytest.raises(BrokenTar, match="header"):
        list(tar_members(file))


def test_the_index_holds_a_bounded_number_of_samples(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{s}.tar", [m for i in range(5) for m in sound(i)] + [("x.txt", b"")]) for s in range(4)]
    monkeypatch.setattr("fastvlp.data.shards.INDEXED", 5 * scan(paths[0]).nbytes // 2)
    reported = []
    index = Index(paths, lambda *problem: reported.append(problem))
    for _ in range(2):
        assert [len(index.shard(number).keys) for number in range(4)] == [5] * 4
        assert len(index._shards) == 2
    assert [index.count(number) for number in range(4)] == [5] * 4
    assert reported == [("no image", f"{path}: x") for path in paths]  # once, although every shard was scanned twice
