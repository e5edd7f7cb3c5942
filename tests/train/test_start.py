"""What is refused, and what is said, before the first step."""

import io
import json
import tarfile

import pytest

from fastvlp.config import ConfigError
from fastvlp.train import TrainingError, plots, train
from tests.train.conftest import log_lines, recipe_of, write_shard


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)


@pytest.fixture
def two_steps(settings):
    settings["schedule"] = {"steps": 2}
    return settings


def said_before_the_first_step(capsys):
    return capsys.readouterr().out.split("step 1")[0]


def broken(path, good, bad, name="z{}"):
    """A shard of good samples and of pictures that are none."""
    write_shard(path, good)
    with tarfile.open(path, "a") as tar:
        for i in range(bad):
            for member, data in ((f"{name.format(i)}.jpg", b"no picture"), (f"{name.format(i)}.txt", b"x")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_missing_shards_are_said_and_no_bad_samples(two_steps, tmp_path, capsys):
    write_shard(tmp_path / "s-00.tar")
    two_steps["data"]["train"] = [str(tmp_path / "s-{00..99}.tar")]
    results = train(recipe_of(two_steps))
    assert "note: 99 of the 100 shards of data.train are missing" in said_before_the_first_step(capsys)
    assert results["skipped_samples"] == {}


def test_missing_shards_of_the_evaluation_are_said_too(two_steps, shard, tmp_path, capsys):
    write_shard(tmp_path / "e-0.tar", 8)
    two_steps["eval"] = {"retrieval": [str(tmp_path / "e-{0..1}.tar")]}
    train(recipe_of(two_steps))
    assert "1 of the 2 shards of eval are missing: " in said_before_the_first_step(capsys)


def test_captions_that_are_cut_are_said_with_their_share(two_steps, tmp_path, capsys):
    """Every fourth of 48 is longer than the context."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar, tarfile.open(write_shard(tmp_path / "short.tar")) as source:
        for member in source:
            data = source.extractfile(member).read()
            if member.name.endswith(".json") and int(member.name[:3]) % 4 == 0:
                data = json.dumps({"captions": ["a box among many other boxes " * 9]}).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    train(recipe_of({**two_steps, "data": {**two_steps["data"], "train": [str(tmp_path / "x.tar")]}}))
    said = said_before_the_first_step(capsys)
    assert "note: 25% of the captions (48 were looked at) are longer than the 12 tokens of text" in said
    assert "model.text.context_length" in said
    two_steps["run"]["name"] = "short"
    train(recipe_of({**two_steps, "data": {**two_steps["data"], "train": [str(tmp_path / "short.tar")]}}))
    said = said_before_the_first_step(capsys)
    assert "of the captions" not in said and "text: 0.0% of 48 captions that were looked at are cut" in said


def test_the_headline_says_what_the_model_sees_and_for_how_long(settings, shard, capsys):
    """Seven eighths of an epoch of 48 samples are 42, five whole batches of 9, whichever way it is given."""
    settings["data"] |= {"train": [str(shard)], "batch_size": 9}
    for name, length in (("e", {"epochs": 0.875}), ("s", {"samples": 42}), ("t", {"steps": 5})):
        settings["schedule"], settings["run"]["name"] = length, name
        assert train(recipe_of(settings))["steps"] == 5
        assert "image: 32 pixels, at most 8 to 16 patches of 8, text: at most 12 tokens; 45 samples = 0.938 epochs of 48\n" in (
            said_before_the_first_step(capsys))


def test_data_that_was_not_named_is_asked_for(settings):
    settings["data"]["train"] = ["SHARDS"]
    for length in ({"epochs": 1}, {"steps": 1}):
        settings["schedule"] = length
        with pytest.raises(ConfigError, match="brings no data of its own; name yours: data=SHARDS"):
            train(recipe_of(settings))


@pytest.mark.parametrize(
    "shards, message",
    [
        ("{shard}", "data.train: a batch of 49 is larger than its data.* at most 48"),
        ("{folder}/{{00..0.tar", "data.train: the braces of"),
        ("{folder}/{{0..99999999}}.tar", "data.train: the range .* stands for 100,000,000 files"),
        (
            "{folder}/bad.tar",
            r"data.train: none of the 1 shards holds a usable sample .*\(3 could not be used, such as .*bad.tar: a: no caption",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_sentence(two_steps, shard, tmp_path, shards, message):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name in "abc":
            tar.addfile(tarfile.TarInfo(f"{name}.jpg"))
    two_steps["data"] |= {"train": [shards.format(shard=shard, folder=tmp_path)], "batch_size": 49}
    with pytest.raises(ConfigError, match=message) as refused:
        train(recipe_of(two_steps))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs" / "run").exists()


def test_a_backend_that_does_not_exist_is_refused_before_anything_is_written(two_steps, tmp_path):
    two_steps["train"] = {"compile": "nobackend"}
    with pytest.raises(ConfigError, match="train.compile is 'nobackend'; true, false or a backend of torch.compile"):
        train(recipe_of(two_steps))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_a_run(settings, tmp_path, workers):
    """Thirty of sixty cannot be read: more than a hundredth, and than ten. What was trained is saved."""
    settings["data"] |= {"train": [broken(tmp_path / "x.tar", 30, 30)], "workers": workers}
    settings["schedule"]["steps"] = 40
    with pytest.raises(TrainingError, match=r"1[1-9] of 60 samples could not be used: .* \(1[1-9]\); they are named in .*log.jsonl. Mend"):
        train(recipe_of(settings))
    assert list((tmp_path / "runs" / "run" / "checkpoints").glob("step-*"))
    named = [line["sample"] for line in log_lines(tmp_path / "runs" / "run") if "skipped" in line]
    assert len(set(named)) == len(named) >= 11
    settings["data"]["max_bad"] = 0.5
    assert train(recipe_of(settings))["skipped_samples"].popitem()[1] == 30


def test_a_few_bad_samples_of_many_stop_nothing(two_steps, tmp_path):
    """Fifteen of 2,000 are below a hundredth, though all of their headers are read before the first of 12 samples is trained on."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar, tarfile.open(write_shard(tmp_path / "y.tar", 24)) as source:
        members = [(member, source.extractfile(member).read()) for member in source]
        for copy in range(84):
            for member, data in members:
                info = tarfile.TarInfo(f"{copy}-{member.name}")
                info.size = len(data)
                if copy < 15 and member.name == "000.json":
                    continue
                tar.addfile(info, io.BytesIO(data))
    two_steps["data"]["train"] = [str(tmp_path / "x.tar")]
    results = train(recipe_of(two_steps))
    assert results["skipped_samples"] == {"no caption": 15}
    named = [line["sample"] for line in log_lines(tmp_path / "runs" / "run") if "skipped" in line]
    assert len(named) == 15  # though they were met before there was a log
