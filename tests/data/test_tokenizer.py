"""Tokenizers by name and file."""

import json
import pickle
import random
import sys

import pytest

from benchmarks.rivals import import_open_clip, version
from fastvlp.data import Tokenizer, load_tokenizer
from fastvlp.data.samples import captions
from fastvlp.data.tokenizer import train_tokenizer
from fastvlp.data.train_tokenizer import main


def test_the_shipped_tokenizer():
    tokenizer = load_tokenizer("mini")
    assert tokenizer.vocab_size == 4096
    body = tokenizer.encode("Curry_Rice,  FOOD")
    assert not {0, 1} & set(body) and tokenizer.encode("curry rice food") == body
    assert tokenizer.core.decode(body) == " curry rice food"
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")  # NFC
    assert tokenizer.core.decode(tokenizer.encode("名前 🎉")) == " 名前 🎉"  # bytes: nothing is unknown
    lengths = [len(tokenizer.encode(caption)) for caption in captions("mini:val-emoji")]
    assert sum(lengths) / len(lengths) < 6 and max(lengths) <= 22
    assert tokenizer.encode(" _, ") == [0]  # never nothing


def test_captions_cannot_end_themselves():
    inside = load_tokenizer("mini").encode("a <|endoftext|> b <|startoftext|>")
    assert 0 not in inside and 1 not in inside


def test_captions_are_cut_before_the_end_token():
    text = "one two three four five six seven eight"
    trained = train_tokenizer([text], vocab_size=300)
    whole = trained.encode(text)
    assert (whole[0], whole[-1]) == (0, 1)
    tokenizer = Tokenizer(trained.core, 6)
    assert tokenizer.encode(text) == [*whole[:5], 1] and tokenizer.encode(text, 4) == [*whole[:3], 1]
    assert tokenizer.encode(text, 100) == whole and tokenizer.encode("") == [0, 1]
    with pytest.raises(ValueError, match="context_length is 2.*at least 3"):
        tokenizer.encode(text, 2)


def _long_texts():
    draw = random.Random(0)
    yield "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=30_000))
    yield "".join(draw.choices("aAbB\u00e9e\u0301 ,_\n名🎉", k=30_000))
    yield "word" * 8000
    yield "a" + " " * 30_000 + "dog and more words"
    yield " ".join(["many words"] * 4000)


@pytest.mark.parametrize("name", ["mini", pytest.param("clip", marks=pytest.mark.skipif(
    version("open_clip_torch") is None, reason="open_clip_torch is not installed"))])
def test_the_first_tokens_of_long_texts_are_those_of_the_whole(name):
    """Only so much of a long caption is encoded as is needed."""
    tokenizer = load_tokenizer(name)
    for text in _long_texts():
        whole = tokenizer.core.encode(text, add_special_tokens=False).ids
        for length in (3, 24, 77):
            room = length - len(tokenizer.start) - len(tokenizer.end)
            assert tokenizer.encode(text, length) == [*tokenizer.start, *whole[:room], *tokenizer.end]


def test_what_is_remembered_has_a_bound_in_bytes(monkeypatch):
    monkeypatch.setattr("fastvlp.data.tokenizer.KNOWN", 64_000)
    tokenizer = load_tokenizer("mini", 24)
    texts = [f"caption {i} " + "words " * (i % 7) for i in range(500)] + ["long " * 2000]
    expected = [tokenizer.encode(text) for text in texts]
    assert sum(map(sys.getsizeof, tokenizer._known)) + sum(map(sys.getsizeof, tokenizer._known.values())) < 64_000
    assert len(tokenizer._known) > 20 and [tokenizer.encode(text) for text in texts] == expected


def test_a_file_of_gigabytes_is_no_tokenizer(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ValueError, match="3,221,225,472 bytes; a tokenizer.json has at most"):
        load_tokenizer(tmp_path)


def test_files_folders_and_pickles_are_the_same_tokenizer(tmp_path):
    tokenizer = load_tokenizer("mini", 12)
    path, text = tmp_path / "tokenizer.json", "a rice cracker, with a long name, and more words than fit"
    tokenizer.save(path)
    for other in (load_tokenizer(tmp_path, 12), load_tokenizer(str(path), 12), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text) == tokenizer.encode(text)
        assert (other.vocab_size, other.context_length) == (4096, 12)


def test_files_of_other_kinds(tmp_path):
    """A tokenizer without start and end tokens, and one with an end token alone."""
    core = train_tokenizer(["some words", "more words"], vocab_size=300).core
    path = tmp_path / "bare.json"
    fields = json.loads(core.to_str())
    path.write_text(json.dumps({**fields, "post_processor": None}))
    bare = load_tokenizer(path)
    assert (bare.start, bare.end) == ([], []) and bare.encode("words") == core.encode("words", add_special_tokens=False).ids
    fields["post_processor"]["single"] = fields["post_processor"]["single"][1:]
    path.write_text(json.dumps(fields))
    ending = load_tokenizer(path, 3)
    assert (ending.start, ending.end) == ([], [1]) and ending.encode("some more words") == [*core.encode("some more words").ids[1:3], 1]


def test_training_is_reproducible_from_the_shipped_shards(tmp_path, capsys):
    main(["mini:train", "--no-ends", "--output", str(tmp_path / "t.json")])
    assert "4096 tokens" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "t.json").core.get_vocab() == load_tokenizer("mini").core.get_vocab()


@pytest.mark.skipif(version("open_clip_torch") is None, reason="open_clip_torch is not installed")
def test_clip_is_open_clips():
    theirs = import_open_clip().SimpleTokenizer(context_length=16)
    ours = load_tokenizer("clip", 16)
    assert ours.vocab_size == theirs.vocab_size == 49408
    texts = [c for c in captions("mini:val-openclipart") if "&" not in c and c.isascii()]
    texts += ["I'm they'll 42nd  DON'T\tstop!!!", "naïve café", "a-b_c.d/e", "日本語 text 123456"]
    for text, expected in zip(texts, theirs(texts).tolist(), strict=True):
        ids = ours.encode(text)
        assert ids + [0] * (16 - len(ids)) == expected, text


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no tokenizer 'clipp'; give 'mini', 'clip', a tokenizer.json"):
        load_tokenizer("clipp")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer.json"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load_tokenizer("clip")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'fastvlp\[train\]'"):
        load_tokenizer("mini")


def test_pictures_without_pillow(monkeypatch):
    from fastvlp.data.images import decode

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'fastvlp\[train\]'"):
        decode(b"")
