"""Frames, pages, regions, vectors and labels, against values that are known beforehand."""

import io
import json
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from records import RECORDS, WORDS, bound, places, record
from tar_files import encoded, picture, write_tar

from fastvlp.data import Frames, Image, Label, Pages, Regions, Stage, Stream, Vector
from fastvlp.data.fields import Uniform, bind
from fastvlp.data.fields.image import _lines
from fastvlp.data.frames import frames
from fastvlp.data.images import Unusable, augment, augmentations
from fastvlp.data.samples import Reader
from fastvlp.data.shards import Index


def _grey(level, size=(16, 16)):
    return Pillow.new("RGB", size, (level, level, level))


def _pixels(segment, rows, columns, patch=8):
    """The picture that row-major patches make."""
    return segment.view(rows, columns, patch, patch, 3).permute(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)


def test_frames_of_an_animation():
    records = [record(0, moving=[_grey(10 * n) for n in range(9)]), record(1, moving=[_grey(10 * n) for n in range(4)])] * 20
    packed = bound(Frames(3, stride=2))(records, WORDS, Stage())
    levels = np.array([int(segment.view(-1)[0]) // 10 for segment in packed.segments()]).reshape(40, 3)
    assert all(len(set(segment.view(-1).tolist())) == 1 for segment in packed.segments())
    assert {tuple(row) for row in levels[::2].tolist()} == {(n, n + 2, n + 4) for n in range(5)}  # any start that leaves room
    assert {tuple(row) for row in levels[1::2].tolist()} == {(0, 2, 3)}  # the last again
    assert [segment[0][0] for segment in places(packed)] == [0, 1, 2] * 40


def test_a_window_pans_over_a_still_picture():
    """The red of a pixel says its column, the green its row: so a frame says which window it shows."""
    ramp = np.zeros((256, 256, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(256)[:, None]
    packed = bound(Frames(5, size=64))([record(0, pil=Pillow.fromarray(ramp))] * 40, WORDS, Stage())
    assert packed.lengths.tolist() == [64] * 200
    shown = np.stack([_pixels(segment, 8, 8).numpy() for segment in packed.segments()]).reshape(40, 5, 64, 64, 3).astype(float)
    centre = shown[..., :2].mean((2, 3))
    side = 2 * (shown[:, :, :, 32:, 0].mean((2, 3)) - shown[:, :, :, :32, 0].mean((2, 3)))
    assert np.abs(np.diff(centre, 2, axis=1)).max() < 1 and np.abs(np.diff(side, 2, axis=1)).max() < 2  # a straight way
    assert side.min() > 0.5 * 256 - 4 and side.max() < 256 + 1 and side.std() > 20
    assert (centre - side[..., None] / 2).min() > -2 and (centre + side[..., None] / 2).max() < 258  # inside the picture
    assert np.abs(centre[:, 0] - centre[:, -1]).max() > 40


def test_a_clip_is_augmented_as_one_and_each_frame_keeps_its_own_patches():
    still = [record(0, moving=[picture(3, (32, 32))] * 4)] * 40
    plain = bound(Frames(3, augment=1.0))(still, WORDS, Stage()).x.view(40, 3, -1)
    assert torch.equal(plain[:, 0], plain[:, 1]) and torch.equal(plain[:, 0], plain[:, 2]) and not torch.equal(plain[0], plain[1])
    kept = places(bound(Frames(3, keep=0.5))(still, WORDS, Stage()))
    assert sum([p[1:] for p in a] != [p[1:] for p in b] for a, b in zip(kept[::3], kept[1::3], strict=True)) > 30


def test_preparing_clips():
    clip = [_grey(0), _grey(50)]
    packed = bound(Frames(2)).prepare([clip, clip])
    assert [int(segment[0, 0]) for segment in packed.segments()] == [0, 50, 0, 50] and [p[0][0] for p in places(packed)] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="clip 1 has 1 pictures; 2 are needed"):
        bound(Frames(2)).prepare([clip, clip[:1]])


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_decoding_animations(form):
    """A square that moves over a ground: formats store what changed alone."""
    drawn = []
    for number in range(5):
        image = _grey(255, (24, 16))
        image.paste((200, 0, 0), (4 * number, 4, 4 * number + 4, 8))
        drawn.append(image)
    data = encoded(drawn[0], form, save_all=True, append_images=drawn[1:], **({"lossless": True} if form == "WEBP" else {}))
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(frames(data, 24, 8), drawn, strict=True))
    assert len(frames(data, 24, 8, max_pixels=3 * 24 * 16)) == 3
    assert frames(encoded(drawn[0], form), 24, 8) == [] and frames(encoded(drawn[0], "JPEG"), 24, 8) == []
    with pytest.raises(Unusable, match="image has too many pixels"):
        frames(data, 24, 8, max_pixels=100)
    broken = 0
    for cut in range(1, len(data), 7):  # cut short, it is refused, or ends with a whole frame
        try:
            assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(frames(data[:cut], 24, 8), drawn, strict=False))
        except Unusable as reason:
            broken += str(reason) == "image is broken"
    assert broken > 5


def test_lines_break_between_words():
    words = "the quick brown fox jumps over a lazy dog by night in the old town".split()
    for width in (6, 9, 20):
        assert list(_lines(" ".join(words), lambda text: len(text) <= width)) == textwrap.wrap(" ".join(words), width)  # noqa: B023
    long = list(_lines("ab abcdefghijklm z", lambda text: len(text) <= 5))
    assert long == ["ab", "abcde", "fghij", "klm z"] and list(_lines(" ", len)) == []


def test_pages_hold_the_caption():
    field = Pages(height=10, size=64, patch=8).bind(None, None)
    page = field.draw("red dog", 64, 8)
    by_hand = Pillow.new("L", (64, 16), 255)
    ImageDraw.Draw(by_hand).text((2, 2), "red dog", fill=0, font=ImageFont.load_default(10))
    assert np.array_equal(page[..., 0], np.asarray(by_hand)) and page.shape == (16, 64, 3) and page.min() < 100
    assert field.draw("word " * 100, 64, 8).shape == (64, 64, 3) and (field.draw("", 64, 8) == 255).all()
    packed = field([record(0, ("red dog",)), record(1, ("",))], WORDS[:2], Stage())
    assert np.array_equal(_pixels(packed.segments()[0], 2, 8).numpy(), page) and packed.lengths.tolist() == [16, 8]
    assert torch.equal(field.prepare(["red dog"]).x, packed.segments()[0])


def test_regions_move_with_the_picture():
    """A black box on white is found where the boxes say, in pictures that are cropped, shifted and stretched."""
    records = []
    for number in range(40):
        ground, rng = np.full((64, 96, 3), 255, dtype=np.uint8), np.random.default_rng(number)
        left, top = rng.integers(8, 40), rng.integers(8, 24)
        right, bottom = left + rng.integers(16, 44), top + rng.integers(12, 30)
        ground[top:bottom, left:right] = 0
        records.append(record(number, pil=Pillow.fromarray(ground), values={"boxes": [[left / 96, top / 64, right / 96, bottom / 64]]}))
    boxes = Regions()(records, WORDS, Stage(augment=1.0))
    assert boxes.lengths.tolist() == [1] * 40 and boxes.x.dtype == torch.float32
    place, colour = augmentations(WORDS, 1.0)
    for one, box, *change in zip(records, boxes.x.tolist(), place, colour, strict=True):
        dark = augment(one.picture(96, 8), *change).mean(2) < 128
        rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
        found = [columns[0] / 96, rows[0] / 64, (columns[-1] + 1) / 96, (rows[-1] + 1) / 64]
        assert np.abs(np.array(found) - box).max() < 2 / 64
    assert Regions(augment=0.0)(records, WORDS, Stage(augment=1.0)).x.tolist() == pytest.approx(
        np.concatenate([one.values["boxes"] for one in records]))


def test_regions_that_leave_the_picture():
    corner = record(0, values={"boxes": [[0.0, 0.0, 0.01, 0.01], [0.2, 0.2, 0.8, 0.8]]})
    boxes = Regions()([corner] * 40, WORDS, Stage(augment=1.0))
    assert {1, 2} == set(boxes.lengths.tolist()) and boxes.x.min() >= 0 and boxes.x.max() <= 1
    assert Regions()([record(0), corner], WORDS[:2], Stage()).lengths.tolist() == [0, 2]


def _npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_vectors_and_labels():
    records = [record(0, values={"v": [1, 2.5]}), record(1, files={"v": _npy(np.array([3.0, -4.0], dtype=np.float16))})]
    assert Vector("v")(records, WORDS[:2], Stage()).tolist() == [[1.0, 2.5], [3.0, -4.0]]
    assert Vector("v", width=2)(records, WORDS[:2], Stage()).dtype == torch.float32
    labels = Label("n")([record(0, values={"n": 7}), record(1, values={"n": -1})], WORDS[:2], Stage())
    assert labels.tolist() == [7, -1] and labels.dtype == torch.int64
    assert Label(names=("cat", "dog"))([record(0, values={"class": "dog"})], WORDS[:1], Stage()).tolist() == [1]


HUGE = _npy(np.zeros(3)).replace(b"(3,)", b"(99999999999,)")


@pytest.mark.parametrize(("field", "values", "files", "message"), [
    (Vector("v"), {}, {}, "no v"),
    (Vector("v"), {"v": "text"}, {}, "v is no list of numbers"),
    (Vector("v"), {"v": [[1, 2], [3]]}, {}, "v is no list of numbers"),
    (Vector("v"), {"v": [[1, 2]]}, {}, r"v has the shape \(1, 2\)"),
    (Vector("v", 3), {"v": [1, 2]}, {}, r"v has the shape \(2,\)"),
    (Vector("v"), {"v": [1, float("nan")]}, {}, "v is not finite"),
    (Vector("v"), {}, {"v": b"junk"}, "v.npy is broken"),
    (Vector("v"), {}, {"v": HUGE}, "v.npy is broken"),
    (Vector("v"), {}, {"v": _npy(np.array([{}]), allow_pickle=True)}, "v.npy is broken"),
    (Label("n"), {}, {}, "n is no whole number"), (Label("n"), {"n": 1.5}, {}, "n is no whole number"),
    (Label("n"), {"n": 1 << 70}, {}, "n is no whole number"), (Label(names=("cat",)), {"class": "dog"}, {}, "class is none of the 1 names"),
    (Regions(), {"boxes": [[0, 0, 5, 5]]}, {}, "boxes are not"), (Regions(), {"boxes": [[0.5, 0, 0.4, 1]]}, {}, "boxes are not"),
    (Regions(), {"boxes": [[0.5, 0, 0.4]]}, {}, "boxes are no boxes"), (Regions(), {"boxes": "x"}, {}, "boxes are no boxes"),
    (Regions(), {"boxes": [[0, 0, float("nan"), 1]]}, {}, "boxes are not"),
])
def test_what_a_sample_lacks(field, values, files, message):
    with pytest.raises(Unusable, match=message):
        field.check(record(0, values=values, files=files), Stage())


def test_everything_in_one_shard(tmp_path):
    """Read from a shard, with bad samples among the good ones, whole and by two ranks with workers."""
    members = []
    for number in range(12):
        clip = [_grey(20 * step + number, (16, 16)) for step in range(6)]
        values = {"captions": [f"a {number}"], "class": ("cat", "dog")[number % 2], "boxes": [[0, 0, 0.5, 0.5]] * (number % 3), "n": number}
        members += [(f"{number}.webp", encoded(clip[0], "WEBP", save_all=True, append_images=clip[1:], lossless=True)),
                    (f"{number}.json", json.dumps(values).encode()),
                    (f"{number}.CLIP.npy", _npy(np.array([number, 0.5])))]
    members[3 * 4 + 2] = ("4.clip.npy", b"broken")
    del members[3 * 7 + 2]
    shard = write_tar(tmp_path / "x.tar", members)
    fields = {"clip": Frames(2, stride=3, size=16, patch=16), "v": Vector("clip"), "label": Label(names=("cat", "dog")), "n": Label("n"),
              "boxes": Regions(), "page": Pages(size=32, patch=16)}
    fields = bind(fields, None, None)
    named = set()
    batch = next(iter(Stream(shard, fields, batch_size=12, seed=0, stage_at=Stage(), on_skip=lambda *skip: named.add(skip))))
    assert named == {("clip.npy is broken", f"{shard}: 4"), ("no clip", f"{shard}: 7")}
    n = batch.n.tolist()
    assert set(n) == {number for number in range(12) if number not in (4, 7)}
    assert batch.v.tolist() == [[number, 0.5] for number in n] and batch.label.tolist() == [number % 2 for number in n]
    assert batch.boxes.lengths.tolist() == [number % 3 for number in n] and len(batch.page) == 12
    levels = batch.clip.x[:, 0].view(12, 2).long()
    assert ((levels[:, 1] - levels[:, 0]) == 60).all() and all(number in {v - 20 * s for s in range(3)} for number, v in
                                                              zip(n, levels[:, 0].tolist(), strict=True))
    parts = [next(iter(Stream(shard, fields, 12, 0, Stage(), rank=rank, world_size=2, workers=1))) for rank in range(2)]
    assert [number for part in parts for number in part.n.tolist()] == n and torch.equal(torch.cat([part.v for part in parts]), batch.v)


def test_arrays_belong_to_their_sample(tmp_path):
    """Of names with dots, and of keys that come twice."""
    image, text = encoded(_grey(0)), b"words"
    shard = write_tar(tmp_path / "x.tar", [
        ("a.b.png", image), ("a.b.txt", text), ("a.b.v.npy", b"ab"), ("a.c.png", image), ("a.c.txt", text), ("a.c.v.npy", b"ac"),
        ("d.png", image), ("d.txt", text), ("d.v.npy", b"d"), ("d.png", image), ("d.txt", text), ("e.png", image), ("e.txt", text),
        ("e.w.npy", b"e")])
    index = Index([shard], print)
    reader = Reader(index)
    assert index.shard(0).keys == ["a.b", "a.c", "d", "d", "e"]
    assert [reader.npy(0, member, "V") for member in range(5)] == [b"ab", b"ac", b"d", None, None]
    assert reader.npy(0, 4, "w") == b"e" and reader.values(0, 4) == {}


def test_vectors_of_several_widths():
    with pytest.raises(ValueError, match="'v' has 1 numbers in 1 and 2 in 0; give width="):
        Vector("v")([record(0, values={"v": [1, 2]}), record(1, values={"v": [1]})], WORDS[:2], Stage())


def test_what_the_fields_of_pictures_share():
    for field in (Image(), Frames(), Pages()):
        assert bound(field).at(Stage()) == (24, 8, 1.0, 0.0) and bound(field).at(Stage(image_size=32, keep=0.5))[:3] == (32, 8, 0.5)
    with pytest.raises(ValueError, match="count is 0"):
        Frames(0)
    with pytest.raises(ValueError, match="height is 2"):
        Pages(2)
    assert len(bound(Frames(2))(RECORDS, WORDS, Stage())) == 80


def test_uniform_numbers():
    """Of a sample's random word and the salt alone, and evenly spread."""
    words = np.arange(4000, dtype=np.uint64)
    drawn, other = (Uniform(salt)([None] * 4000, words, Stage()) for salt in (0, 1))
    assert torch.equal(Uniform()([None] * 2, words[[7, 3]], Stage()), drawn[[7, 3]])
    for numbers in (drawn, other):
        assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
        counts = torch.histc(numbers, 10, 0, 1)
        assert ((counts - 400).abs() < 95).all()  # five standard deviations
    assert abs(torch.corrcoef(torch.stack([drawn, other]))[0, 1]) < 0.08
    with pytest.raises(ValueError, match="salt is -1"):
        Uniform(-1)
