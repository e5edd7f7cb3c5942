"""The command line: train, eval, check, pack, index, recipes, plan, profile, show, env. What they do is in ``fastvlp.commands``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastvlp import __version__

EPILOG = """examples:
  fastvlp train                                     the default recipe on the data that ships, about 5 minutes on 2 cores
  fastvlp train clip-vit-b-32 data=SHARDS           your own pictures and captions; --dry-run looks before anything runs
  fastvlp train coca run.name=first optim.lr=1e-3   a recipe with changes
  torchrun --nproc-per-node 8 -m fastvlp train mine.py:small
  fastvlp check pairs.csv                           broken samples, sizes, captions that are cut, a page of pictures
  fastvlp pack pairs.csv --out shards               shards, with an index beside each, from any data
  fastvlp eval runs/clip --data mini:val-openclipart
  fastvlp recipes                                   systems, their papers, what each recipe shows
  fastvlp recipes clip                              every key of a recipe with its value
  fastvlp plan coca:paper --devices 256             what a step costs, and whether it fits, before anything runs
  fastvlp profile slip                              tokens and operations of every part, on the recipe's own data
  fastvlp show tokens picture.png                   which patches merge, are dropped, are attended to
  fastvlp env

exit codes: 0 done, 1 failed while running, 2 wrong usage or settings, 128 + the signal when stopped by one (130: Ctrl-C), with a checkpoint
"""
TRAIN = """Train a system. RECIPE is a name that `fastvlp recipes` lists, NAME:paper for the published setting, a Python file (FILE.py, or
FILE.py:FUNCTION) whose function returns a Recipe, or a YAML file of changes; without one the default recipe runs. A run that was
interrupted continues when the same command is given again."""
TRAIN_EPILOG = """examples:
  fastvlp train
  fastvlp train coca --help                         every key of this recipe with its value
  fastvlp train clip run.name=long schedule.steps=5000 eval.every=500
  fastvlp train clip-vit-b-32 data='shards/{0000..0099}.tar' epochs=10 data.batch_size=4096 --dry-run
  fastvlp train clip-vit-b-16 data=pairs.csv eval.retrieval=val.csv samples=10000000
  fastvlp train clip --resume none                  start over
  fastvlp train clip --resume runs/first/checkpoints/step-00000400 run.name=second
  torchrun --nproc-per-node 2 -m fastvlp train clip train.shard=2

every key with its value is in the recipe.yaml that a run writes; runs/NAME also holds log.jsonl, curves.png, retrieval.png, results.json,
checkpoints/ and model/ (for fastvlp.load and fastvlp eval)
"""
EVAL = """Score a trained model: with --classes zero-shot classification (top-1, top-5), without it retrieval (R@1, 5, 10 both ways)."""
EVAL_EPILOG = """examples:
  fastvlp eval runs/clip --data mini:val-openclipart
  fastvlp eval runs/clip --data mini:val-emoji --classes mini:emoji
  fastvlp eval runs/clip --data 'shards/val-*.tar' --classes names.txt --template 'a photo of a {}' --json

the samples of --data name their class in the field "class" of their .json
CHECKPOINT is a run, one of its checkpoints, or a model directory
"""
SOURCES = "shards, tables (.csv, .tsv, .jsonl, .parquet, .arrow), folders of pictures, globs, brace ranges or addresses"
CHECK = """Read data as training would, and say: samples, what cannot be used and why, sizes, lengths of captions in tokens and the share
that is cut, duplicates, and token budgets that fit it. Writes a page with some of the pictures."""
PACK = """Write WebDataset shards from any data, with an index beside each: pictures as they are, captions, class and other columns. The
same data gives the same bytes."""
INDEX = """Write SHARD.index.json beside each shard: where its samples lie, so that a start reads one file instead of every header. Shards
may lie at addresses; where nobody can write, each machine builds the index at its first start. That of another shard is not used."""
RECIPES = """List the systems that ship: name, paper, and what the recipe shows. With RECIPE: every key of it with its value."""
PROFILE = """Count the tokens of the first samples of a recipe's data, in each of its stages, and the operations of every part for them.
With --steps: train so many steps, and say where the time of the training thread goes."""
PROFILE_EPILOG = """examples:
  fastvlp profile slip
  fastvlp profile clip --steps 50 --trace trace.json
  torchrun --nproc-per-node 2 -m fastvlp profile clip train.shard=2 --steps 50

nothing waits for a device that training would not wait for; a step on a GPU shows as the time in which work is given to it, and the rest as
waiting for the device
"""
PLAN = """Say, before anything runs, what a step of a recipe costs on a cluster: operations and memory of a device, whether they fit, bytes
over fast and slow links, seconds, and for contrastive losses which way of crossing devices (strategy) wins."""
PLAN_EPILOG = """examples:
  fastvlp plan coca:paper --devices 256
  fastvlp plan coca:paper train.shard=8 train.checkpointing=blocks train.tokens='{image: 32768}' --devices 64 --memory 40
  fastvlp plan clip data.batch_size=1048576 model.embed_dim=1024 --devices 256 --per-node 8 --intra 300 --inter 40 --tflops 400

pictures count as square and captions as full; seconds are those of ideal links and products at the rates given, a lower bound
"""
SHOW = """Draw the patches of a picture as tokens: --merge paints those that become one token, --keep fades those that would be dropped,
--attend colours them by the attention that they receive. Without any of these all three are drawn side by side, at 0.4 and 0.5."""
OWN = "the recipe file of a system of your own"
CHANGES = "recipe, then changes such as optim.lr=1e-3"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        # Without argparse's usage, whose lines would hide the one sentence.
        self.exit(2, f"fastvlp: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    raw: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    root = _Parser("fastvlp", description="Vision-language pre-training made cheap.", epilog=EPILOG, **raw)
    root.add_argument("--version", action="version", version=f"fastvlp {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a system", description=TRAIN, epilog=TRAIN_EPILOG, add_help=False, **raw)
    train.add_argument("arguments", nargs="*", metavar="RECIPE key=value", help=CHANGES)
    train.add_argument("--resume", metavar="auto|PATH|none",
                       help="continue from the run's last checkpoint (auto, the default), from PATH, or start over")
    train.add_argument("--dry-run", action="store_true", help="train nothing: print the recipe, the first batch's shapes, memory and "
                       "operations, and write a page with the first batch as the model sees it")
    train.add_argument("-h", "--help", action="store_true", help="show this, and, where a recipe is named, all of its keys")
    train.set_defaults(parser=train)

    score = commands.add_parser("eval", help="score a model on shards", description=EVAL, epilog=EVAL_EPILOG, **raw)
    score.add_argument("checkpoint", metavar="CHECKPOINT", help="a run directory, a checkpoint or a model directory")
    score.add_argument("--data", required=True, nargs="+", metavar="DATA", help=f"{SOURCES}, or mini:val-emoji, mini:val-openclipart")
    score.add_argument("--classes", metavar="FILE", help="class names, one a line or as JSON; mini:emoji for the shipped emoji's")
    score.add_argument("--template", action="append", metavar="TEXT", help="sentence with {} for the class name; may be repeated")
    score.add_argument("--recipe", metavar="FILE.py", help=OWN)
    score.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    check = commands.add_parser("check", help="what data holds, and what of it cannot be used", description=CHECK)
    check.add_argument("data", nargs="+", metavar="DATA", help=SOURCES)
    check.add_argument("--limit", type=int, default=10_000, metavar="N", help="samples that are read (default: %(default)s; 0: all)")
    check.add_argument("--tokenizer", default="clip", metavar="NAME", help="mini, clip, or a tokenizer.json (default: %(default)s)")
    for flag, number, what in (("--length", 77, "tokens of a caption that a model sees"),
                               ("--size", 224, "pixels of a picture's longest side"), ("--patch", 16, "pixels of a patch's side")):
        check.add_argument(flag, type=int, default=number, metavar="N", help=f"{what} (default: %(default)s)")
    check.add_argument("--out", default="check.html", metavar="FILE", help="where the page goes (default: %(default)s)")

    pack = commands.add_parser("pack", help="write shards from any data", description=PACK)
    pack.add_argument("data", nargs="+", metavar="DATA", help=SOURCES)
    pack.add_argument("--out", required=True, metavar="FOLDER", help="a new folder for the shards")
    pack.add_argument("--samples", type=int, default=10_000, metavar="N", help="in a shard (default: %(default)s)")
    pack.add_argument("--size", type=int, metavar="N", help="scale pictures down to this longest side, and write them as JPEG")
    pack.add_argument("--seed", type=int, metavar="N", help="put the samples in a random order")
    pack.add_argument("--named", type=int, default=20, metavar="N", help="samples left out that are named (default: %(default)s)")

    index = commands.add_parser("index", help="write an index beside each shard", description=INDEX)
    index.add_argument("data", nargs="+", metavar="SHARDS", help="paths, globs, brace ranges or addresses (s3://, gs://, hf://, https://)")

    recipes = commands.add_parser("recipes", help="list the systems that ship, or the keys of one", description=RECIPES)
    recipes.add_argument("recipe", nargs="?", metavar="RECIPE", help="whose keys to list")

    profile = commands.add_parser("profile", help="what every part of a recipe computes, or what training waits for", description=PROFILE,
                                  epilog=PROFILE_EPILOG, **raw)
    profile.add_argument("arguments", nargs="*", metavar="RECIPE key=value", help=CHANGES)
    profile.add_argument("--steps", type=int, metavar="N", help="train N steps and show what the training thread waits for")
    profile.add_argument("--trace", metavar="FILE", help="with --steps: a Chrome trace (Perfetto) of some more steps")

    plan = commands.add_parser("plan", help="what a step costs on a cluster", description=PLAN, epilog=PLAN_EPILOG, **raw)
    plan.add_argument("arguments", nargs="*", metavar="RECIPE key=value", help=CHANGES)
    plan.add_argument("--devices", type=int, default=8, metavar="N", help="in all (default: %(default)s)")
    plan.add_argument("--per-node", type=int, default=8, metavar="N", help="that share fast links (default: %(default)s)")
    for flag, default, what in (("--memory", 80.0, "GB of one device"),
                                ("--intra", 300.0, "GB/s that a device sends inside its node"),
                                ("--inter", 40.0, "GB/s that a device sends to other nodes"),
                                ("--tflops", 400.0, "10^12 operations per second that its products reach"),
                                ("--latency", 20.0, "microseconds of one exchange")):
        plan.add_argument(flag, type=float, default=default, metavar="X", help=f"{what} (default: %(default)g)")
    plan.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

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
    show.add_argument("--recipe", metavar="FILE.py", help=OWN)
    show.add_argument("--out", default="tokens.png", metavar="FILE", help="where the picture goes (default: %(default)s)")

    commands.add_parser("env", help="versions, devices, and what computes each operator")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    root = parser()
    # Known ones only: a key written as a flag (--lr 1e-3) gets a better answer than "unrecognized arguments".
    options, rest = root.parse_known_args(arguments)
    recipe = hasattr(options, "arguments")
    flags = [argument for argument in rest if argument.startswith("-")]
    try:
        if flags and recipe:
            from fastvlp.commands.recipes import key_for

            root.error(key_for(flags[0], rest[rest.index(flags[0]) + 1:]))
        if flags or (rest and not recipe):
            root.error(f"unrecognized arguments: {' '.join(rest)}")
        if recipe:
            options.arguments += rest  # changes that come after a flag
        if options.command == "train" and options.help:
            options.parser.print_help()
            if not options.arguments:
                return 0
        # Imported here, so that --help and --version do not wait for torch.
        name = "first_batch" if getattr(options, "dry_run", False) and not options.help else options.command
        return importlib.import_module(f"fastvlp.commands.{name}").command(options)
    except KeyboardInterrupt:
        return 130
    # As in ``fastvlp recipes | head``: closed, or Python would complain again when it flushes at exit.
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, FileNotFoundError, NotImplementedError, ImportError) as error:  # settings, and what they name
        return _fail(error, 2)
    except (OSError, RuntimeError) as error:
        return _fail(error, 1)


def _fail(error: Exception, code: int) -> int:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:  # else "[Errno 2] No such file or directory: ..."
        said = f"{error.filename}: {error.strerror}"
    print(f"fastvlp: error: {said}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
