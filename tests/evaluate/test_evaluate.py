"""Scores against brute force, with a model whose features are written down."""

import math

import pytest
import torch

from fastvlp import evaluate
from fastvlp.evaluate.features import ranks
from fastvlp.evaluate.retrieval import contrastive_loss
from fastvlp.evaluate.zero_shot import class_features
from fastvlp.systems.system import Scale
from tests.evaluate.remembered import WIDTH, Remembered, random, unit, write
from tests.systems.recipes import small

CAPTIONS = [["a0", "b0", "c0"], *([f"a{i}"] if i % 3 else [f"a{i}", f"b{i}"] for i in range(1, 37))]


@pytest.fixture
def pairs(tmp_path):
    """37 pictures with one to three captions, not much like them."""
    images = random(37, 0)
    noise = iter(random(60, 1))
    texts = {caption: images[i] + 1.3 * next(noise) for i, captions in enumerate(CAPTIONS) for caption in captions}
    return Remembered(images, texts), write(tmp_path / "x.tar", CAPTIONS)


def scored(rank):
    """Recalls and mean reciprocal rank of a list of ranks from 0."""
    return {**{f"r{k}": sum(r < k for r in rank) / len(rank) for k in (1, 5, 10)}, "mrr": sum(1 / (r + 1) for r in rank) / len(rank)}


@pytest.mark.parametrize("batch_size", [1, 8, 256])
def test_retrieval_is_brute_force(pairs, batch_size):
    model, shard = pairs
    model.scale = Scale(7.0)
    scores = evaluate.retrieval(model, shard, batch_size)
    owners = [i for i, captions in enumerate(CAPTIONS) for _ in captions]
    texts = [unit(model.texts[caption]) for captions in CAPTIONS for caption in captions]
    images = [unit(image) for image in model.images]
    to_text, to_image = [], []
    for i, image in enumerate(images):
        order = sorted(range(len(texts)), key=lambda t, image=image: -float(image @ texts[t]))
        to_text.append(next(place for place, t in enumerate(order) if owners[t] == i))
    for t, text in enumerate(texts):
        to_image.append(sorted(range(37), key=lambda i, text=text: -float(images[i] @ text)).index(owners[t]))
    loss = 0.0
    for i, image in enumerate(images):
        own = 7 * float(image @ unit(model.texts[f"a{i}"]))
        loss += math.log(sum(math.exp(7 * float(image @ unit(model.texts[f"a{j}"]))) for j in range(37))) - own
        loss += math.log(sum(math.exp(7 * float(other @ unit(model.texts[f"a{i}"]))) for other in images)) - own
    expected = {f"i2t_{k}": v for k, v in scored(to_text).items()} | {f"t2i_{k}": v for k, v in scored(to_image).items()}
    assert scores == {**{k: pytest.approx(v, abs=1e-12) for k, v in expected.items()}, "loss": pytest.approx(loss / 74, rel=1e-5),
                      "n": 37, "captions": len(texts), "skipped": 0}
    assert 0 < scores["i2t_r1"] < scores["i2t_r5"] < 1
    assert model.largest <= batch_size


def test_any_own_caption_is_a_hit():
    """The better of two own captions counts, and the other does not stand in its way."""
    images = torch.eye(3)
    texts = torch.stack([images[2], images[0], images[1] + 0.1 * images[0], images[1], images[2] + 0.5 * images[1]])
    owner = torch.tensor([0, 0, 1, 1, 2])
    assert ranks(images, texts, torch.arange(3), owner, 2).tolist() == [0, 0, 1]
    assert ranks(texts, images, owner, torch.arange(3), 2).tolist() == [1, 0, 0, 0, 0]


def test_contrastive_loss_is_that_of_the_whole_matrix():
    images, texts = (torch.nn.functional.normalize(random(29, seed), dim=1) for seed in (5, 6))
    logits = 9 * images.double() @ texts.double().T
    own = torch.arange(29)
    expected = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    for batch_size in (1, 10, 64):
        assert contrastive_loss(images, texts, 9.0, batch_size) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_and_pictures(pairs, workers):
    model, shard = pairs
    found = evaluate.features(model, shard, evaluate.How(8, workers=workers))
    assert torch.allclose(found.images.double(), torch.stack([unit(image) for image in model.images]), atol=1e-6)
    assert found.captions == [caption for captions in CAPTIONS for caption in captions]
    assert torch.allclose(found.texts.double(), torch.stack([unit(model.texts[caption]) for caption in found.captions]), atol=1e-6)
    assert found.owner.tolist() == [i for i, captions in enumerate(CAPTIONS) for _ in captions] and found.keys[3] == "s3"
    assert [found.captions[i] for i in found.first.tolist()] == [f"a{i}" for i in range(37)]
    pictures = found.pictures([20, 3])
    assert {row: image.getpixel((0, 0)) for row, image in pictures.items()} == {3: (3, 0, 0), 20: (20, 0, 0)}
    assert evaluate.features(model, shard, 8, texts=False).texts.shape == (0, WIDTH)


@pytest.mark.parametrize("batch_size", [3, 256])
def test_zero_shot_is_brute_force(tmp_path, batch_size):
    g = torch.Generator().manual_seed(1)
    names = [f"class {i}" for i in range(12)]
    targets = torch.randint(12, (120,), generator=g).tolist()
    templates = ("{}", "a drawing of {}", "{}, that is {}")
    prompts = {t.replace("{}", name): random(1, 12 * i + j)[0] * 10**i for i, t in enumerate(templates) for j, name in enumerate(names)}
    images = random(120, 99)
    shard = write(tmp_path / "x.tar", [["unused"]] * 120, [names[t] for t in targets], broken={7, 100})
    model = Remembered(images, prompts)
    scores = evaluate.zero_shot(model, shard, names, templates, batch_size)
    weights = [unit(sum(unit(prompts[t.replace("{}", name)]) for t in templates)) for name in names]
    rank = []
    for i in set(range(120)) - {7, 100}:
        rank.append(sorted(range(12), key=lambda c, i=i: -float(weights[c] @ images[i].double())).index(targets[i]))
    assert scores == {"top1": sum(r < 1 for r in rank) / 118, "top5": sum(r < 5 for r in rank) / 118,
                      "mrr": pytest.approx(sum(1 / (r + 1) for r in rank) / 118), "n": 118, "skipped": 2}
    assert model.largest <= batch_size
    found = class_features(model, names, templates, evaluate.How(batch_size))
    assert torch.allclose(found.double(), torch.stack(weights), atol=1e-6)


def test_equal_features_score_chance_and_nan_scores_nothing(tmp_path):
    same, names = torch.ones(8, WIDTH), [f"c{i}" for i in range(8)]
    shard = write(tmp_path / "x.tar", [[name] for name in names], names)
    model = Remembered(same, dict(zip(names, same, strict=True)))
    assert evaluate.retrieval(model, shard)["i2t_r5"] == 5 / 8 and evaluate.retrieval(model, shard)["t2i_r1"] == 1 / 8
    assert evaluate.zero_shot(model, shard, names)["top1"] == 1 / 8
    broken = Remembered(same * torch.nan, dict(zip(names, same, strict=True)))
    assert evaluate.retrieval(broken, shard)["i2t_r5"] == evaluate.zero_shot(broken, shard, names)["top5"] == 0
    assert evaluate.knn(broken, shard, shard)["top5"] == evaluate.probe(broken, shard, shard)["top5"] == 0
    assert ranks(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), torch.arange(3), 2).tolist() == [0, 0, 0]


def test_refusals(tmp_path):
    model = Remembered(torch.ones(4, WIDTH), {"a": torch.ones(WIDTH), "b": torch.ones(WIDTH)})
    shard = write(tmp_path / "x.tar", [["a"]] * 4, ["a", "z", None, "z"])
    with pytest.raises(ValueError, match=r"3 of 4 samples have a class that is not among the 2 given \('z', no class\)"):
        evaluate.zero_shot(model, shard, ["a", "b"])
    with pytest.raises(ValueError, match="2 classes with 1 different names"):
        evaluate.zero_shot(model, shard, ["a", "a"])
    with pytest.raises(ValueError, match=r"template 'a photo' has no \{\}"):
        evaluate.zero_shot(model, shard, ["a"], ("a photo",))
    with pytest.raises(ValueError, match="no templates"):
        evaluate.zero_shot(model, write(tmp_path / "y.tar", [["a"]], ["a"]), ["a"], ())
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        evaluate.retrieval(model, f"{tmp_path}/z*.tar")
    bad = write(tmp_path / "bad.tar", [["a"]] * 2, broken={0, 1})
    with pytest.raises(ValueError, match=r"no sample of .*bad.tar' can be used: not an image \(2\); the first is .*bad.tar: s0"):
        evaluate.retrieval(model, bad)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate.retrieval(model, shard, 0)
    with pytest.raises(ValueError, match="no sample of .*none.tar' names its class"):
        evaluate.knn(model, write(tmp_path / "none.tar", [["a"]] * 2), shard)


def test_a_real_model_of_random_weights_is_near_chance():
    _, model = small()
    scores = evaluate.zero_shot(model, "mini:val-emoji", evaluate.load_classes("mini:emoji"), batch_size=512)
    assert scores["n"] == 1237 and scores["top5"] < 0.02
    scores = evaluate.retrieval(model, "mini:val-openclipart")
    assert scores["n"] == 500 and scores["captions"] == 1464 and scores["t2i_r10"] < 0.1
