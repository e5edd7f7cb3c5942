"""Scores against brute force, with a model whose features are written down."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp import evaluate
from fastvlp.evaluate.features import ranks
from fastvlp.evaluate.zero_shot import class_features
from tests.systems.recipes import small

WIDTH = 6


class Remembered:
    """Features of a picture from its first pixel, of a text from a table; notes the largest batch."""

    def __init__(self, images, texts):
        self.images, self.texts, self.largest = images, texts, 0

    def encode_image(self, images, normalize=True):
        self.largest = max(self.largest, len(images))
        rows = [np.asarray(image)[0, 0].tolist() for image in images]
        return torch.stack([self.images[row[0] + 256 * row[1]] for row in rows])

    def encode_text(self, texts, normalize=True):
        self.largest = max(self.largest, len(texts))
        return torch.stack([self.texts[text] for text in texts])


def _write(path, captions, classes=None, broken=()):
    """One sample per entry of captions; picture i carries the number i in its first pixel."""
    with tarfile.open(path, "w") as tar:
        for i, caption in enumerate(captions):
            buffer = io.BytesIO()
            Image.new("RGB", (5, 4), (i % 256, i // 256, 0)).save(buffer, "PNG")
            fields = {"captions": caption, **({"class": classes[i]} if classes and classes[i] else {})}
            for name, data in ((f"s{i}.png", b"404" if i in broken else buffer.getvalue()), (f"s{i}.json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def _features(n, generator):
    return torch.randn(n, WIDTH, generator=generator)


@pytest.fixture
def pairs(tmp_path):
    g = torch.Generator().manual_seed(0)
    n = 37
    images = _features(n, g)
    texts = images + 1.3 * _features(n, g)
    model = Remembered(images, {f"first {i}": texts[i] for i in range(n)})
    return model, _write(tmp_path / "x.tar", [[f"first {i}", f"second {i}"] for i in range(n)]), images.double(), texts.double()


def _recall(similarity, k):
    """Share of rows whose diagonal entry is among the k largest, by sorting."""
    return sum(i in sorted(range(len(row)), key=lambda j: -row[j])[:k] for i, row in enumerate(similarity.tolist())) / len(similarity)


@pytest.mark.parametrize("batch_size", [1, 8, 256])
def test_retrieval_is_brute_force(pairs, batch_size):
    model, shard, images, texts = pairs
    scores = evaluate.retrieval(model, shard, batch_size)
    cosine = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T
    expected = {f"i2t_r{k}": _recall(cosine, k) for k in (1, 5, 10)} | {f"t2i_r{k}": _recall(cosine.T, k) for k in (1, 5, 10)}
    assert scores == {**expected, "n": 37, "skipped": 0}
    assert 0 < scores["i2t_r1"] < scores["i2t_r5"] < 1
    assert model.largest <= batch_size


def test_features_and_pictures(pairs, tmp_path):
    model, shard, images, texts = pairs
    found = evaluate.features(model, shard, 8)
    assert torch.allclose(found.images.double(), torch.nn.functional.normalize(images, dim=1), atol=1e-6)
    assert torch.allclose(found.texts.double(), torch.nn.functional.normalize(texts, dim=1), atol=1e-6)
    assert found.captions == [f"first {i}" for i in range(37)] and found.keys[3] == "s3" and found.owner.tolist() == list(range(37))
    pictures = found.pictures([20, 3])
    assert {row: image.getpixel((0, 0)) for row, image in pictures.items()} == {3: (3, 0, 0), 20: (20, 0, 0)}
    assert evaluate.features(model, shard, 8, texts=False).texts.shape == (0, WIDTH)


@pytest.mark.parametrize("batch_size", [3, 256])
def test_zero_shot_is_brute_force(tmp_path, batch_size):
    g = torch.Generator().manual_seed(1)
    names = [f"class {i}" for i in range(12)]
    targets = torch.randint(12, (300,), generator=g).tolist()
    templates = ("{}", "a drawing of {}", "{}, that is {}")
    prompts = {t.replace("{}", name): _features(1, g)[0] * 10 ** (i % 3) for i, t in enumerate(templates) for name in names}
    images = _features(300, g)
    shard = _write(tmp_path / "x.tar", [["unused"]] * 300, [names[t] for t in targets], broken={7, 200})
    model = Remembered(images, prompts)
    scores = evaluate.zero_shot(model, shard, names, templates, batch_size)

    def unit(x):
        return x / x.norm()

    weights = [unit(sum(unit(prompts[t.replace("{}", name)].double()) for t in templates)) for name in names]
    hits = {1: 0, 5: 0}
    for i in set(range(300)) - {7, 200}:
        order = sorted(range(12), key=lambda c: -float(weights[c] @ images[i].double()))
        for k in hits:
            hits[k] += targets[i] in order[:k]
    assert scores == {"top1": hits[1] / 298, "top5": hits[5] / 298, "n": 298, "skipped": 2}
    assert model.largest <= batch_size
    assert torch.allclose(class_features(model, names, templates, batch_size).double(), torch.stack(weights), atol=1e-6)


def test_equal_features_score_chance_and_nan_scores_nothing(tmp_path):
    same, names = torch.ones(8, WIDTH), [f"c{i}" for i in range(8)]
    shard = _write(tmp_path / "x.tar", [[name] for name in names], names)
    model = Remembered(same, dict(zip(names, same, strict=True)))
    assert evaluate.retrieval(model, shard)["i2t_r5"] == 5 / 8 and evaluate.retrieval(model, shard)["t2i_r1"] == 1 / 8
    assert evaluate.zero_shot(model, shard, names)["top1"] == 1 / 8
    broken = Remembered(same * torch.nan, dict(zip(names, same, strict=True)))
    assert evaluate.retrieval(broken, shard)["i2t_r5"] == evaluate.zero_shot(broken, shard, names)["top5"] == 0
    assert ranks(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), 2).tolist() == [0, 0, 0]


def test_refusals(tmp_path):
    model = Remembered(torch.ones(4, WIDTH), {"a": torch.ones(WIDTH), "b": torch.ones(WIDTH)})
    shard = _write(tmp_path / "x.tar", [["a"]] * 4, ["a", "z", None, "z"])
    with pytest.raises(ValueError, match=r"3 of 4 samples have a class that is not among the 2 given \('z', no class\)"):
        evaluate.zero_shot(model, shard, ["a", "b"])
    with pytest.raises(ValueError, match="2 classes with 1 different names"):
        evaluate.zero_shot(model, shard, ["a", "a"])
    with pytest.raises(ValueError, match=r"template 'a photo' has no \{\}"):
        evaluate.zero_shot(model, shard, ["a"], ("a photo",))
    with pytest.raises(ValueError, match="no templates"):
        evaluate.zero_shot(model, _write(tmp_path / "y.tar", [["a"]], ["a"]), ["a"], ())
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        evaluate.retrieval(model, f"{tmp_path}/z*.tar")
    with pytest.raises(ValueError, match=r"no sample of .*bad.tar' can be used: not an image \(2\); the first is .*bad.tar: s0"):
        evaluate.retrieval(model, _write(tmp_path / "bad.tar", [["a"]] * 2, broken={0, 1}))
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate.retrieval(model, shard, 0)


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


def test_a_real_model_of_random_weights_is_near_chance(tmp_path):
    _, model = small()
    scores = evaluate.zero_shot(model, "mini:val-emoji", evaluate.load_classes("mini:emoji"), batch_size=512)
    assert scores["n"] == 1237 and scores["top5"] < 0.02
    scores = evaluate.retrieval(model, "mini:val-openclipart")
    assert scores["n"] == 500 and scores["t2i_r10"] < 0.1
