"""Neighbours and the linear probe against plain loops and dense linear algebra."""

import math

import pytest
import torch

from fastvlp import evaluate
from fastvlp.evaluate.probe import PENALTIES, ridge
from tests.evaluate.remembered import WIDTH, Remembered, random, unit, write


@pytest.fixture
def sets(tmp_path):
    """40 pictures to learn from, of five classes and some without, and 30 others, some of a class that is nowhere else."""
    names = ["fox", "ant", "emu", "bat", "cow"]
    centres = 1.2 * random(5, 3)
    classes = [names[i % 5] if i % 8 else None for i in range(70)]
    images = torch.stack([centres[i % 5] + noise for i, noise in enumerate(random(70, 4))])
    classes[45] = classes[58] = "yak"
    broken = {3}
    train = write(tmp_path / "train.tar", [["x"]] * 40, classes[:40], broken)
    other = write(tmp_path / "test.tar", [["x"]] * 70, [None] * 40 + classes[40:])  # the first 40 are numbered for both
    known = [i for i in range(40) if classes[i] and i not in broken]
    asked = [i for i in range(40, 70) if classes[i]]
    return Remembered(images, {}), train, other, classes, known, asked


def test_neighbours_vote(sets):
    model, train, other, classes, known, asked = sets
    hits = {1: 0, 5: 0}
    for i in asked:
        near = sorted(known, key=lambda k, i=i: -float(unit(model.images[k]) @ unit(model.images[i])))[:20]
        votes = dict.fromkeys(sorted({classes[k] for k in known}), 0.0)
        for k in near:
            votes[classes[k]] += math.exp(float(unit(model.images[k]) @ unit(model.images[i])) / 0.07)
        order = sorted((name for name in votes if votes[name] > 0), key=lambda name: -votes[name])
        for k in hits:
            hits[k] += classes[i] in order[:k]
    assert 0 < hits[1] < len(asked)
    for batch_size in (4, 256):
        assert evaluate.knn(model, other, train, batch_size) == {
            "top1": hits[1] / len(asked), "top5": hits[5] / len(asked), "n": len(asked), "bank": len(known), "classes": 5, "skipped": 1}


def test_ridge_is_the_dense_solution_with_the_smallest_gcv():
    x, labels = random(50, 7), torch.arange(50) % 4
    targets = torch.nn.functional.one_hot(labels, 4).double()
    centred, aim = x.double() - x.double().mean(0), targets - targets.mean(0)
    gram = centred.T @ centred
    scores = {}
    for relative in PENALTIES:
        penalty = relative * float(gram.trace()) / WIDTH
        hat = centred @ torch.linalg.inv(gram + penalty * torch.eye(WIDTH, dtype=torch.float64)) @ centred.T
        scores[penalty] = float((aim - hat @ aim).square().sum() / 50 / (1 - (1 + float(hat.trace())) / 50) ** 2)
    best = min(scores, key=scores.__getitem__)
    weight, bias, chosen = ridge(x, labels, 4)
    assert chosen == pytest.approx(best)
    expected = torch.linalg.solve(gram + best * torch.eye(WIDTH, dtype=torch.float64), centred.T @ aim)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(bias, targets.mean(0) - x.double().mean(0) @ expected)


def test_the_probe_reads_classes_off(sets):
    model, train, other, classes, known, asked = sets
    names = sorted({classes[k] for k in known})
    features = torch.nn.functional.normalize(model.images, dim=1)
    weight, bias, _ = ridge(features[known], torch.tensor([names.index(classes[k]) for k in known]), 5)
    hits = sum(names[int((features[i].double() @ weight + bias).argmax())] == classes[i] for i in asked)
    scores = evaluate.probe(model, other, train)
    assert scores["top1"] == hits / len(asked) and scores["n"] == len(asked) and scores["classes"] == 5
    assert scores["top1"] < scores["top5"] == 1 - sum(classes[i] == "yak" for i in asked) / len(asked)


def test_a_probe_of_separable_features_makes_no_mistake(tmp_path):
    """One sample a class, as many features as samples: the training set itself is read off."""
    shard = write(tmp_path / "x.tar", [["x"]] * WIDTH, [f"c{i}" for i in range(WIDTH)])
    assert evaluate.probe(Remembered(torch.eye(WIDTH), {}), shard, shard)["top1"] == 1
