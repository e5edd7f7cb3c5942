"""What a recipe asks for: one pass over each set, what a system can, and the same on two processes as on one."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastvlp import evaluate
from fastvlp.config import load
from fastvlp.data import pack_texts
from fastvlp.data.samples import samples
from fastvlp.evaluate.reading import Reading
from fastvlp.recipe import Eval
from fastvlp.systems.clip import Clip
from fastvlp.systems.files import build_system
from tests.evaluate.remembered import write
from tests.systems.small import WORDS, make, whole

ROOT = Path(__file__).parent.parent.parent
NARROW = ("model.image.width=32", "model.image.depth=1", "model.image.heads=2", "model.text.width=32", "model.text.depth=1",
          "model.text.heads=2")
CHANGES = {
    "clip": (*NARROW, "model.embed_dim=16"),
    "coca": (*NARROW, "model.embed_dim=16", "model.decoder.width=32", "model.decoder.depth=1", "model.decoder.heads=2",
             "model.decoder.source=32"),
    "albef": (*NARROW, "model.embed_dim=16", "model.fusion.width=32", "model.fusion.depth=1", "model.fusion.heads=2"),
    "vilt": ("model.image.width=32", "model.text.width=32", "model.joint.width=32", "model.joint.depth=1", "model.joint.heads=2"),
}


def system_of(name):
    torch.manual_seed(0)
    return build_system(load(name, CHANGES[name])).eval()


@pytest.fixture
def shard(tmp_path):
    """23 pictures, two of them broken; some neighbours show the same thing."""
    captions = [[f"red box {i // 2}", f"a box {i}, number {i}"] for i in range(23)]
    return write(tmp_path / "x.tar", captions, [f"c{i % 4}" for i in range(23)], broken={4, 22})


@pytest.mark.parametrize("batch_size", [4, 64])
def test_captions_one_by_one(shard, batch_size):
    system = system_of("coca")
    system.caption_hits = lambda images, texts: texts.lengths // 2  # of any number of tokens
    bits, hits, tokens = 0.0, 0, 0
    with torch.no_grad():
        for sample in samples(shard):
            text = system.prepared("text", [sample.labels.captions[0]])
            tokens, hits = tokens + text.total - 1, hits + text.total // 2
            bits += float(system.caption_nll(system.prepared("image", [sample.image]), text)) / math.log(2)
    assert evaluate.caption_nll(system, shard, batch_size) == {
        "bits_per_token": pytest.approx(bits / tokens, rel=1e-5), "accuracy": hits / tokens, "tokens": tokens, "n": 21, "skipped": 2}


@pytest.mark.parametrize("name", ["coca", "simvlm", "blip2"])
def test_hits_are_the_likeliest_words(name):
    """A caption made of the word that costs least, again and again, has nothing but hits; and one less for each word that is changed."""
    system, image = make(name).eval(), whole().image.take([0])
    caption = [3]
    with torch.no_grad():
        for _ in range(4):
            every = pack_texts([torch.tensor([*caption, word]) for word in range(WORDS)])
            caption.append(int(system.caption_nll(image.repeat(WORDS), every).argmin()))
        changed = [*caption[:-1], (caption[-1] + 1) % WORDS]
        texts = pack_texts([torch.tensor(row) for row in (caption, changed, caption[:2], caption[:1])])
        assert system.caption_hits(image.repeat(4), texts).tolist() == [4, 3, 1, 0]


@pytest.mark.parametrize("name", ["albef", "vilt"])
def test_pairs_one_by_one(name, shard):
    """The other caption is that of the next sample of another class; broken pictures lend theirs."""
    system = system_of(name)
    every = [f"red box {i // 2}" for i in range(23)]
    right, margin = 0, 0.0
    with torch.no_grad():
        for sample in samples(shard):
            i = int(sample.key[1:])
            other = next(j % 23 for j in range(i + 1, i + 23) if j % 23 % 4 != i % 4)
            images = system.prepared("image", [sample.image])
            own, their = (float(system.score(images, system.prepared("text", [every[j]]))) for j in (i, other))
            right, margin = right + (own > their) + (own == their) / 2, margin + own - their
    for batch_size in (4, 64):
        scores = evaluate.pair_scores(system, shard, batch_size)
        assert scores["accuracy"] == pytest.approx(right / 21) and scores["margin"] == pytest.approx(margin / 21, abs=1e-5)
        assert (scores["n"], scores["skipped"]) == (21, 2)


def test_a_system_that_sees_nothing_has_half(shard):
    system = system_of("vilt")
    system.score = lambda images, texts: torch.zeros(len(images))
    assert evaluate.pair_scores(system, shard)["accuracy"] == 0.5


def test_each_set_is_encoded_once_and_what_cannot_be_is_left_out(shard, tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("c0\nc1\nc2\nc3")
    read = Counter()
    item = Reading.__getitem__
    monkeypatch.setattr(Reading, "__getitem__", lambda self, number: read.update([number]) or item(self, number))
    beats = []
    every = Eval(zero_shot=(shard,), classes=str(tmp_path / "classes.txt"), retrieval=(shard,), captions=(shard,), pairs=(shard,),
                 knn=(shard,), probe=(shard,), probe_train=(shard,), batch_size=10, workers=0)
    scores = evaluate.measure(system_of("clip"), every, beat=lambda: beats.append(0))
    assert list(scores) == ["zero_shot", "retrieval", "captions", "pairs", "knn", "probe"] and read == {0: 1, 1: 1, 2: 1}
    assert len(beats) >= 3
    assert scores["captions"] == {"left_out": "Clip has no caption_nll"} and scores["pairs"] == {"left_out": "Clip has no score"}
    lines = evaluate.table(scores)
    assert lines[0] == "captions: left out, Clip has no caption_nll" and len(lines) == 8
    assert scores["zero_shot"] == evaluate.zero_shot(system_of("clip"), shard, ["c0", "c1", "c2", "c3"], batch_size=10)
    assert scores["knn"] == evaluate.knn(system_of("clip"), shard, shard, 10) and scores["knn"]["top1"] > 0.25
    of_vilt = evaluate.measure(system_of("vilt"), every)
    assert of_vilt["retrieval"] == {"left_out": "Vilt has no embed_image and no embed_text"} and 0 <= of_vilt["pairs"]["accuracy"] <= 1
    assert any(line.startswith("own caption against another's (21 pairs)") for line in evaluate.table(of_vilt))
    assert evaluate.measure(system_of("clip"), Eval()) == {}


def test_encode_all_is_encode_without_chance(shard):
    """Rows in the order of the files, all patches, nothing augmented; a broken sample's row is another's."""
    system = system_of("coca")
    found = evaluate.encode_all(system, shard, 10)
    assert set(found) == {"image", "text"} and len(found["image"]) == 23
    for sample in samples(shard):
        mine = system.encode_image([sample.image])[0]
        torch.testing.assert_close(found["image"][int(sample.key[1:])], mine.detach(), rtol=1e-4, atol=1e-5)
    again = evaluate.encode_all(system, shard, 7, workers=2)
    for name, value in found.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)
    tokens = evaluate.encode_all(system_of("albef"), shard, 10)["patches"]
    assert len(tokens) == 23 and tokens.x.device.type == "cpu"


def test_episodes_of_a_run(shard, tmp_path, monkeypatch):
    """Before steps 0, 2 and 4 of five the system is given features of the whole training set, by its weights of then."""
    from fastvlp.train import plots, train

    monkeypatch.setattr(plots, "available", lambda: False)
    seen = []
    monkeypatch.setattr(Clip, "before_episode", lambda self, features: seen.append((self.training, features["image"])))
    train(load("clip", [*CHANGES["clip"], f"data.train=[{shard}]", "data.batch_size=6", "data.workers=0", "eval={batch_size: 10}",
                        "schedule.steps=5", "train.episode=2", f"run.dir={tmp_path}", "run.device=cpu"]))
    assert len(seen) == 3 and all(mode and image.shape == (23, 16) for mode, image in seen)
    assert not torch.allclose(seen[0][1], seen[2][1])


def test_two_processes_score_as_one(shard, tmp_path):
    """Replicated and sharded, one with more batches than the other, one batch without a usable sample: the same numbers on both."""
    dead = write(tmp_path / "dead.tar", [[f"w {i}"] for i in range(9)], [f"c{i % 4}" for i in range(9)], broken={3, 4, 5})
    (tmp_path / "classes.txt").write_text("c0\nc1\nc2\nc3")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "tests.evaluate.two_ranks", shard, dead, str(tmp_path / "classes.txt")],
                          env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as alone") == 2
