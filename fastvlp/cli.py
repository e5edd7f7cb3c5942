"""The command line: fastvlp train | eval | recipes | env."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

EPILOG = """examples:
  fastvlp train                                     the default recipe on the data that ships, about 5 minutes on 2 cores
  fastvlp train mini run.name=first optim.lr=1e-3   a recipe with changes
  torchrun --nproc-per-node 8 -m fastvlp train my.yaml
  fastvlp eval runs/mini --data mini:val-openclipart
  fastvlp recipes
  fastvlp env

exit codes: 0 done, 1 failed while running, 2 wrong usage or settings, 130 stopped by Ctrl-C (143 by SIGTERM) with a checkpoint
"""
TRAIN = """Train a two-tower model. RECIPE is a name that `fastvlp recipes` lists or the path of a YAML file; without one the default
recipe runs. A run that was interrupted continues when the same command is given again."""
TRAIN_EPILOG = """examples:
  fastvlp train
  fastvlp train mini run.name=long schedule.steps=5000 eval.every=500
  fastvlp train my.yaml data.train='shards/{0000..0099}.tar' data.batch_size=4096 train.image_tokens=65536
  fastvlp train mini --resume none                  start over
  fastvlp train mini --resume runs/first/checkpoints/step-00000400 run.name=second
  torchrun --nproc-per-node 2 -m fastvlp train mini

every key with its default is in the config.yaml that a run writes; runs/NAME also holds log.jsonl, curves.png, retrieval.png, results.json,
checkpoints/ and model/ (for fastvlp.load and fastvlp eval)
"""
EVAL = """Score a trained model: with --classes zero-shot classification (top-1, top-5), without it retrieval (R@1, 5, 10 both ways)."""
EVAL_EPILOG = """examples:
  fastvlp eval runs/mini --data mini:val-openclipart
  fastvlp eval runs/mini --data mini:val-emoji --classes mini:emoji
  fastvlp eval runs/mini --data 'shards/val-*.tar' --classes names.txt --template 'a photo of a {}' --json

the samples of --data name their class in the field "class" of their .json
CHECKPOINT is a run, one of its checkpoints, or a model directory
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser("fastvlp", description="Vision-language pre-training made cheap.", epilog=EPILOG, formatter_class=raw)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model", description=TRAIN, epilog=TRAIN_EPILOG, formatter_class=raw)
    train.add_argument("arguments", nargs="*", metavar="RECIPE key=value", help="recipe, then changes such as optim.lr=1e-3 (YAML values)")
    train.add_argument("--resume", metavar="auto|PATH|none",
                       help="continue from the run's last checkpoint (auto, the default), from PATH, or start over")
    score = commands.add_parser("eval", help="score a model on shards", description=EVAL, epilog=EVAL_EPILOG, formatter_class=raw)
    score.add_argument("checkpoint", metavar="CHECKPOINT", help="a run directory, a checkpoint or a model directory")
    score.add_argument("--data", required=True, nargs="+", metavar="SHARDS",
                       help="paths, globs, brace ranges, or mini:val-emoji, mini:val-openclipart")
    score.add_argument("--classes", metavar="FILE", help="class names, one a line or as JSON; mini:emoji for the shipped emoji's")
    score.add_argument("--template", action="append", metavar="TEXT", help="sentence with {} for the class name; may be repeated")
    score.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    commands.add_parser("recipes", help="list the recipes that ship")
    commands.add_parser("env", help="versions, devices, and what computes each operator")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    unknown = [argument for argument in rest if options.command != "train" or argument.startswith("-") or "=" not in argument]
    if unknown:
        root.error(f"unrecognized arguments: {' '.join(unknown)}")
    commands = {"train": _train, "eval": _eval, "recipes": _recipes, "env": _env}
    if options.command == "train":
        options.arguments += rest  # changes that come after a flag
    try:
        return commands[options.command](options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _train(options: argparse.Namespace) -> int:
    from fastvlp._schema import ConfigError

    recipe, changes = None, list(options.arguments)
    if changes and "=" not in changes[0]:
        recipe = changes.pop(0)
    if options.resume is not None:
        changes.append(f"run.resume={json.dumps(options.resume)}")
    try:
        from fastvlp.config import load

        config = load(recipe, changes)
    except ConfigError as error:
        return _fail(error, 2)

    from fastvlp.train import Interrupted, TrainingError, train
    from fastvlp.train.checkpoint import CheckpointError

    try:
        train(config)
    except (ConfigError, CheckpointError, FileNotFoundError) as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    return 0


def _eval(options: argparse.Namespace) -> int:
    import torch

    import fastvlp
    from fastvlp import evaluate

    try:
        model = fastvlp.load(options.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
        if options.classes is None:
            if options.template:
                raise ValueError("--template is for zero-shot classification; give --classes FILE too")
            scores = evaluate.retrieval(model, options.data)
        else:
            scores = evaluate.zero_shot(model, options.data, evaluate.load_classes(options.classes), tuple(options.template or ["{}"]))
    except (FileNotFoundError, ValueError) as error:
        return _fail(error, 2)
    if options.json:
        print(json.dumps(scores))
        return 0
    from fastvlp.train.report import table

    print("\n".join(table({"retrieval" if options.classes is None else "zero_shot": scores})))
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from fastvlp.recipes import DEFAULT_RECIPE, recipe_names, summary

    for name in recipe_names():
        print(name + (" (default)" if name == DEFAULT_RECIPE else ""))
        print("".join(f"    {line}\n" for line in summary(name).splitlines()), end="")
    return 0


def _env(options: argparse.Namespace) -> int:
    from fastvlp.env import report

    print(report())
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"fastvlp: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
