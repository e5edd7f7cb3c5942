"""The stream of batches: what it holds, and that its position survives restarts, workers, ranks and broken samples."""

import itertools
import os
import pickle
import signal
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tar_files import encoded, metadata, picture, small_tokenizer, sound, write_shards, write_tar

from fastvlp.data import Stage, Stream
from fastvlp.data.samples import Reader

TOKENIZER = small_tokenizer()


def _stream(shards, batch_size=10, **options):
    return Stream(shards, TOKENIZER, batch_size, patch_size=8, context_length=9, **{"seed": 1, "stage_at": Stage(16), **options})


def _take(stream, n):
    return list(itertools.islice(stream, n))


def _assert_same(a, b):
    assert a.index == b.index and a.keys == b.keys
    assert all(map(torch.equal, a.images, b.images)) and all(map(torch.equal, a.texts, b.texts))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.seeds, b.seeds)


def _joined(parts):
    """Slices of one batch put together."""
    first = parts[0]
    return type(first)([i for p in parts for i in p.images], [t for p in parts for t in p.texts], torch.cat([p.ids for p in parts]),
                       [k for p in parts for k in p.keys], first.index, torch.cat([p.seeds for p in parts]))


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
    assert len(batch) == 10 and batch.index == 0
    for key, image, text, seed in zip(batch.keys, batch.images, batch.texts, batch.seeds.tolist(), strict=True):
        number = int(key[-4:])
        expected = picture(number).resize((16, 8), Image.Resampling.BICUBIC)  # 20 x 14 pixels: 16 x 11.2, to the patch grid
        assert np.array_equal(image.numpy(), np.asarray(expected)) and image.dtype == torch.uint8
        assert text.tolist() in [TOKENIZER.encode(caption, 9) for caption in eval(sound(number)[1][1])["captions"]]
        assert text.dtype == torch.int64 and len(text) <= 9 and seed >= 0
    assert batch.ids.dtype == torch.int64 and len(set(batch.ids.tolist())) == 10


def test_every_sample_once_an_epoch_with_changing_captions(good):
    batches = _take(_stream(good, batch_size=12), 12)  # three epochs of 48
    epochs = [[key for batch in batches[4 * e:4 * e + 4] for key in batch.keys] for e in range(3)]
    assert all(sorted(epoch) == [f"sample{i:04d}" for i in range(48)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    first, second = ({key: text.tolist() for batch in epoch for key, text in zip(batch.keys, batch.texts, strict=True)}
                     for epoch in (batches[:4], batches[4:8]))
    changed = sum(first[key] != second[key] for key in first)
    assert 18 <= changed <= 46  # 32 of 48 expected with three captions
    only = _take(_stream(good, batch_size=12, max_captions=1), 8)
    assert all(t.tolist() == TOKENIZER.encode(eval(sound(int(key[-4:]))[1][1])["captions"][0], 9)
               for batch in only for key, t in zip(batch.keys, batch.texts, strict=True))


def test_seeds_matter(good):
    assert _take(_stream(good), 1)[0].keys != _take(_stream(good, seed=2), 1)[0].keys


STAGES = [Stage(16), Stage(16, 0.5, 1.0), Stage(24, 1.0, 0.3)]


def _stages(index):
    return STAGES[min(index // 4, 2)]


@pytest.mark.parametrize("shards", ["good", "damaged"])
def test_a_restart_continues_exactly(shards, request):
    shards = request.getfixturevalue(shards)
    whole = _take(_stream(shards, stage_at=_stages), 14)
    assert whole[13].images[0].shape[1] == 24
    for start in (1, 5, 13):
        for options in ({}, {"cache_mb": 0}, {"workers": 2}):
            for a, b in zip(_take(_stream(shards, stage_at=_stages, start=start, **options), 14 - start), whole[start:], strict=True):
                _assert_same(a, b)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shards", ["good", "damaged"])
def test_ranks_see_slices_of_the_same_batches(shards, world_size, request):
    shards = request.getfixturevalue(shards)
    whole = _take(_stream(shards, batch_size=11, stage_at=_stages), 10)
    parts = [_take(_stream(shards, batch_size=11, stage_at=_stages, rank=r, world_size=world_size, start=2), 8) for r in range(world_size)]
    for batch, *slices in zip(whole[2:], *parts, strict=True):
        _assert_same(batch, _joined(slices))
        assert [len(part) for part in slices] == [len(rows) for rows in torch.arange(11).tensor_split(world_size)]


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
    assert stream.skipped == Counter(reason for reason, _ in named)
    assert ("broken tar header", f"{folder}/5.tar") in named and ("not an image", f"{folder}/3.tar: page3") in named
    assert ("shard cannot be opened", f"{folder}/6.tar: No such file or directory") in named
    assert len(set(named)) == len(named)


def test_workers_outlive_ctrl_c(good):
    """Ctrl-C reaches all processes of a terminal; the training process decides when the workers end."""
    batches = iter(_stream(good, workers=2))
    next(batches)
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert [next(batches).index for _ in range(8)] == list(range(1, 9))
    batches.close()


def test_what_workers_get_can_be_pickled(good):
    """Where processes are spawned and not forked."""
    stream = _stream(good)
    request = next(stream._requests())
    copy = pickle.loads(pickle.dumps(stream._loader))
    _assert_same(copy[request].batch(), stream._loader[request].batch())


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


def test_lists_that_match_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard matches .*none.*tar"):
        _stream(f"{tmp_path}/none-*.tar")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _stream("mini:train", rank=2, world_size=2)


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
    loader = _stream(good, batch_size=48, cache_mb=1, stage_at=Stage(256))._loader  # 147 KB each
    for batch in _take(Stream.__iter__(_with_loader(good, loader)), 2):
        assert len(batch) == 48
    assert 4 <= len(loader.cache) <= 1_048_576 // (256 * 176 * 3) and sum(a.nbytes for _, a in loader.cache.values()) <= 1 << 20


def _with_loader(good, loader):
    stream = _stream(good, batch_size=48, stage_at=Stage(256))
    stream._loader = loader
    return stream


def test_batches_do_not_share_memory_with_the_cache(good):
    stream = _stream(good, batch_size=48)
    first, second = _take(stream, 2)
    kept = {key: image.clone() for key, image in zip(second.keys, second.images, strict=True)}
    for image in first.images:
        image.zero_()
    assert all(torch.equal(kept[key], image) for batch in _take(_stream(good, batch_size=48, start=1), 1)
               for key, image in zip(batch.keys, batch.images, strict=True))
    again = _take(stream, 2)[1]  # out of the cache
    assert all(torch.equal(kept[key], image) for key, image in zip(again.keys, again.images, strict=True))


def test_the_shipped_data_streams():
    stream = Stream("mini:train", TOKENIZER, 64, 16, 24, seed=0, stage_at=Stage(64))
    assert stream.samples_per_epoch() == 3812 + 2507
    for batch in _take(stream, 2):
        assert all(max(image.shape) == 64 and not (image.shape[0] % 16 or image.shape[1] % 16) for image in batch.images)
    assert not stream.skipped
