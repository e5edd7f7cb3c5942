"""The stream of batches: what it holds, and that its position survives restarts, workers, ranks and broken samples."""

import itertools
import pickle
import re
import signal
import subprocess
import tarfile
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from tar_files import encoded, metadata, picture, small_tokenizer, sound, write_shards, write_tar

from fastvlp.data import Batch, Caption, Image, Other, Source, Stage, Stream
from fastvlp.data.fields import bind
from fastvlp.data.headers import Unusable
from fastvlp.data.samples import Reader
from fastvlp_kernels.packed import Packed

TOKENIZER = small_tokenizer()
FIELDS = bind({"image": Image(16, patch=8), "text": Caption(9)}, None, TOKENIZER)
STAGED = bind({"image": Image(patch=8), "two": Image(patch=8, views=2), "text": Caption(9), "other": Other(Caption(9, pick=2))},
              SimpleNamespace(image=SimpleNamespace(image_size=16)), TOKENIZER)


def _stream(shards, batch_size=10, fields=FIELDS, **options):
    return Stream(shards, fields, batch_size, **{"seed": 1, "stage_at": Stage(), **options})


def _take(stream, n):
    return list(itertools.islice(stream, n))


def _texts(batch):
    return [text.tolist() for text in batch.text.segments()]


def _assert_same(a, b):
    assert (a.index, a.keys, a.source, tuple(a.positions)) == (b.index, b.keys, b.source, tuple(b.positions))
    assert torch.equal(a.ids, b.ids) and a.streams.keys() == b.streams.keys()
    for name, stream in a.streams.items():
        assert torch.equal(stream.x, b.streams[name].x) and torch.equal(stream.pos, b.streams[name].pos)
        assert torch.equal(stream.lengths, b.streams[name].lengths)


def _joined(parts):
    """Slices of one batch put together."""
    streams = {name: Packed.cat([part.streams[name] for part in parts]) for name in parts[0].streams}
    return Batch(streams, torch.cat([p.ids for p in parts]), index=parts[0].index, keys=[k for p in parts for k in p.keys],
                 positions=parts[0].positions)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Five shards of 9 good samples each, with something broken of every kind in between and two shards that are lost."""
    folder = tmp_path_factory.mktemp("damaged")
    image = encoded(picture())
    for s in range(5):
        members = [m for i in range(9) for m in sound(9 * s + i)]
        members += [(f"cut{s}.png", image[:70]), (f"cut{s}.txt", b"cut"), (f"latin{s}.png", image), (f"latin{s}.txt", b"\xe9"),
                    (f"page{s}.jpg", b"<html>404</html>"), (f"page{s}.txt", b"page"), (f"blank{s}.png", image), (f"blank{s}.txt", b" "),
                    (f"mute{s}.png", image)]
        write_tar(folder / f"{s}.tar", members)
    (folder / "5.tar").write_bytes(b"junk" * 500)
    with tarfile.open(folder / "0.tar") as tar:
        cut = tar.getmember("page0.jpg").offset_data + 5
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:cut])
    return f"{folder}/{{0..6}}.tar"


def test_what_a_batch_holds(good):
    batch = _take(_stream(good), 1)[0]
    assert (len(batch), batch.total, batch.world, batch.index, batch.source, tuple(batch.positions)) == (10, 10, 1, 0, 0, (10,))
    for key, image, pos, text in zip(batch.keys, batch.image.segments(), batch.image.pos.split(batch.image.lengths.tolist()), _texts(batch),
                                     strict=True):
        number = int(key[-4:])
        expected = np.asarray(picture(number).resize((16, 8), Pillow.Resampling.BICUBIC))  # 20 x 14 pixels: 16 x 11.2, to the patch grid
        assert image.dtype == torch.uint8 and pos.tolist() == [[0, 0, 0], [0, 0, 1]]
        assert np.array_equal(image.view(2, 8, 8, 3).numpy(), np.stack([expected[:, :8], expected[:, 8:]]))
        assert text in [TOKENIZER.encode(caption, 9) for caption in eval(sound(number)[1][1])["captions"]]
    assert batch.text.x.dtype == torch.int64 and batch.text.max_seqlen == int(batch.text.lengths.max()) <= 9
    assert batch.ids.dtype == torch.int64 and len(set(batch.ids.tolist())) == 10


def test_every_sample_once_an_epoch_with_changing_captions(good):
    batches = _take(_stream(good, batch_size=12), 12)  # three epochs of 48
    epochs = [[key for batch in batches[4 * e:4 * e + 4] for key in batch.keys] for e in range(3)]
    assert all(sorted(epoch) == [f"sample{i:04d}" for i in range(48)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    first, second = ({key: text for batch in epoch for key, text in zip(batch.keys, _texts(batch), strict=True)}
                     for epoch in (batches[:4], batches[4:8]))
    changed = sum(first[key] != second[key] for key in first)
    assert 18 <= changed <= 46  # 32 of 48 expected with three captions


def test_seeds_matter(good):
    assert _take(_stream(good), 1)[0].keys != _take(_stream(good, seed=2), 1)[0].keys


STAGES = [Stage(), Stage(keep=0.5, augment=1.0), Stage(image_size=24, augment=0.3)]


def _stages(index):
    return STAGES[min(index // 4, 2)]


@pytest.mark.parametrize("shards", ["good", "damaged"])
def test_a_restart_continues_exactly(shards, request):
    shards = request.getfixturevalue(shards)
    whole = _take(_stream(shards, fields=STAGED, stage_at=_stages), 14)
    assert whole[13].image.pos[:, 2].max() == 2 and all(len(batch.two) == len(batch.other) == 20 for batch in whole)
    for start in (1, 5, 13):
        for options in ({}, {"cache_mb": 0}, {"workers": 2, "positions": [10 * start]}):
            stream = _stream(shards, fields=STAGED, stage_at=_stages, start=start, **options)
            for a, b in zip(_take(stream, 14 - start), whole[start:], strict=True):
                _assert_same(a, b)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shards", ["good", "damaged"])
def test_ranks_see_slices_of_the_same_batches(shards, world_size, request):
    options = {"batch_size": 11, "fields": STAGED, "stage_at": _stages}
    shards = request.getfixturevalue(shards)
    whole = _take(_stream(shards, **options), 10)
    parts = [_take(_stream(shards, **options, rank=r, world_size=world_size, start=2), 8) for r in range(world_size)]
    for batch, *slices in zip(whole[2:], *parts, strict=True):
        _assert_same(batch, _joined(slices))
        assert [len(part) for part in slices] == [len(rows) for rows in torch.arange(11).tensor_split(world_size)]
        assert all(part.total == 11 and list(part.sizes) == [len(other) for other in slices] for part in slices)
        assert [part.first for part in slices] == [sum(len(other) for other in slices[:rank]) for rank in range(world_size)]


def test_another_batch_size_neither_repeats_nor_leaves_out(good):
    first = _take(_stream(good, batch_size=7), 3)
    rest = _take(_stream(good, batch_size=9, start=3, positions=first[-1].positions), 3)
    assert sorted(key for batch in first + rest for key in batch.keys) == [f"sample{i:04d}" for i in range(48)]


def test_which_source_a_step_takes(tmp_path, good):
    lone = write_tar(tmp_path / "lone.tar", [m for i in range(100, 112) for m in sound(i)])
    sources = [Source(good), Source(lone, weight=3.0, fields=bind({"text": Caption(9)}, None, TOKENIZER))]

    def stage(step):
        return Stage(weights=(1.0, 0.0)) if step >= 40 else Stage()

    whole = _take(_stream(sources, batch_size=5, stage_at=stage), 50)
    assert all({int(key[-4:]) >= 100 for key in batch.keys} == {batch.source == 1} for batch in whole)
    assert all(set(batch.streams) == ({"text"} if batch.source else {"image", "text"}) for batch in whole)
    assert 20 <= sum(batch.source for batch in whole[:40]) <= 38 and not any(batch.source for batch in whole[40:])  # 30 expected
    for number in (0, 1):  # each source is read in its own order without a gap
        taken = [key for batch in whole if batch.source == number for key in batch.keys]
        size = (48, 12)[number]
        assert all(len(set(taken[at:at + size])) == size for at in range(0, len(taken) - size + 1, size))
        assert len(taken) == whole[-1].positions[number]
    for options in ({"positions": whole[29].positions}, {}, {"workers": 2}):
        for a, b in zip(_take(_stream(sources, batch_size=5, stage_at=stage, start=30, **options), 12), whole[30:], strict=False):
            _assert_same(a, b)
    parts = [_take(_stream(sources, batch_size=5, stage_at=stage, rank=r, world_size=2), 20) for r in range(2)]
    assert all(a.source == b.source == c.source for a, b, c in zip(*parts, whole, strict=False))


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (-1.0, 2.0)])
def test_weights_that_do_not_fit_the_sources(good, weights):
    with pytest.raises(ValueError, match="for 2 sources; each has one, none is negative, one is positive"):
        _take(_stream([Source(good), Source(good)], stage_at=Stage(weights=weights)), 1)


def test_windows_and_a_small_index_change_nothing_but_the_order(good, monkeypatch):
    monkeypatch.setattr("fastvlp.data.shards.INDEXED", 13)
    whole = _take(_stream(good, batch_size=12, shuffle=13), 8)
    assert sorted(key for batch in whole[:4] for key in batch.keys) == [f"sample{i:04d}" for i in range(48)]
    assert len({int(key[-4:]) // 12 for batch in whole[:2] for key in batch.keys}) == 2  # a window of two shards
    for a, b in zip(_take(_stream(good, batch_size=12, shuffle=13, start=5), 3), whole[5:], strict=True):
        _assert_same(a, b)


def test_skipping_to_the_start_reads_no_picture(good, monkeypatch):
    read = []
    image = Reader.image
    monkeypatch.setattr(Reader, "image", lambda self, *place, **options: read.append(place) or image(self, *place, **options))
    batch = next(iter(_stream(good, start=3000)))
    assert batch.index == 3000 and len(read) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_counted_and_named_once(damaged, workers):
    named = []
    stream = _stream(damaged, workers=workers, on_skip=lambda *skip: named.append(skip))
    batches = _take(stream, 30)
    usable = {f"sample{i:04d}" for i in range(45)}
    assert {key for batch in batches for key in batch.keys} == usable
    assert all(len(batch) == 10 for batch in batches)
    folder = damaged[:damaged.rindex("/")]
    # shard 0 ends within page0
    assert stream.skipped == {"image is broken": 5, "caption is not UTF-8": 5, "not an image": 4, "caption is empty": 4, "no caption": 4,
                              "shard is cut short": 1, "broken tar header": 1, "shard cannot be opened": 1}
    assert len(stream.skips) == len(named) and stream.skipped == Counter(reason for reason, _ in named)
    assert ("broken tar header", f"{folder}/5.tar") in named and ("not an image", f"{folder}/3.tar: page3") in named
    assert ("shard cannot be opened", f"{folder}/6.tar: No such file or directory") in named
    assert len(set(named)) == len(named)


def test_a_decoder_that_does_not_return_costs_a_sample_and_no_batch(good, monkeypatch):
    """The stream is the one of a shard in which the sample is broken: every batch, in its order, and the name once."""
    image = Reader.image

    def with_one_bad(bad):
        def read(self, shard, member, **options):
            return bad() if self.name(shard, member).endswith("sample0004") else image(self, shard, member, **options)

        return read

    def refuse():
        raise Unusable("takes too long to decode")

    monkeypatch.setattr(Reader, "image", with_one_bad(refuse))
    expected = _take(_stream(good), 12)
    monkeypatch.setattr(Reader, "image", with_one_bad(lambda: re.match("(a|a)+$", "a" * 60 + "b")))
    named = []
    stream = _stream(good, workers=2, on_skip=lambda *skip: named.append(skip))
    stream._loader.guard.seconds = 1.0
    for one, other in zip(_take(stream, 12), expected, strict=True):
        _assert_same(one, other)
    assert [(reason, name.rpartition(": ")[2]) for reason, name in named] == [("takes too long to decode", "sample0004")]
    assert stream.skipped == {"takes too long to decode": 1}


def test_ranks_together_name_each_bad_sample(damaged):
    """What a rank met is not what another met; the names say which samples are the same."""
    alone = _stream(damaged)
    _take(alone, 30)
    ranks = [_stream(damaged, rank=rank, world_size=2) for rank in range(2)]
    for stream in ranks:
        _take(stream, 30)
    assert ranks[0].skips | ranks[1].skips == alone.skips and ranks[0].skips & ranks[1].skips


def test_another_sample_shows_something_else_and_costs_no_picture(tmp_path, monkeypatch):
    image, read = encoded(picture()), []
    members = [m for i in range(24) for m in ((f"{i}.png", image), (f"{i}.json", metadata(f"red {i}", **{"class": f"class {i % 3}"})))]
    shard = write_tar(tmp_path / "x.tar", members + [("bad.png", b"404"), ("bad.json", metadata("red bad"))])
    right = Reader.image
    monkeypatch.setattr(Reader, "image", lambda self, *place, **options: read.append(place) or right(self, *place, **options))
    fields = bind({**FIELDS, "other": Other(Caption(9)), "again": Other(Caption(9))}, None, TOKENIZER)
    batches = _take(_stream(shard, batch_size=12, fields=fields), 20)
    caption = {tuple(TOKENIZER.encode(f"red {i}", 9)): i % 3 for i in range(24)} | {tuple(TOKENIZER.encode("red bad", 9)): 3}
    own, other = ([caption[tuple(text.tolist())] for batch in batches for text in batch.streams[name].segments()]
                  for name in ("text", "other"))
    assert all(a != b for a, b in zip(own, other, strict=True)) and Counter(other).keys() == {0, 1, 2, 3}
    assert all(torch.equal(batch.other.x, batch.again.x) for batch in batches)
    assert len(set(read)) == 25  # the other sample's picture is not asked for, so that a bad one does not matter


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_outlive_signals_that_all_processes_get(good, signum):
    """Ctrl-C and torchrun's SIGTERM reach all processes; the training process decides when the workers end."""
    others = set(torch.multiprocessing.active_children())
    batches = iter(_stream(good, workers=2))
    assert [next(batches).index for _ in range(2)] == [0, 1]  # one from each worker: both have started
    workers = set(torch.multiprocessing.active_children()) - others
    assert len(workers) == 2
    subprocess.run(["kill", f"-{int(signum)}", *(str(worker.pid) for worker in workers)], check=True)
    assert [next(batches).index for _ in range(8)] == list(range(2, 10))
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    for worker in workers:
        worker.join(20)
        assert worker.exitcode in (0, -signal.SIGKILL)  # it ended when it was told to, or was killed; no signal that it was sent ended it


def test_what_workers_get_can_be_pickled(good):
    """Where processes are spawned and not forked."""
    stream = _stream(good)
    request = next(stream._requests())
    copy = pickle.loads(pickle.dumps(stream._loader))
    _assert_same(pickle.loads(pickle.dumps(copy[request])).batch((10,), 0), stream._loader[request].batch((10,), 0))


def test_skips_go_to_the_log(damaged, caplog):
    _take(_stream(damaged), 2)
    assert "skipped, shard cannot be opened" in caplog.text and "6.tar" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_used_it_ends(tmp_path, workers):
    bad = write_tar(tmp_path / "bad.tar", [m for i in range(20) for m in ((f"{i}.jpg", b"404"), (f"{i}.txt", b"words"))])
    with pytest.raises(RuntimeError, match=r"256 samples in a row could not be used, the last in .*bad.tar: not an image \(20\)"):
        _take(_stream(bad, workers=workers), 1)
    empty = write_tar(tmp_path / "empty.tar", [("a.txt", b"words")])
    with pytest.raises(RuntimeError, match="none of the 1 shards holds a usable sample"):
        _take(_stream(empty, workers=workers), 1)


def test_one_good_sample_among_bad_ones_is_enough(tmp_path):
    bad = [m for i in range(20) for m in ((f"{i}.jpg", b"404"), (f"{i}.txt", b"words"))]
    shards = [write_tar(tmp_path / "a.tar", bad), write_tar(tmp_path / "b.tar", sound(0)), write_tar(tmp_path / "c.tar", bad)]
    assert set(_take(_stream(shards), 1)[0].keys) == {"sample0000"}


def test_a_batch_larger_than_the_data(tmp_path):
    small = write_tar(tmp_path / "small.tar", [m for i in range(12) for m in sound(i)])
    with pytest.raises(ValueError, match=r"a batch of 13 is larger than its data: .*small.tar holds 12 usable samples.* at most 12"):
        _take(_stream(small, batch_size=13), 1)
    assert len(set(_take(_stream(small, batch_size=12), 1)[0].keys)) == 12


def test_a_worker_that_hangs_is_not_waited_for_for_ever(good):
    class Slow(Caption):
        def check(self, sample, stage):
            time.sleep(60)

    with pytest.raises(RuntimeError, match="timed out"):
        _take(_stream(good, fields=bind({"text": Slow(9)}, None, TOKENIZER), workers=1, timeout=1), 1)


def test_lists_that_match_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard matches .*none.*tar"):
        _stream(f"{tmp_path}/none-*.tar")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _stream("mini:train", rank=2, world_size=2)
    with pytest.raises(ValueError, match="positions has 2 numbers for 1 sources"):
        _stream("mini:train", positions=[0, 0])


def test_ids_join_pictures_of_one_class(tmp_path):
    image = encoded(picture())
    shard = write_tar(tmp_path / "x.tar", [m for i in range(6) for m in
                                           ((f"{i}.png", image), (f"{i}.json", metadata(f"caption {i}", **{"class": f"class {i % 2}"})))])
    batch = _take(_stream(shard, batch_size=6), 1)[0]
    ids = {key: number for key, number in zip(batch.keys, batch.ids.tolist(), strict=True)}
    assert ids["0"] == ids["2"] == ids["4"] != ids["1"] == ids["3"] == ids["5"]


def test_the_cache_stays_within_its_bound_and_spares_decoding(good, monkeypatch):
    decoded = []
    image = Reader.image
    monkeypatch.setattr(Reader, "image", lambda self, *place, **options: decoded.append(place) or image(self, *place, **options))
    stream = _stream(good, batch_size=48)
    _take(stream, 4)
    assert len(decoded) == 48
    _take(_stream(good, batch_size=48, cache_mb=0), 4)
    assert len(decoded) == 48 + 4 * 48
    stream = _stream(good, batch_size=48, cache_mb=1, stage_at=Stage(image_size=256), fields=STAGED)  # 147 KB each
    _take(stream, 2)
    held = [entry for entry in stream._loader.cache.entries.values() if isinstance(entry, np.ndarray)]
    assert 4 <= len(held) and sum(array.nbytes for array in held) <= 1 << 20


def test_a_stage_with_another_size_frees_the_pictures_of_the_last(good):
    stream = _stream(good, batch_size=48, fields=STAGED, stage_at=lambda step: Stage(image_size=16 if step < 2 else 24))
    _take(stream, 3)
    assert {entry.shape[1] for entry in stream._loader.cache.entries.values() if isinstance(entry, np.ndarray)} == {24}


def test_batches_do_not_share_memory_with_the_cache(good):
    stream = _stream(good, batch_size=48)
    first, second = _take(stream, 2)
    kept = dict(zip(second.keys, second.image.x.clone().split(second.image.lengths.tolist()), strict=True))
    first.image.x.zero_()
    for batch in (_take(_stream(good, batch_size=48, start=1), 1)[0], _take(stream, 2)[1]):  # read again, and out of the cache
        assert all(torch.equal(kept[key], image) for key, image in zip(batch.keys, batch.image.segments(), strict=True))


def test_a_field_that_makes_another_number_of_entries(good):
    class Short(Caption):
        def __call__(self, samples, words, stage):
            return torch.zeros(3)

    with pytest.raises(ValueError, match="the field 'text' made 3 entries of 10 samples"):
        _take(_stream(good, fields=bind({"text": Short(9)}, None, TOKENIZER)), 1)


def test_the_shipped_data_streams():
    stream = Stream("mini:train", STAGED, 64, seed=0, stage_at=Stage(image_size=64))
    assert stream.sizes() == [3812 + 2507]
    for batch in _take(stream, 2):
        assert all(int(pos.max()) == 7 for pos in batch.image.pos.split(batch.image.lengths.tolist()))
    assert not stream.skipped
