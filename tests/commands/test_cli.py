"""The command line as a person meets it: help, answers, exit codes."""

import json
import subprocess
import sys

import pytest

from fastvlp import cli
from tests.train.conftest import COLOURS, one_thread, recipe, settings, shard  # noqa: F401  (fixtures)


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


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["recipes"], ["env"], ["plan"]])
def test_every_command_has_help_and_usage_errors_are_2(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0 and "usage: fastvlp" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--no-such-flag"])
    assert ended.value.code == 2


def test_recipes_are_listed_with_what_they_are(capsys):
    code, out, _ = call(capsys, "recipes")
    assert code == 0 and "mini (default)" in out and "    " in out and "fastvlp train" in out


def test_env_says_what_computes_each_operator_and_why(capsys):
    code, out, _ = call(capsys, "env")
    assert code == 0
    for text in ("python", "torch", "operators on cpu", "similarity_logsumexp", "pairwise_sigmoid", "packed_attention", "not triton: "):
        assert text in out


@pytest.mark.parametrize("arguments, message", [
    (["optm.lr=1"], "did you mean optim.lr?"),
    (["mimi"], "unknown recipe mimi; did you mean mini?"),
    (["mini", "optim.lr=fast"], "optim.lr is 'fast'; a number is needed"),
    (["mini", "data.train=nowhere/*.tar"], "nowhere"),
    (["mini", "--resume", "nowhere"], "nowhere holds no trainer.pt"),
    (["mini", "--resume", "none", "lr=1"], "did you mean optim.lr?"),
    (["mini", "mini"], "'mini' is no change; write key=value"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "train", *arguments)
    assert code == 2 and out == "" and message in err
    assert err.startswith("fastvlp: error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_plan_says_which_strategy_wins(capsys):
    asked = ["plan", "mini", "data.batch_size=1048576", "model.embed_dim=1024", "--devices", "256"]
    code, out, _ = call(capsys, *asked)
    assert code == 0 and "on 32 x 8 devices" in out and "fastest: grouped; least memory: ring" in out
    code, out, err = call(capsys, *asked, "--json")
    found = json.loads(out)
    assert code == 0 and err == "" and [one["strategy"] for one in found["strategies"]] == ["grouped", "gather", "ring"]
    assert found["towers"]["parameters"] > 1e6
    code, out, err = call(capsys, "plan", "--devices", "12")
    assert code == 2 and out == "" and "12 devices are no whole number of nodes of 8" in err


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
    from fastvlp import config, models

    models.TwoTower(config.load(str(recipe)).model).save(tmp_path / "model")
    code, out, err = call(capsys, "eval", *(a.replace("{run}", str(tmp_path / "model")).replace("{shard}", str(shard)) for a in arguments))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_failure_while_running_is_1(recipe, monkeypatch, capsys):  # noqa: F811
    from fastvlp.train import TrainingError, loop

    def fail(*arguments, **options):
        raise TrainingError("the loss was not finite")

    monkeypatch.setattr(loop, "_fit", fail)
    code, _, err = call(capsys, "train", recipe)
    assert code == 1 and err == "fastvlp: error: the loss was not finite\n"
