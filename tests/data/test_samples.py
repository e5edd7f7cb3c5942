"""Captions and classes of samples, and what makes a sample unusable."""

import json
from collections import Counter

import pytest
from tar_files import encoded, metadata, picture, sound, write_tar

from fastvlp.data.images import Unusable
from fastvlp.data.labels import parse
from fastvlp.data.samples import captions, samples


def test_where_captions_come_from():
    assert parse(b" a dog \n", None).captions == ("a dog",)
    assert parse(b"\xef\xbb\xbfa dog", None).captions == ("a dog",)  # a byte order mark
    assert parse(b"text", metadata(" one", "", "two", 3)).captions == ("one", "two")
    assert parse(b"text", b'{"caption": "other"}').captions == ("text",)
    assert parse(b"text", b'{"captions": []}').captions == ("text",)
    assert parse(None, b'{"caption": "other"}').captions == ("other",)
    assert parse(None, b'{"captions": ["ok", "bad \\ud800", "nul \\u0000"]}').captions == ("ok",)


@pytest.mark.parametrize("fields", [b'{"captions": [null]}', b'{"captions": [""]}', b'{"captions": ["\\ud800"]}', b'{"caption": 3}', b"",
                                    b'[{"bbox": [1, 2, 3, 4], "label": "dog"}]', b'"a dog"', b"{broken", b"\xff\xfe{}", b"[" * 100_000,
                                    b'{"class": "a' + b"x" * (1 << 20) + b'"}', b"9" * 5000])
def test_a_good_caption_beside_any_json(tmp_path, fields):
    path = write_tar(tmp_path / "x.tar", [("0.png", encoded(picture())), ("0.txt", b"a good caption"), ("0.json", fields)])
    assert [sample.labels.captions for sample in samples(path)] == [("a good caption",)]


def test_a_good_json_beside_any_text(tmp_path):
    for text in (b"", b"\xe9", b"a" * (1 << 20 | 1)):
        path = write_tar(tmp_path / "x.tar", [("0.png", encoded(picture())), ("0.txt", text), ("0.json", b'{"caption": "good"}')])
        assert [sample.labels.captions for sample in samples(path)] == [("good",)]


def test_ids_are_those_of_the_class_or_the_first_caption():
    dog = parse(None, metadata("one", "two", **{"class": " Dog "}))
    assert dog.name == "Dog" and dog.id == parse(b"DOG", None).id == parse(None, metadata("x", **{"class": "dog"})).id
    assert dog.id != parse(b"cat", None).id and 0 <= dog.id < 2**63
    assert dog.id == 2072328596179865167  # printf dog | b2sum -l 64, halved
    assert parse(b"a", b'{"class": 3}').name is None


@pytest.mark.parametrize("text, fields, reason", [
    (b"", None, "caption is empty"), (b" \n\t", None, "caption is empty"), (None, b'{"captions": ["", " "]}', "caption is empty"),
    ("caf\u00e9".encode("latin-1"), None, "caption is not UTF-8"), ("dog".encode("utf-16"), None, "caption is not UTF-8"),
    ("dog".encode("utf-16-le"), None, "caption is not UTF-8"), (None, b'{"captions": ["\\udfff"]}', "caption is not UTF-8"),
    (None, b"{}", "no caption"), (None, b'{"captions": [1, null]}', "no caption"),
    (None, b"{broken", "json is broken"), (None, b"[1]", "no caption"), (None, b'"a dog"', "no caption"), (None, b"7", "no caption"),
    (None, b"\xff\xfe{}", "json is broken"), (None, b"[" * 100_000, "json is broken"), (None, b"", "json is broken"),
    (None, b'{"captions": ' + b"9" * 10_000 + b"}", "json is broken"), (b"\xe9", b"{broken", "caption is not UTF-8"),
    (b" ", b'{"captions": ["\\ud800"]}', "caption is not UTF-8"),
])
def test_unusable_labels(text, fields, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        parse(text, fields)


def test_reading_goes_on_past_what_is_broken(tmp_path):
    image = encoded(picture())
    shard = write_tar(tmp_path / "x.tar", [
        *sound(0),
        ("cut.png", image[:60]), ("cut.txt", b"cut"),
        ("empty.png", b""), ("empty.txt", b"e"),
        ("latin.png", image), ("latin.txt", b"\xe9t\xe9"),
        ("blank.png", image), ("blank.txt", b" "),
        ("long.png", image), ("long.txt", b"a" * (1 << 20 | 1)),
        ("alone.png", image),
        *sound(1),
    ])
    skipped = []
    found = list(samples([shard, *_missing(tmp_path)], on_skip=lambda *skip: skipped.append(skip)))
    assert [sample.key for sample in found] == ["sample0000", "sample0001"]
    assert found[1].labels.captions == tuple(json.loads(sound(1)[1][1])["captions"])
    assert found[1].image.tobytes() == picture(1).tobytes()
    assert Counter(skipped) == Counter([
        ("image is broken", f"{shard}: cut"), ("not an image", f"{shard}: empty"), ("caption is not UTF-8", f"{shard}: latin"),
        ("caption is empty", f"{shard}: blank"), ("caption file is too large", f"{shard}: long"), ("no caption", f"{shard}: alone"),
        ("shard cannot be opened", f"{tmp_path}/lost-1.tar: No such file or directory")])
    assert len(list(captions(shard))) == 8  # 3 of sample 0, 3 of sample 1, and those of the two pictures that nobody looked at


def _missing(tmp_path):
    write_tar(tmp_path / "lost-0.tar", [])
    return [f"{tmp_path}/lost-{{0..1}}.tar"]
