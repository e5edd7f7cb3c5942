"""The command line: fastvlp train | eval | recipes | env | profile | plan | show."""

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
  fastvlp profile mini
  fastvlp plan mini data.batch_size=1048576 --devices 256
  fastvlp show tokens picture.png                   which patches merge, are dropped, are attended to

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

PROFILE = """Count the tokens of the first batch of a recipe's data, in each of its stages, and the operations of every layer for them."""
PLAN = """Say, before anything runs, what a step of a recipe costs on a cluster: bytes over fast and slow links, memory and seconds for each
way in which the loss can cross devices (loss.strategy), and which one wins."""
PLAN_EPILOG = """example, a batch of a million pairs on 256 GPUs in machines of 8:
  fastvlp plan mini data.batch_size=1048576 model.embed_dim=1024 --devices 256 --per-node 8 --intra 300 --inter 40 --tflops 400

bytes and memory are exact up to a few per cent; seconds are those of ideal links and products at the rates given, a lower bound
"""
SHOW = """Draw the patches of a picture as tokens: --merge paints those that become one token, --keep fades those that would be dropped,
--attend colours them by the attention that they receive. Without any of these all three are drawn side by side, at 0.4 and 0.5."""


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
    score.add_argument("--recipe", metavar="FILE.py", help="the recipe file of a system of your own")
    score.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    commands.add_parser("recipes", help="list the recipes that ship")
    shape = commands.add_parser("profile", help="tokens and operations of every layer of a recipe", description=PROFILE)
    shape.add_argument("arguments", nargs="*", metavar="RECIPE key=value", help="recipe, then changes, as for fastvlp train")
    ahead = commands.add_parser("plan", help="bytes, memory and seconds of a step on a cluster", description=PLAN, epilog=PLAN_EPILOG,
                                formatter_class=raw)
    ahead.add_argument("arguments", nargs="*", metavar="RECIPE key=value", help="recipe, then changes, as for fastvlp train")
    ahead.add_argument("--devices", type=int, default=8, metavar="N", help="in all (default: %(default)s)")
    ahead.add_argument("--per-node", type=int, default=8, metavar="N", help="that share fast links (default: %(default)s)")
    for flag, default, what in (("--intra", 300.0, "GB/s that a device sends inside its node"),
                                ("--inter", 40.0, "GB/s that a device sends to other nodes"),
                                ("--tflops", 400.0, "10^12 operations per second that its products reach"),
                                ("--latency", 20.0, "microseconds of one exchange")):
        ahead.add_argument(flag, type=float, default=default, metavar="X", help=f"{what} (default: %(default)g)")
    ahead.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of features (default: %(default)s)")
    ahead.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    show = commands.add_parser("show", help="draw what becomes of the patches of a picture", description=SHOW)
    show.add_argument("what", choices=["tokens"], help="what to show")
    show.add_argument("image", metavar="IMAGE", help="a picture file")
    fate = show.add_mutually_exclusive_group()
    fate.add_argument("--merge", type=float, metavar="SHARE",
                      help="that share of the patches, the most similar, merges away (ToMe), in steps of at most a half")
    fate.add_argument("--keep", type=float, metavar="SHARE", help="the patches that differ most from the mean stay, the others fade")
    fate.add_argument("--attend", action="store_true", help="how much attention each patch receives")
    show.add_argument("--model", metavar="CHECKPOINT", help="compare patches as this model embeds them, and attend as it does; else by "
                      "their pixels")
    show.add_argument("--out", default="tokens.png", metavar="FILE", help="where the picture goes (default: %(default)s)")
    commands.add_parser("env", help="versions, devices, and what computes each operator")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    root = parser()
    options, rest = root.parse_known_args(arguments)
    unknown = [argument for argument in rest if options.command != "train" or argument.startswith("-") or "=" not in argument]
    if unknown:
        root.error(f"unrecognized arguments: {' '.join(unknown)}")
    commands = {"train": _train, "eval": _eval, "recipes": _recipes, "env": _env, "profile": _profile, "plan": _plan,
                "show": _show}
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

    recipe, changes = _recipe(options.arguments)
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
    except (TrainingError, OSError, RuntimeError) as error:
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
        model = fastvlp.load(options.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu", recipe=options.recipe)
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
    from fastvlp.evaluate import table

    print("\n".join(table({"retrieval" if options.classes is None else "zero_shot": scores})))
    return 0


def _profile(options: argparse.Namespace) -> int:
    from fastvlp._schema import ConfigError

    try:
        from fastvlp.config import load
        from fastvlp.profile import profile, table

        config = load(*_recipe(options.arguments))
        print(table(profile(config), config))
    except (ConfigError, FileNotFoundError, ImportError, ValueError) as error:
        return _fail(error, 2)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from fastvlp._schema import ConfigError

    try:
        from fastvlp import plan
        from fastvlp.config import load

        config = load(*_recipe(options.arguments))
        cluster = plan.Cluster(options.devices, options.per_node, options.intra, options.inter, options.tflops, options.latency)
        found = plan.plan(config.loss.name, config.data.batch_size, config.model.embed_dim, cluster, options.dtype)
        around = plan.towers(config, cluster)
    except (ConfigError, ValueError) as error:
        return _fail(error, 2)
    if options.json:
        print(json.dumps({"cluster": asdict(cluster), "strategies": [asdict(one) for one in found], "towers": asdict(around)}))
    else:
        print(plan.table(found, around, config, cluster, options.dtype))
    return 0


def _show(options: argparse.Namespace) -> int:
    import fastvlp
    from fastvlp.show import save

    try:
        model = None if options.model is None else fastvlp.load(options.model)
        print(save(options.image, options.out, model, keep=options.keep, merge=options.merge, attend=options.attend))
    except (OSError, ValueError) as error:
        return _fail(error, 2)
    return 0


def _recipe(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, where the first word is one, and the changes."""
    changes = list(arguments)
    return (changes.pop(0) if changes and "=" not in changes[0] else None), changes


def _recipes(options: argparse.Namespace) -> int:
    from fastvlp import config

    for name in config.names():
        print(name + (" (default)" if name == config.DEFAULT else ""))
        print(f"    {' '.join((config.function(name).__doc__ or '').split())}")
    return 0


def _env(options: argparse.Namespace) -> int:
    from fastvlp.env import report

    print(report())
    return 0


def _fail(error: Exception, code: int) -> int:
    said = str(error)
    if isinstance(error, OSError) and error.filename is not None:  # else "[Errno 2] No such file or directory: ..."
        said = f"{error.filename}: {error.strerror}"
    print(f"fastvlp: error: {said}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
