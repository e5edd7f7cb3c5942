"""Files that name classes."""

import pytest

from fastvlp import evaluate


@pytest.mark.parametrize("text", ['["a b", "c"]', '\ufeff{"a b": 1, "c": ["x"]}', "a b\n\n  c \r\n"])
def test_class_files(tmp_path, text):
    (tmp_path / "classes").write_text(text, encoding="utf-8")
    assert evaluate.load_classes(tmp_path / "classes") == ["a b", "c"]


@pytest.mark.parametrize("content, message", [(b"", "must name its classes"), (b"[]", "must name its classes"), (b'["a", 3]', "must name"),
                                              (b'["a", "b", "a"]', "1 classes more than once, for example 'a'"), (b'["a"', "neither JSON"),
                                              (b"caf\xe9", "neither JSON nor lines of UTF-8"), (b"[" * 100_000, "neither JSON"),
                                              (b'["a", " a"]', "1 classes more than once")])
def test_wrong_class_files(tmp_path, content, message):
    (tmp_path / "classes").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate.load_classes(tmp_path / "classes")


def test_a_file_of_gigabytes_names_no_classes(tmp_path):
    with open(tmp_path / "classes", "wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ValueError, match="3,221,225,472 bytes; a list of classes has at most"):
        evaluate.load_classes(tmp_path / "classes")


def test_shipped_classes_cover_the_shipped_emoji():
    classes = evaluate.load_classes("mini:emoji")
    assert len(classes) == 1903
    with pytest.raises(FileNotFoundError, match="mini:emoji"):
        evaluate.load_classes("nowhere.json")
