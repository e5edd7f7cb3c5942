"""Shards at addresses: ranges of bytes over HTTP and fsspec's memory, the index beside a shard, retries, and the cache of blocks."""

import collections
import gzip
import http.server
import itertools
import json
import re
import threading

import fsspec
import numpy as np
import pytest
import torch
from tar_files import encoded, metadata, picture, small_tokenizer, sound, write_shards, write_tar

from fastvlp import cli
from fastvlp.data import Caption, Image, Stage, Stream, expand, remote
from fastvlp.data.fields import bind
from fastvlp.data.samples import samples
from fastvlp.data.shards import Index, scan

FIELDS = bind({"image": Image(16, patch=8), "text": Caption(9)}, None, small_tokenizer())
pytest.importorskip("aiohttp")


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder, by ranges; counts what is asked of it, and fails when it is told to."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.sent = folder, collections.Counter(), 0
        self.fail, self.ranges = 0, True

    def address(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        server, name = self.server, self.path.lstrip("/")
        server.asked[name] += 1
        if server.fail > 0:
            server.fail -= 1
            self.send_error(503)
            return
        if not (server.folder / name).is_file():
            self.send_error(404)
            return
        data = (server.folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
        part = data[int(asked[1]):int(asked[2]) + 1 if asked[2] else None] if asked else data
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes" if server.ranges else "none")
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            server.sent += len(part)
            self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAIT", 0.0)
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def _facts(batches):
    return [(batch.keys, batch.ids.tolist(), batch.image.x, batch.text.x) for batch in batches]


def test_batches_are_those_of_local_files(server):
    """Whoever reads them: this process, workers, one that starts in the middle."""
    local = write_shards(server.folder)
    there = server.address("good-{000..003}.tar")

    def take(source, n, **options):
        return _facts(itertools.islice(Stream(source, FIELDS, 10, 1, Stage(), **options), n))

    right = take(local, 8)
    for found in (take(there, 8), take(there, 8, workers=2), [*right[:3], *take(there, 5, start=3)]):
        for ours, theirs in zip(right, found, strict=True):
            assert ours[:2] == theirs[:2] and torch.equal(ours[2], theirs[2]) and torch.equal(ours[3], theirs[3])


def test_an_index_saves_reading_the_headers(server, monkeypatch):
    """Without one, a shard goes by once and what was found is kept; with one beside it, a sample costs its blocks alone."""
    monkeypatch.setattr(remote, "BLOCK", 4096)
    monkeypatch.setenv("FASTVLP_CACHE_GB", "0")
    members = [member for i in range(40)
               for member in ((f"{i:02d}.png", encoded(picture(i, (90, 60)))), (f"{i:02d}.json", metadata(f"c {i}")))]
    size = len(open(write_tar(server.folder / "x.tar", members), "rb").read())
    address = server.address("x.tar")

    def cost(path):
        before, index = server.sent, Index(expand(path), print)
        assert index.count(0) == 40 and index.shard(0).keys[7] == "07"
        counted = server.sent - before
        image = next(iter(itertools.islice(samples(path), 7, 8))).image
        assert image.tobytes() == picture(7, (90, 60)).tobytes()
        return counted

    assert size > 50 * 4096
    assert cost(address) > size - 4096  # every block holds a header
    assert cost(address) <= 2 * 4096  # known to this machine now: the beginning, by which it is known again
    write_tar(server.folder / "y.tar", members)
    assert cli.main(["index", str(server.folder / "y.tar")]) == 0
    index = (server.folder / "y.tar.index.json").stat().st_size
    assert cost(server.address("y.tar")) <= index + 2 * 4096 < size / 4
    monkeypatch.setattr(remote, "BLOCK", 4 << 20)
    before = server.sent
    assert Index([server.address("y.tar")], print).count(0) == 40 and server.sent - before == index + 4096  # no block of the shard


@pytest.mark.parametrize("fails", [1, 5])
def test_a_network_that_fails_is_asked_again(server, fails):
    write_tar(server.folder / "x.tar", sound(0) + sound(1))
    server.fail = fails
    assert [sample.key for sample in samples(server.address("x.tar"))] == ["sample0000", "sample0001"]
    assert server.fail == 0


def test_a_server_that_is_down_loses_its_shards_by_name(server, monkeypatch):
    write_shards(server.folder, 2)
    paths = expand(server.address("good-{000..001}.tar"))
    monkeypatch.setenv("FASTVLP_CACHE_GB", "0")
    server.fail = 1000
    (reason, name), _ = scan(paths[0]).problems + scan(paths[1]).problems
    assert reason == "shard cannot be opened" and name.startswith(f"{paths[0]}: ")
    server.fail = 0
    lost = server.address("lost.tar")
    assert scan(lost).problems[0][0] == "shard cannot be opened" and scan(lost).keys == []
    server.ranges = False
    monkeypatch.setattr(remote, "BLOCK", 4096)
    (reason, name), = scan(paths[0]).problems
    assert reason == "shard cannot be opened" and name.endswith("the server answers no ranges")


def test_blocks_are_kept_up_to_a_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    monkeypatch.setattr(remote, "SWEEP", 1)
    path = write_tar(server.folder / "x.tar", [(f"{i}.png", encoded(picture(i, (60, 40)))) for i in range(40)])
    whole = open(path, "rb").read()
    for gigabytes, most in (("1e-4", 100_000 + 4096), ("1", len(whole) + 4096), ("0", 0)):
        monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / f"cache{gigabytes}"))
        monkeypatch.setenv("FASTVLP_CACHE_GB", gigabytes)
        with remote.File(server.address("x.tar")) as file:
            before = server.sent
            for _ in range(2):
                assert b"".join(iter(lambda: file.read(10_000), b"")) == whole
                file.seek(0)
        kept = sum(block.stat().st_size for block in (tmp_path / f"cache{gigabytes}").glob("blocks/*"))
        assert kept <= most and (kept > 0) == (most > 0)
        assert server.sent - before <= 2 * len(whole) + 2 * 4096 and (gigabytes != "1" or server.sent - before == len(whole))
        rng = np.random.default_rng(0)
        for first, size in zip(rng.integers(0, len(whole), 20).tolist(), rng.integers(0, 20_000, 20).tolist(), strict=True):
            assert remote.File(server.address("x.tar")).pread(size, first) == whole[first:first + size]
    monkeypatch.setenv("FASTVLP_CACHE_GB", "many")
    with pytest.raises(ValueError, match="FASTVLP_CACHE_GB is 'many'; it is a number of GB"):
        remote.cache_bytes()


def test_lists_of_addresses(memory, tmp_path):
    for path in write_shards(tmp_path, 3, 2):
        memory.pipe_file(f"/bucket/{path.rpartition('/')[2]}", open(path, "rb").read())
    memory.pipe_file("/bucket/readme.txt", b"")
    all_three = [f"memory:///bucket/good-00{i}.tar" for i in range(3)]

    def names(*entries):
        return [path.rpartition("/")[2] for path in expand(list(entries))]

    assert expand("memory:///bucket/good-{000..002}.tar") == all_three
    assert names("memory:///bucket/*.tar") == names("memory:///bucket/") == names(*all_three) == [f"good-00{i}.tar" for i in range(3)]
    assert names("memory:///bucket/good-*.tar", str(tmp_path)) == 2 * [f"good-00{i}.tar" for i in range(3)]
    assert [sample.key for sample in samples("memory:///bucket/*.tar")] == [f"sample{i:04d}" for i in range(6)]
    memory.pipe_file("/bucket/packed.tar", b"\x1f\x8b" + b"x" * 2000)
    assert scan("memory:///bucket/packed.tar").problems == [
        ("shard is packed, which is read from local files alone", "memory:///bucket/packed.tar")]


def test_classes_of_shards_at_addresses(memory, tmp_path):
    shard = write_tar(tmp_path / "x.tar", [("a.png", encoded(picture())), ("a.cls", b"1")])
    memory.pipe_file("/set/test/0.tar", open(shard, "rb").read())
    assert [sample.labels.name for sample in samples("memory:///set/test/0.tar")] == ["1"]
    memory.pipe_file("/set/classnames.txt", b"dog\nhouse\n")
    assert [sample.labels.name for sample in samples("memory:///set/test/0.tar")] == ["house"]


@pytest.mark.parametrize("entry, error, message", [
    ("pipe:cat x.tar", ValueError, "the output of a command, of which no part can be read again, so that no run could continue exactly"),
    ("memory:///none/x.tar", FileNotFoundError, "no shard matches 'memory:///none/x.tar'; 'memory:///none/x.tar' is not there"),
    ("memory:///none/*.tar", FileNotFoundError, "nothing there ends in .tar"),
    ("memory:///bucket/pairs.csv", ValueError, "'memory:///bucket/pairs.csv' is no .tar; of addresses only shards are read"),
    ("nosuch://bucket/x.tar", ValueError, "[Pp]rotocol"),
])
def test_addresses_that_are_refused(memory, entry, error, message):
    with pytest.raises(error, match=message):
        expand(entry)


def test_a_protocol_that_is_not_installed_is_one_sentence(monkeypatch):
    def lacks(address):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", lacks)
    with pytest.raises(ImportError, match="^s3:// cannot be read: Install s3fs to access S3$"):
        expand("s3://bucket/{0000..0003}.tar")


def _indexed(path):
    assert cli.main(["index", str(path)]) == 0
    return json.loads((path.parent / f"{path.name}.index.json").read_text())


@pytest.fixture
def shard(tmp_path):
    array = b"\x93NUMPY" + bytes(50)
    write_tar(tmp_path / "x.tar", [*sound(0), ("b.png", encoded(picture())), ("b.txt", b"b"), ("b.depth.npy", array), ("c.txt", b"c"),
                                   *sound(1)])
    return tmp_path / "x.tar"


def test_an_index_says_what_the_headers_say(shard, memory, capsys):
    headers = scan(str(shard))
    _indexed(shard)
    assert "3 samples in 1 shards, 1 that cannot be used; 1 indices written" in capsys.readouterr().out
    _indexed(shard)
    assert "0 indices written" in capsys.readouterr().out
    memory.pipe_file("/b/x.tar", shard.read_bytes())
    assert cli.main(["index", "memory:///b/x.tar"]) == 0 and memory.exists("/b/x.tar.index.json")
    for path in (str(shard), "memory:///b/x.tar"):
        index = scan(path)
        assert index.keys == headers.keys and np.array_equal(index.members, headers.members)
        assert index.problems == [("no image", f"{path}: c")]
        assert np.array_equal(index.arrays["depth"], headers.arrays["depth"]) and index.array(1, "depth").tolist()[1] == 56
    assert Index([str(shard)], print).digest() == Index(["memory:///b/x.tar"], print).digest()


def test_shards_alone_have_an_index(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("path,title\na.png,a\n")
    assert cli.main(["index", str(tmp_path / "x.csv")]) == 2
    assert "x.csv is no shard, and shards alone have an index" in capsys.readouterr().err
    write_tar(tmp_path / "x.tar", sound(0))
    with open(tmp_path / "x.tar", "rb") as plain, gzip.open(tmp_path / "y.tar.gz", "wb") as packed:
        packed.write(plain.read())
    assert cli.main(["index", str(tmp_path)]) == 1
    assert "y.tar.gz: shard is packed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.tar", "x.tar.index.json", "y.tar.gz"]


def test_an_index_of_another_shard_is_not_used(shard):
    _indexed(shard)
    data = bytearray(shard.read_bytes())
    assert data.count(b"sample0000.png") == 1
    header = data.find(b"sample0000.png")
    data[header:header + 14] = b"renamed000.png"  # the same size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    shard.write_bytes(data)
    assert scan(str(shard)).keys == ["b", "sample0001"] and scan(str(shard)).problems[0] == ("no caption", f"{shard}: renamed000")


@pytest.mark.parametrize("key, value", [
    ("version", 2), ("size", 1), ("keys", None), ("keys", ["a"] * 4), ("keys", [3, "b", "c"]), ("keys", ["k" * 3000, "b", "c"]),
    ("members", [0] * 23), ("members", ["0"] * 24), ("members", [[0] * 24]), ("members", [1 << 62] * 24), ("members", [-2] * 24),
    ("members", [1e300] * 24), ("members", [1 << 70] * 24), ("arrays", {"depth": [3, 0, 1]}), ("arrays", {"depth": [1, 0, 1 << 40]}),
    ("arrays", {"depth": [1, 0, 1, 1, 0, 1]}), ("arrays", []), ("arrays", {str(i): [] for i in range(300)}), ("problems", [["a"]]),
    ("problems", 7), ("problems", [[1, 2]]), (None, b"[" * 100_000), (None, b"\xff"), (None, b"[]"), (None, b""),
])
def test_a_stranger_s_index_is_no_worse_than_none(shard, key, value):
    headers, said = scan(str(shard)), _indexed(shard)
    target = shard.parent / f"{shard.name}.index.json"
    target.write_bytes(value if key is None else json.dumps({**said, key: value}).encode())
    found = scan(str(shard))
    assert found.keys == headers.keys and np.array_equal(found.members, headers.members) and found.problems == headers.problems


def test_names_in_an_index_cannot_write_on_a_terminal(shard):
    said = _indexed(shard)
    said["keys"][0], said["problems"] = "a\x1b[2Jb", [["\x1b]0;t\x07", "\u202e"]]
    (shard.parent / f"{shard.name}.index.json").write_text(json.dumps(said))
    found = scan(str(shard))
    assert found.keys[0] == "a\\x1b[2Jb" and found.problems == [("\\x1b]0;t\\x07", f"{shard}: \\u202e")]
