"""The end-to-end benchmark around small stand-in processes, and how the parameters of both systems are counted."""

import argparse
import dataclasses
import json

import pytest
import torch

from benchmarks import e2e, open_clip_baseline, rivals
from benchmarks.e2e import Part

SCORES = {"top1": 0.25, "top5": 0.5, "i2t_r10": 0.75, "train_seconds": 60.0, "steps": 3, "images_per_second": 100.0,
          "parameters": {"image": 3, "text": 2}, "curve": [{"seconds": 60.0, "top1": 0.25}]}  # fmt: skip


def part(tmp_path, seed: int, **changes) -> Part:
    """A part whose process copies a file: python -m json.tool SOURCE TARGET."""
    source = tmp_path / f"scores-{seed}.json"
    source.write_text(json.dumps(SCORES | changes))
    read = lambda folder: json.loads((folder / "out.json").read_text())  # noqa: E731
    return Part("system", seed, lambda folder: ["json.tool", str(source), str(folder / "out.json")], read)


def options(**changes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    e2e.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | changes)


def test_means_over_seeds_and_every_part_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "parts", lambda _: [part(tmp_path, 0, top1=0.2), part(tmp_path, 1, top1=0.4)])
    summary = json.loads(e2e.run(options(), tmp_path / "results").read_text())
    (system,) = summary["systems"]
    assert system["top1"] == pytest.approx(0.3) and system["top1_of_seeds"] == [0.2, 0.4] and system["seeds"] == [0, 1]
    assert system["tower_parameters"] == 5
    folder = tmp_path / "results" / summary["machine"]["device"]
    assert sorted(path.name for path in (folder / "mini").iterdir()) == ["system-seed-0.json", "system-seed-1.json"]
    assert (folder / "mini.csv").read_text().splitlines()[0].startswith("part,system,seed,train_seconds")


def test_an_interrupted_benchmark_keeps_what_is_finished_and_resumes(tmp_path, monkeypatch, capsys):
    broken = dataclasses.replace(part(tmp_path, 1), command=lambda folder: ["json.tool", "no-such-file"])
    monkeypatch.setattr(e2e, "parts", lambda _: [part(tmp_path, 0, top1=0.2), broken])
    with pytest.raises(RuntimeError, match=r"system-seed-1 ended with exit code .*\(--resume\)"):
        e2e.run(options(), tmp_path / "results")
    (tmp_path / "scores-0.json").unlink()  # so that running the finished part again would fail
    monkeypatch.setattr(e2e, "parts", lambda _: [dataclasses.replace(part(tmp_path, 1), seed=0), part(tmp_path, 1, top1=0.4)])
    summary = json.loads(e2e.run(options(resume=True), tmp_path / "results").read_text())
    assert summary["systems"][0]["top1_of_seeds"] == [0.2, 0.4]
    assert "system-seed-0: kept from" in capsys.readouterr().out


def test_the_parts_are_the_rival_ours_and_ours_with_the_rival_s_tokenizer(tmp_path):
    parts = e2e.parts(options(minutes=2.0, seeds=[0, 7], clip_seeds=[7], set=["schedule.steps=2"]))
    assert [part.name for part in parts] == ["open-clip-seed-0", "fastvlp-seed-0", "fastvlp-seed-7", "fastvlp-clip-s-tokenizer-seed-7"]
    assert parts[0].command(tmp_path)[:3] == ["benchmarks.open_clip_baseline", "--minutes", "2.0"]
    ours = parts[2].command(tmp_path)
    assert ours[:2] == ["fastvlp", "train"] and "run.seed=7" in ours and ours[-1] == "schedule.steps=2"
    assert "data.tokenizer=clip" in parts[3].command(tmp_path) and "data.tokenizer=clip" not in ours


def blocks(depth: int, c: int = 192) -> int:
    """Parameters of pre-norm blocks with biases and a four times wider feed-forward layer."""
    return depth * (4 * c * c + 4 * c + 8 * c * c + 5 * c + 4 * c)


def test_non_embedding_parameters_of_both_systems(tmp_path):
    from fastvlp.systems import clip, files

    folder, recipe = tmp_path / "run", clip.recipe()
    files.save(folder / "model", files.build_system(recipe), recipe)
    (folder / "results.json").write_text(json.dumps({
        "zero_shot": {"top1": 0.1, "top5": 0.2}, "retrieval": {"i2t_r10": 0.3},
        "train_seconds": 1.0, "steps": 2, "images_per_second": 3.0}))  # fmt: skip
    patch, head, norms = 192 * 768, 192 * 256, 4 * 192
    ours = e2e.read_run(folder)["parameters"]
    assert ours == {"image": patch + 192 + norms + blocks(6) + head, "text": blocks(4) + norms + head}
    if rivals.version("open_clip_torch") is None:
        pytest.skip("the rival's model is open_clip's, which is not installed")
    rival = open_clip_baseline.tower_parameters(open_clip_baseline.make_model(4096))
    assert rival == {"image": patch + norms + blocks(6) + head, "text": blocks(4) + norms // 2 + head}


def test_the_rival_s_largest_id_stays_the_end_token_under_our_tokenizer():
    pytest.importorskip("tokenizers", reason="our tokenizer needs the tokenizers library")
    tokenize, size = open_clip_baseline.make_tokenizer("mini")
    ids = tokenize(["a red apple", "grinning face with big eyes", "x"])
    assert ids.shape == (3, open_clip_baseline.CONTEXT) and int(ids.min()) >= 0 and int(ids.max()) == size - 1
    ends = ids.argmax(1)
    assert torch.equal(ids[torch.arange(3), ends], torch.full((3,), size - 1)) and len(set(ends.tolist())) > 1
