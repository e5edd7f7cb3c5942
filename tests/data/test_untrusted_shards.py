"""Shards whose headers lie, whose names write on terminals, that are packed, lost or replaced."""

import gzip
import io
import os
import random
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from tar_files import encoded, metadata, picture, sound, write_tar

from fastvlp.data import Stage, Stream, expand, unpack
from fastvlp.data.images import Unusable
from fastvlp.data.samples import Reader, samples
from fastvlp.data.shards import Index, printable, scan
from fastvlp.data.tar import BrokenTar, tar_members

ROOT = Path(__file__).parent.parent.parent
try:
    zstd = unpack.zstd()
except ImportError:
    zstd = None
ZSTD = pytest.param("zst", marks=pytest.mark.skipif(zstd is None, reason="backports.zstd is not installed: pip install 'fastvlp[zstd]'"))


def _header(name=b"a.jpg", size=b"00000000000\0", kind=b"0"):
    h = bytearray(512)
    h[:len(name)] = name
    h[100:108], h[108:116], h[116:124], h[136:148] = b"0000644\0", b"0000000\0", b"0000000\0", b"00000000000\0"
    h[124:136], h[156:157], h[257:265], h[148:156] = size.ljust(12, b"\0")[:12], kind, b"ustar\00000", b" " * 8
    h[148:156] = b"%06o\0 " % sum(h)
    return bytes(h)


def _pax(key, value, kind=b"x"):
    body = b" " + key + b"=" + value + b"\n"
    length = next(n for n in range(len(body), len(body) + 20) if len(str(n)) + len(body) == n)
    body = str(length).encode() + body
    return _header(b"pax", b"%011o\0" % len(body), kind) + body + bytes(-len(body) % 512)


BAD_SIZES = {"negative": _header(size=b"-0000001000"), "signed": _header(size=b"+0000001000"),
             "underscore": _header(size=b"0_0000001000"), "octal prefix": _header(size=b"0o0000001000"),
             "not octal": _header(size=b"00000000009"), "binary negative": _header(size=b"\xff" * 12),
             "binary, of an exabyte": _header(size=b"\x80" + (1 << 60).to_bytes(11, "big")),
             "binary, with another mark": _header(size=b"\x81" + bytes(11)),
             "pax word": _pax(b"size", b"abc") + _header(), "pax of 5,000 digits": _pax(b"size", b"9" * 5000) + _header(),
             "pax negative": _pax(b"size", b"-1024") + _header(), "pax in other digits": _pax(b"size", "\u0661".encode()) + _header(),
             "pax of an exabyte": _pax(b"size", b"1" + b"0" * 18) + _header(), "global": _pax(b"size", b"-1", b"g") + _header(),
             "pax without a length": _header(b"pax", b"00000000100\0", b"x") + b"=" * 64 + bytes(448) + _header(),  # read for ever once
             "pax in zeros": _header(b"pax", b"00000000100\0", b"x") + bytes(512) + _header(),
             "long name of a gigabyte": _header(size=b"10000000000", kind=b"L"),
             "pax of a gigabyte": _header(size=b"10000000000", kind=b"x"),
             "sparse map without end": (_header(kind=b"S")[:482] + b"\1" + _header(kind=b"S")[483:])}


@pytest.mark.parametrize("data", BAD_SIZES.values(), ids=BAD_SIZES)
def test_sizes_that_lie_break_their_shard_alone(tmp_path, data):
    good = Path(write_tar(tmp_path / "good.tar", sound(0))).read_bytes().rstrip(b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(good + bytes(-len(good) % 512) + data + bytes(1024))
    found = scan(str(path))
    assert found.keys == ["sample0000"]
    assert [reason for reason, _ in found.problems] in (["broken tar header"], ["shard is cut short"])


def test_headers_of_gigabytes_take_no_memory(tmp_path):
    """A sparse file of 3 GB, one header that names all of it: read by a process that may take one."""
    for kind in (b"L", b"K", b"x", b"g"):
        with open(tmp_path / f"{kind.decode()}.tar", "wb") as file:
            file.write(_header(b"long", b"\x80" + (3 << 30).to_bytes(11, "big"), kind))
            file.truncate(512 + (3 << 30) + 1024)
    code = (f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({1 << 30},) * 2)\nfrom fastvlp.data.shards import scan\n"
            f"print([scan({str(tmp_path)!r} + f'/{{kind}}.tar').problems[0][0] for kind in 'LKxg'])")
    assert resource.RLIM_INFINITY  # the module is there: this test is for POSIX
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                         env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"})
    assert run.stdout.strip() == str(["broken tar header"] * 4), run.stderr[-500:]


@pytest.mark.parametrize("place", [0, 3, 101, 110, 156, 300, 400, 511])
def test_the_checksum_of_every_header_is_checked(tmp_path, place):
    """A flipped bit of a name, an owner or the kind changes no length: only the checksum tells."""
    path = write_tar(tmp_path / "x.tar", [member for i in range(3) for member in sound(i)])
    data = bytearray(Path(path).read_bytes())
    with tarfile.open(path) as tar:
        data[tar.getmember("sample0001.png").offset + place] ^= 4
    Path(path).write_bytes(data)
    found = scan(path)
    assert found.keys == ["sample0000"] and found.problems == [("broken tar header", f"{path}: after sample0000")]


def test_random_damage_never_escapes(tmp_path):
    """Any damage gives keys and named problems, members within the file, and ends."""
    path, draw = tmp_path / "x.tar", random.Random(3)
    whole = Path(write_tar(path, [member for i in range(4) for member in sound(i)], tarfile.PAX_FORMAT)).read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 40)):
            at = draw.randrange(len(data) // 512) * 512 + draw.choice((draw.randrange(512), 124 + draw.randrange(33)))
            data[at] = draw.randrange(256)
        path.write_bytes(data[:draw.choice((len(data), draw.randrange(len(data))))])
        found = scan(str(path))
        held = found.members[found.members[..., 1] >= 0]
        assert (held.sum(1) <= path.stat().st_size).all() and (held >= 0).all()
        assert len(found.keys) == 4 or found.problems or bytes(data) != whole


@pytest.mark.parametrize("kind, reason", [
    (tarfile.SYMTYPE, "symbolic link in the shard"), (tarfile.LNKTYPE, "hard link in the shard"), (tarfile.FIFOTYPE, "FIFO in the shard"),
    (tarfile.CHRTYPE, "device in the shard"), (tarfile.BLKTYPE, "device in the shard"), (b"Z", "unknown kind of member in the shard")])
def test_what_is_no_plain_file_is_named_and_never_followed(tmp_path, kind, reason):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for key, text in (("a", None), ("b", b"words")):
            for name, data in ((f"{key}.png", encoded(picture())), (f"{key}.txt", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data or b"")
                if data is None:
                    info.type, info.linkname = kind, str(secret)
                tar.addfile(info, io.BytesIO(data or b""))
    found = scan(str(path))
    assert found.keys == ["b"] and found.problems == [(reason, f"{path}: a")]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_files_are_named_and_what_follows_is_read(tmp_path, form):
    """A sparse file's bytes are not those of the file. GNU's own form has maps behind the header, which no size counts."""
    after = Path(write_tar(tmp_path / "after.tar", sound(1))).read_bytes()
    if form == "gnu":
        header = bytearray(_header(b"s.png", b"00000000010\0", b"S"))
        header[482] = 1
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        sparse = bytes(header) + bytes(504) + b"\1" + bytes(7) + bytes(512) + b"contents".ljust(512, b"\0")
    else:
        sparse = _pax(b"GNU.sparse.major", b"1") + _header(b"s.png", b"00000000010\0") + b"contents".ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(sparse + after)
    found = scan(str(path))
    assert found.keys == ["sample0001"] and found.problems == [("sparse file in the shard", f"{path}: s")]


def test_global_headers_are_those_of_tarfile(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(_pax(b"comment", b"by git archive", b"g") + _pax(b"path", b"all/one.jpg", b"g") + _header(b"a.jpg")
                     + _pax(b"path", b"b.jpg") + _header(b"a.jpg") + _header(b"c.jpg") + bytes(1024))
    with tarfile.open(path) as tar, open(path, "rb") as file:
        assert [member.name for member in tar_members(file)] == tar.getnames() == ["all/one.jpg", "b.jpg", "all/one.jpg"]


def test_what_lies_behind_the_end_is_not_lost_in_silence(tmp_path):
    """Two tars in one file (cat a.tar b.tar)."""
    parts = [Path(write_tar(tmp_path / f"{i}.tar", sound(i))).read_bytes() for i in range(2)]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    found = scan(str(tmp_path / "x.tar"))
    assert found.keys == ["sample0000"] and [reason for reason, _ in found.problems] == ["shard goes on behind its end"]


def test_a_fifo_or_folder_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    (tmp_path / "y.tar").mkdir()
    for name in ("x.tar", "y.tar"):
        path = str(tmp_path / name)
        assert scan(path).problems == [("shard cannot be opened", f"{path}: not a plain file")]  # and does not wait for a writer


def test_one_shard_holds_a_bounded_number_of_everything(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", b"") for i in range(30)])
    monkeypatch.setattr("fastvlp.data.sources.tars.MOST_PROBLEMS", 10)
    assert len(scan(path).problems) == 11 and scan(path).problems[-1][0] == "shard has too many broken samples"
    monkeypatch.setattr("fastvlp.data.sources.tars.MOST_SAMPLES", 10)
    for members in ([m for i in range(30) for m in sound(i)], [(f"a.b{i}.c.txt", b"x") for i in range(30)]):
        found = scan(write_tar(tmp_path / "y.tar", members))
        assert len(found.keys) <= 11 and "shard has too many samples" in [reason for reason, _ in found.problems]
    monkeypatch.setattr("fastvlp.data.sources.tars.MOST_SAMPLES", 100)
    monkeypatch.setattr("fastvlp.data.sources.tars.MOST_NAMES", 10)
    arrays = scan(write_tar(tmp_path / "w.tar", [("a.png", b""), ("a.txt", b""), *((f"a.n{i}.npy", b"") for i in range(11))]))
    assert [reason for reason, _ in arrays.problems] == ["shard has too many arrays"]
    long = write_tar(tmp_path / "z.tar", [("n" * 5000 + ".png", b""), *sound(0)], tarfile.PAX_FORMAT)
    assert scan(long).keys == ["sample0000"] and scan(long).problems == [("name is too long", f"{long}: {'n' * 80}")]


@pytest.mark.parametrize("pattern, said", [
    ("/nowhere/{0..999999999}.tar", "1,000,000,000 files"), ("/nowhere/{0..999}{0..999}{0..9}.tar", "10,000,000 files"),
    ("/nowhere/{5..1}.tar", "count upwards"), ("/nowhere/{a,{b,c}}.tar", "do not match"), ("/nowhere/{0..9.tar", "do not match")])
def test_brace_ranges_have_a_bound(pattern, said):
    start = time.process_time()
    with pytest.raises(ValueError, match=said):
        expand(pattern)
    assert time.process_time() - start < 1


def test_names_out_of_files_cannot_write_on_the_terminal(tmp_path):
    """Keys, problems and messages are escaped where they enter, so that no command, log or page has to."""
    bad = "\x1b]0;owned\x07\u202egnp.\r\n\ud800"
    assert printable(bad) == "\\x1b]0;owned\\x07\\u202egnp.\\r\\n\\ud800" and printable("ünïcödé 名前 🎉") == "ünïcödé 名前 🎉"
    name = "\x1b[2J\u202e"
    path = write_tar(tmp_path / f"{name}.tar", [(f"{name}1.png", encoded(picture())), (f"{name}1.txt", b"words"), (f"{name}2.png", b"cut"),
                                                (f"{name}2.txt", b"words"), (f"{name}3.png", b"")], tarfile.PAX_FORMAT)
    skipped = []
    found = list(samples(path, on_skip=lambda *skip: skipped.append(skip)))
    assert [sample.key for sample in found] == ["\\x1b[2J\\u202e1"]
    assert sorted(skipped) == sorted([("not an image", f"{tmp_path}/\\x1b[2J\\u202e.tar: \\x1b[2J\\u202e2"),
                                      ("no caption", f"{tmp_path}/\\x1b[2J\\u202e.tar: \\x1b[2J\\u202e3")])
    with pytest.raises(FileNotFoundError) as error:
        expand(f"{tmp_path}/none*.tar")
    assert str(error.value).isprintable()


def test_keys_with_dots(tmp_path):
    """What common tools write: "a.b.0.png" belongs to "a.b.0.txt"; beside a plain picture or caption it is one more part of that sample."""
    image = encoded(picture())
    path = write_tar(tmp_path / "x.tar", [
        *[m for i in range(3) for m in ((f"a.b.{i}.png", image), (f"a.b.{i}.TXT", b"words"))],
        ("photo 1.5 mm.JPG", image), ("photo 1.5 mm.json", metadata("w")), ("photo 1.5 mm.seg.png", image),
        ("c.jpg", image), ("c.mask.png", image), ("c.txt", b"words"), ("d.e.png", image), ("d.e.f.txt", b"words")])
    found = scan(path)
    assert found.keys == ["a.b.0", "a.b.1", "a.b.2", "photo 1.5 mm", "c"]
    assert sorted(found.problems) == [("no caption", f"{path}: d.e"), ("no caption", f"{path}: photo 1.5 mm.seg"),
                                      ("no image", f"{path}: d.e.f")]


def test_a_shard_of_dotted_keys_takes_linear_time(tmp_path):
    """All of them are one group by WebDataset's rule: 8,000 samples with an array each, sorted out in one pass."""
    path = write_tar(tmp_path / "x.tar", [m for i in range(8000) for m in
                                          ((f"a.b.{i}.png", b""), (f"a.b.{i}.txt", b"w"), (f"a.b.{i}.vector.npy", b"data"))])
    start = time.process_time()
    found = scan(path)
    assert time.process_time() - start < 4
    assert found.keys == [f"a.b.{i}" for i in range(8000)] and found.array(7999, "vector")[1] == 4


@pytest.mark.parametrize("extension, form", [("gif", "GIF"), ("GIF", "GIF"), ("avif", "AVIF"), ("JPEG", "JPEG"), ("Tiff", "TIFF"),
                                             ("bmp", "BMP"), ("tif", "TIFF"), ("png", "JPEG"), ("jfif", "JPEG")])
def test_pictures_of_every_extension(tmp_path, extension, form):
    path = write_tar(tmp_path / "x.tar", [(f"a.{extension}", encoded(picture(), form)), ("a.Txt", b"words")])
    assert [sample.image.size for sample in samples(path)] == [(20, 14)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _packed(tmp_path, how, count=3):
    plain = Path(write_tar(tmp_path / "plain.tar", [m for i in range(count) for m in sound(i)])).read_bytes()
    path = tmp_path / ("x.tar.gz" if how == "gz" else "x.tar.zst")
    path.write_bytes(gzip.compress(plain) if how == "gz" else zstd.compress(plain))
    return path, tmp_path / "plain.tar"


@pytest.mark.parametrize("how", ["gz", ZSTD])
def test_packed_shards_are_read(tmp_path, how, cache):
    path, plain = _packed(tmp_path, how)
    expected = [(sample.key, sample.image.tobytes(), sample.labels) for sample in samples(plain)]
    assert [(sample.key, sample.image.tobytes(), sample.labels) for sample in samples(path)] == expected and len(expected) == 3
    misnamed = tmp_path / "misnamed.tar"  # by the contents, not the name
    misnamed.write_bytes(path.read_bytes())
    assert scan(str(misnamed)).keys == scan(str(plain)).keys
    copies = list(cache.glob("*.tar"))
    assert len(copies) == 2 and not list(cache.glob("*.partial")) and cache.stat().st_mode & 0o077 == 0
    before = [copy.stat().st_ino for copy in copies]
    scan(str(path))
    assert [copy.stat().st_ino for copy in copies] == before  # unpacked once
    plain.unlink()
    assert sorted(expand(tmp_path)) == [str(misnamed), str(path)]  # a folder's packed shards count


@pytest.mark.parametrize("how", ["gz", ZSTD])
def test_damaged_packed_shards_keep_what_is_whole(tmp_path, how, cache):
    path, _ = _packed(tmp_path, how, 400)  # several blocks of zstd
    path.write_bytes(path.read_bytes()[:-20_000])
    found = scan(str(path))
    assert 0 < len(found.keys) < 400 and "shard is cut short" in [reason for reason, _ in found.problems]


@pytest.mark.parametrize("how", ["gz", ZSTD])
def test_a_bomb_of_a_packed_shard(tmp_path, how, cache, monkeypatch):
    monkeypatch.setattr(unpack, "FLOOR", 1 << 20)
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(bytes(64 << 20)) if how == "gz" else zstd.compress(bytes(64 << 20)))
    assert scan(str(path)).problems == [("shard unpacks to far more than pictures could", str(path))]
    assert not list(cache.glob("*.tar")) and not list(cache.glob("*.partial"))


def test_copies_take_a_bounded_number_of_bytes(tmp_path, cache, monkeypatch):
    paths = []
    for number in range(4):
        path, plain = _packed(tmp_path, "gz")
        paths.append(path.rename(tmp_path / f"{number}.tar.gz"))
    monkeypatch.setattr(unpack, "COPIES", 5 * plain.stat().st_size // 2)
    for path in [*paths, paths[0]]:
        assert scan(str(path)).keys == scan(str(plain)).keys
        assert sum(copy.stat().st_size for copy in cache.glob("*.tar")) <= unpack.COPIES
        time.sleep(0.01)  # the copies' times differ
    assert len(list(cache.glob("*.tar"))) == 2


def test_a_folder_of_copies_that_others_can_write_to_is_refused(tmp_path, cache):
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    path, _ = _packed(tmp_path, "gz")
    (reason, said), = scan(str(path)).problems
    assert reason == "shard cannot be opened" and "others can write" in said


def test_zstd_that_is_not_installed_is_named_at_the_door(tmp_path, monkeypatch):
    path = tmp_path / "x.tar.zst"
    path.write_bytes(unpack.ZSTD + bytes(20))
    monkeypatch.setitem(sys.modules, "backports", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    for read in (expand, scan):
        with pytest.raises(ImportError, match=r"pip install 'fastvlp\[zstd\]'"):
            read(str(path))


def test_missing_shards_and_the_digest_of_the_data(tmp_path):
    def digest(folder):
        return Index(expand(f"{folder}/{{0..3}}.tar"), lambda *_: None).digest()

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            write_tar(tmp_path / folder / f"{number}.tar", sound(number) + sound(number + 3))
    index = Index(expand(f"{tmp_path}/a/{{0..3}}.tar"), lambda *_: None)
    assert index.missing() == [f"{tmp_path}/a/3.tar"]
    assert digest(tmp_path / "a") == digest(tmp_path / "b")  # another machine's folder
    whole = digest(tmp_path / "a")
    seen = {whole}
    write_tar(tmp_path / "a" / "1.tar", sound(1) + sound(4) + sound(5))
    seen.add(digest(tmp_path / "a"))  # replaced
    write_tar(tmp_path / "a" / "1.tar", sound(1) + [("x.png", encoded(picture(4))), ("y.json", sound(4)[1][1])])
    seen.add(digest(tmp_path / "a"))  # of the same size, with fewer samples
    (tmp_path / "a" / "1.tar").unlink()
    seen.add(digest(tmp_path / "a"))  # lost
    assert len(seen) == 4
    swapped = Index([f"{tmp_path}/b/1.tar", f"{tmp_path}/b/0.tar", f"{tmp_path}/b/2.tar", f"{tmp_path}/b/3.tar"], lambda *_: None)
    assert swapped.digest() not in seen


def test_a_shard_that_is_replaced_while_it_is_read(tmp_path):
    """Places from the old headers mean nothing in the new file: the samples are refused, not read askew."""
    path = write_tar(tmp_path / "x.tar", sound(0) + sound(1))
    index = Index([path], lambda *_: None)
    assert index.count(0) == 2
    write_tar(tmp_path / "new.tar", sound(2) + sound(3) + sound(4))
    os.replace(tmp_path / "new.tar", path)
    with pytest.raises(Unusable, match="shard was replaced while it was read"):
        Reader(index).labels(0, 0)


def test_skips_count_each_sample_once_in_little_memory():
    told = []
    stream = Stream("mini:train", {}, 8, 0, Stage(), on_skip=lambda *skip: told.append(skip))
    for _ in range(3):
        for number in range(50):
            stream._skip("not an image", f"{'n' * 1000}{number}")
    assert stream.skipped == {"not an image": 50} and len(told) == 50
    assert sum(sys.getsizeof(skip) + sys.getsizeof(skip[1]) for skip in stream.skips) < 50 * 128


def test_broken_tars_raise_nothing_else(tmp_path):
    """A file that ends within a header's extended part."""
    path = tmp_path / "x.tar"
    path.write_bytes(_header(b"long", b"00000001000\0", b"L") + b"n" * 100)
    with open(path, "rb") as file, pytest.raises(BrokenTar, match="cut short"):
        list(tar_members(file))
