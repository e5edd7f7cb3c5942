"""The command line as a person meets it: help, answers, exit codes."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fiddle as fdl
import numpy as np
import pytest
import torch
from PIL import Image

import fastvlp
from fastvlp import cli, config
from fastvlp.commands import recipes
from fastvlp.data.fields import bind
from tests.train.conftest import COLOURS, one_thread, recipe, recipe_of, settings, shard  # noqa: F401  (fixtures)

OWN = "for your own pictures and captions: fastvlp train RECIPE data=SHARDS"


def call(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_imports_nothing_that_takes_long():
    code = ("import sys; from fastvlp import cli\n"
            "try:\n  cli.main(['train', '--help'])\nexcept SystemExit:\n  pass\n"
            "assert not {'torch', 'numpy', 'PIL', 'yaml', 'tokenizers'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cli.__file__.rpartition("/fastvlp/")[0])
    assert done.returncode == 0, done.stderr
    assert "fastvlp train" in done.stdout and "--resume none" in done.stdout


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["recipes"], ["env"], ["plan"], ["profile"], ["show"]])
def test_every_command_has_help_and_usage_errors_are_one_sentence_and_2(command, capsys):
    try:
        code = cli.main([*command, "--help"])
    except SystemExit as ended:
        code = ended.code
    assert code == 0 and "usage: fastvlp" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--no-such-flag"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith("fastvlp: error: ") and err.count("\n") == 1


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"fastvlp {fastvlp.__version__}\n"


def test_recipes_are_listed_with_their_papers_and_what_they_show(capsys):
    code, out, _ = call(capsys, "recipes")
    lines = out.splitlines()
    place = lines.index("clip (default); clip:paper")
    assert code == 0 and lines[place + 1].startswith("    CLIP (Radford et al. 2021, arXiv:2103.00020): ")
    assert "8 % zero-shot" in lines[place + 2]
    own = lines.index(OWN)
    assert [line.split(";")[0].split(" (")[0] for line in lines[:own:4]] == config.names() and len(config.names()) >= 15
    assert lines[own + 1::2] == ["clip-vit-b-32", "clip-vit-b-16", "clip-vit-s-16", "siglip-b-16"]


def test_what_is_said_to_be_measured_is_of_systems_that_there_are(capsys):
    """The shipped numbers, whoever measured them: a line for each, and the other systems are not measured."""
    import fastvlp.systems

    found = json.loads((Path(fastvlp.systems.__path__[0]) / "measured.json").read_text())
    assert set(found) <= set(config.names())
    lines = call(capsys, "recipes")[1].splitlines()
    for name, line in zip(config.names(), lines[3:lines.index(OWN):4], strict=True):
        assert (line == "    not measured") == (name not in found)
    for entry in found.values():
        assert entry["seeds"] >= 1 and entry["samples"] > 0 and entry["seconds"] > 0 and entry["threads"] == 1
        assert entry["machine"] and not entry["commit"].endswith("+"), "measured on code that is in no commit"
        for score in entry["scores"]:
            assert score["name"] and 0 < score["value"] < 100 and score["items"] > 0 and score["of"]
        assert entry["scores"]


def test_a_measured_recipe_s_line():
    entry = {"scores": [{"name": "mean reciprocal rank both ways", "value": 0.25, "items": 500, "of": "pairs"},
                        {"name": "nats a token", "value": 3.5, "items": 500, "of": "captions"}],
             "samples": 12800, "seconds": 60.4, "minutes": 1.0, "threads": 1, "machine": "cpu-x-2core", "torch": "2.13", "commit": "abc",
             "timestamp": "2026", "seeds": 3, "start": {"": "simvlm a=1", "image": "clip"}}  # fmt: skip
    assert recipes.measured(entry) == (
        "measured: mean reciprocal rank both ways 0.250 (500 pairs); nats a token 3.500 (500 captions); 12,800 samples in 60 s, 1 thread "
        "of cpu-x-2core, seeds: 3, commit abc; starts with all of simvlm, image of clip")


@pytest.mark.parametrize("command", [["recipes", "clip"], ["train", "clip", "--help"]])
def test_a_recipe_s_keys_are_listed_with_their_values_and_can_be_given_back(command, capsys):
    code, out, _ = call(capsys, *command)
    keys = dict(line.strip().split("=", 1) for line in out.splitlines() if line.startswith("  ") and "=" in line.split(" ")[2])
    assert code == 0 and keys["data.batch_size"] == "128" and keys["model.image.width"] == "192" and keys["schedule.stages.0.keep"] == "0.5"
    assert keys["optim.grad_clip"] == "null" and "grad_clip bounds the norm of the whole gradient" in out
    changes = [f"{key}={value}" for key, value in keys.items() if not key.endswith("make")]
    assert config.load("clip", changes) == config.load("clip") and {key.split(".")[0] for key in keys} == {
        "run", "data", "optim", "schedule", "train", "eval", "model"}


@pytest.mark.parametrize("flags, key", [
    (["--batch-size", "32"], "data.batch_size=32"), (["--lr=1e-3"], "optim.lr=1e-3"), (["--lr", "1e-3", "--wd", "0.1"], "optim.lr=1e-3"),
    (["--wd", "0.1"], "optim.weight_decay=0.1"), (["--bf16"], "train.amp=bf16"), (["--epochs", "3"], "schedule.epochs=3"),
    (["--train-num-samples", "9"], "schedule.samples=9"),
    (["--num-workers", "4"], "data.workers=4"), (["--per_device_train_batch_size", "8"], "data.batch_size=8"),
    (["--seeed", "1"], "run.seed=1"), (["--csv-img-key", "photo"], "data.train=TABLE?image=COLUMN"),
    (["--val-data", "v"], "eval.retrieval=v"),
    (["--grad-checkpointing"], "train.checkpointing=blocks"), (["--train-data", "x.tar"], "data.train=x.tar"),
])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_flags_of_other_tools_are_answered_with_the_key(command, flags, key, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "clip", *flags])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"fastvlp: error: there is no {flags[0].split('=')[0]}; settings are written key=value, here {key};")


def test_every_answer_to_a_flag_is_a_key_that_there_is():
    from fastvlp.commands.recipes import ELSEWHERE

    made = config.load("clip", ["train.tokens={image: 1}"])
    for key in (answer.split("=")[0] for answer in ELSEWHERE.values()):
        value = config.to_dict(made)
        for part in key.split("."):
            value = value[int(part) if part.isdigit() else part]


@pytest.mark.parametrize("name, patch, width, millions", [
    ("clip-vit-b-32", 32, 768, 151.277), ("clip-vit-b-16", 16, 768, 149.621), ("clip-vit-s-16", 16, 384, 62.258),
    ("siglip-b-16", 16, 768, 203.2 + 13.4 - 4.7)])  # with more words, and no MLP behind the attention pool
def test_recipes_for_own_data(name, patch, width, millions):
    """By short keys: CLIP's tokens and pixels, any one length, nothing of the shipped data, and the size of open_clip's models."""
    made = config.load(name, ["data=my/{00..03}.tar", "epochs=2.5"])
    assert made.data.train == ("my/{00..03}.tar",) and made.run.name == name and "mini" not in config.dump(made)
    assert (made.schedule.epochs, made.schedule.samples, made.schedule.steps) == (2.5, None, None)
    assert config.load(name, ["samples=4096"]).steps == 4 and config.load(name, ["steps=7"]).steps == 7
    assert (made.model.image.image_size, made.model.image.patch_size, made.model.image.width) == (224, patch, width)
    assert (made.model.text.context_length, made.model.text.vocab_size, made.data.tokenizer) == (77, 49408, "clip")
    with pytest.raises(ValueError, match="epochs is 2.5, of data not yet counted; give samples or steps"):
        made.steps  # noqa: B018
    with torch.device("meta"):
        system = fdl.build(made.model)
    assert bind(made.data.fields, system, SimpleNamespace(vocab_size=49408, context_length=None)).keys() == {"image", "text"}
    assert sum(p.numel() for p in system.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_dry_run_shows_the_first_batch_and_its_price(capsys, tmp_path, shard):  # noqa: F811
    """The page's pictures are those of the batch: red boxes are red, and a caption's tokens spell it."""
    code, out, err = call(capsys, "train", "clip", f"data={shard}", "data.batch_size=12", "schedule.stages=[{keep: 1.0}]", "epochs=2",
                          "data.fields.text.max_captions=1",
                          f"run.dir={tmp_path}", "--dry-run")
    assert code == 0 and "  samples: 96\n" in out and "  epochs: null\n" in out, err
    shown, = re.findall(r"first batch: 12 samples\n  image: uint8 \[(\d+), 768\], 12 segments of \d+ to 16 tokens, ([\d.]+) on aver", out)
    assert abs(int(shown[0]) / 12 - float(shown[1])) < 0.06
    assert "memory in GB: parameters " in out and "GFLOP forward" in out and "8 steps: at least" in out
    assert [path.name for path in tmp_path.iterdir() if path.name != shard.name] == ["clip.first-batch.html"]
    page = (tmp_path / "clip.first-batch.html").read_text()
    cards, patches = page.split("<figure>")[1:], 0
    assert len(cards) == 12
    for card in cards:
        picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", card)[1])))
        spelled = "".join(re.findall(r"<i>(.*?)</i>", card))
        colour, = (name for name in COLOURS if name in spelled)
        assert max(picture.size) == 64
        patches += picture.width * picture.height // 256
        difference = np.abs(np.asarray(picture).astype(int).reshape(-1, 3) - COLOURS[colour]).max(1)
        assert (difference < 40).mean() > 0.1, colour
    assert patches == int(shown[0])


def test_env_says_what_computes_each_operator_and_why(capsys):
    code, out, _ = call(capsys, "env")
    assert code == 0
    for text in ("python", "torch", "operators on cpu", "similarity_logsumexp", "pairwise_sigmoid", "packed_attention", "not triton: "):
        assert text in out


@pytest.mark.parametrize("arguments, message", [
    (["optm.lr=1"], "did you mean optim.lr?"),
    (["coka"], "unknown recipe coka; did you mean coca?"),
    (["clip:papper"], "clip has no recipe papper; it has "),
    (["nowhere.py"], "recipe nowhere.py: there is no such file"),
    (["broken.py"], "recipe broken.py does not import: ZeroDivisionError: division by zero"),
    (["mine.py:fails"], "recipe mine.py:fails fails: KeyError: 'image'"),
    (["mine.py:wrong"], "mine.py:wrong returns int; a recipe returns"),
    (["mine.py:streamless", "data.workers=0"], "the batch has no stream 'text'; this recipe's fields are image"),
    (["clip", "optim.lr=fast"], "optim.lr is 'fast'; a number is needed"),
    (["clip", "data.train=nowhere/*.tar"], "nowhere"),
    (["clip", "--resume", "nowhere"], "nowhere holds no "),
    (["clip", "--resume", "none", "lr=1"], "did you mean optim.lr?"),
    (["clip", "clip"], "'clip' is no change; write key=value"),
    (["data=x.tar"], "data is named and no recipe is; say which model is trained on it: clip-vit-b-32, clip-vit-b-16, clip-vit-s-16, "),
    (["data.train.0.weight=2"], "data is named and no recipe is"), (["own.yaml"], "data is named and no recipe is"),
    (["clip-vit-b32"], "did you mean clip-vit-b-32?"), (["siglip-b-16"], "siglip-b-16 brings no data of its own; name yours: data=SHARDS"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "own.yaml").write_text("data: x.tar\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom fastvlp.systems import clip\n"
        "def fails():\n    raise KeyError('image')\n"
        "def wrong():\n    return 1\n"
        "def streamless():\n    made = clip.recipe()\n"
        "    return replace(made, data=replace(made.data, fields={'image': made.data.fields['image']}))\n")
    code, out, err = call(capsys, "train", *arguments)
    assert code == 2 and message in err
    assert err.startswith("fastvlp: error: ") and err.count("\n") == 1
    if "streamless" not in arguments[0]:
        assert out == "" and {path.name for path in tmp_path.iterdir()} <= {"broken.py", "mine.py", "own.yaml", "__pycache__"}


def test_a_file_of_one_s_own_trains(settings, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("from fastvlp.systems import clip\n\n\ndef small():\n    return clip.recipe()\n")
    changes = [f"{section}.{key}={json.dumps(value)}" for section in ("data", "model", "schedule")
               for key, value in settings[section].items()]
    code, out, err = call(capsys, "train", "own.py:small", *changes, "schedule.steps=1", "eval={}", "run.device=cpu")
    assert code == 0 and "trained 1 steps" in out and err == "" and (tmp_path / "runs" / "own-small" / "results.json").is_file()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_with_128_and_its_number_after_a_checkpoint(signum, settings, tmp_path, monkeypatch, capfd):  # noqa: F811
    from fastvlp.train import Trainer

    step = Trainer.step

    def step_then_signal(self, batch, stop=0):
        if self.counters.step == 1:
            os.kill(os.getpid(), signum)
        return step(self, batch, stop)

    monkeypatch.setattr(Trainer, "step", step_then_signal)
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(recipe_of(settings)))
    code, _, err = call(capfd, "train", path)
    assert code == 128 + signum and "the same command continues from here" in err
    assert [file.name for file in (tmp_path / "runs" / "run" / "checkpoints").iterdir()]


def test_train_then_eval(recipe, shard, tmp_path, capsys):  # noqa: F811
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(list(COLOURS)))
    code, out, _ = call(capsys, "train", recipe, "run.name=first", "--resume", "none", "schedule.steps=4")
    assert code == 0 and "trained 4 steps" in out
    run = tmp_path / "runs" / "first"

    code, out, err = call(capsys, "eval", run, "--data", shard, "--classes", classes, "--json")
    found = json.loads(out)
    assert code == 0 and err == "" and out.count("\n") == 1
    assert found["n"] == 48 and 0 <= found["top1"] <= found["top5"] <= 1

    code, out, _ = call(capsys, "eval", run / "checkpoints" / "step-00000004", "--data", shard, "--json")
    found = json.loads(out)
    assert code == 0 and {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} <= found.keys()
    code, out, _ = call(capsys, "eval", run, "--data", shard, shard)
    assert code == 0 and "image to text (96 pairs)" in out and "R@10" in out


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", "--data", "x.tar"], "nowhere"),
    (["{run}", "--data", "nowhere/*.tar"], "nowhere"),
    (["{run}", "--data", "{shard}", "--classes", "nowhere.txt"], "nowhere.txt"),
    (["{run}", "--data", "{shard}", "--template", "a {}"], "--classes FILE"),
])
def test_eval_refuses_what_is_not_there(arguments, message, recipe, shard, tmp_path, capsys):  # noqa: F811
    from fastvlp.systems.files import build_system, save

    made = config.load(str(recipe))
    save(tmp_path / "model", build_system(made), made)
    code, out, err = call(capsys, "eval", *(a.replace("{run}", str(tmp_path / "model")).replace("{shard}", str(shard)) for a in arguments))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_failure_while_running_is_1(recipe, monkeypatch, capsys):  # noqa: F811
    from fastvlp.train import TrainingError, loop

    def fail(*arguments, **options):
        raise TrainingError("the loss was not finite")

    monkeypatch.setattr(loop.Fit, "run", fail)
    code, _, err = call(capsys, "train", recipe)
    assert code == 1 and err == "fastvlp: error: the loss was not finite\n"
