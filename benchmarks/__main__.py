"""Times, memory, share of the device's limit and error of our operators, of PyTorch and of other packages.

    python -m benchmarks list                             the cases and who can run them here
    python -m benchmarks run --op similarity_logsumexp    one operator (--quick: small sizes, seconds)
    python -m benchmarks run --all                        all operators
    python -m benchmarks run --e2e mini --resume          time to zero-shot accuracy against open_clip's model and loss
    python -m benchmarks run --e2e ladder                 a training step from open_clip's to ours, one mechanism at a time
    python -m benchmarks run --e2e scaling                the loss over batch and processes, the image tower over picture size
    python -m benchmarks run --e2e quality                images/s and accuracy with patches dropped, merged, both, neither
    python -m benchmarks recipes [ROW]                    what a paper's idea is worth on the shipped data, with intervals
    python -m benchmarks recipes --alone [SYSTEM]         what the recipe of each system reaches, which fastvlp recipes shows
    python -m benchmarks compare A.csv B.csv              what got slower or faster from A to B; exit 1 where something got slower
    python -m benchmarks plot                             pictures of the results, beside them
    python -m benchmarks report [--check]                 the tables in the READMEs and docs/, and a page of all results
    python -m benchmarks soak --minutes 15                faults on purpose: random calls, damaged data, killed processes; exit 1 for a loss
    python -m benchmarks mutate [MODULE TEST...]          changes that no test notices, known ones or all of a module; exit 1 for any
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import compare, e2e, graphs, ladder, mutate, plot, quality, recipes, report, scaling
from benchmarks.measure import ParityError, budget
from benchmarks.registry import ENDS, OPS, find, suggest
from benchmarks.run import RESULTS, run_case, split_providers, write
from benchmarks.soak import run as soak


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command")
    commands.add_parser("list", help="the cases and who can run them here (also without a command)")
    run = commands.add_parser("run", help="measure, and write benchmarks/results/<device>/")
    run.add_argument("--op", action="append", default=[], metavar="OP", help=f"one of {', '.join(OPS)}; may be repeated")
    run.add_argument("--all", action="store_true", help="every operator")
    run.add_argument("--e2e", metavar="NAME", help=f"end to end: {', '.join(ENDS)}")
    run.add_argument("--quick", action="store_true", help="small sizes, no memory; written only where --out is given")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    run.add_argument("--out", type=Path, help=f"folder for the results (default: {RESULTS})")
    run.add_argument("--seconds", type=float, metavar="S", help="no further samples of one size and mode after S seconds (default: 10)")
    e2e.add_arguments(run)
    quality.add_arguments(run)
    ideas = commands.add_parser("recipes", help="recipes against their baselines on the shipped data, three seeds, with intervals")
    ideas.add_argument("--out", type=Path, default=RESULTS, help="folder for <device>/recipes.csv (default: %(default)s)")
    recipes.add_arguments(ideas)
    compared = commands.add_parser("compare", help="what got slower or faster between two result files")
    compared.add_argument("a", type=Path, metavar="A.csv")
    compared.add_argument("b", type=Path, metavar="B.csv")
    compared.add_argument("--minimal", type=float, default=compare.MINIMAL, metavar="SHARE",
                          help="a smaller change of the median is none (default: %(default)s)")  # fmt: skip
    soaked = commands.add_parser("soak", help="faults on purpose for some minutes, and what survived them")
    soaked.add_argument("--out", type=Path, default=RESULTS, help="folder for <device>/soak.json (default: %(default)s)")
    soak.add_arguments(soaked)
    mutate.add_arguments(commands.add_parser("mutate", help="changes of a module that no test notices"))
    for name, text in (("plot", "draw the results as PNG"), ("report", "write the marked tables of the READMEs and a page of all results")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    commands.choices["report"].add_argument("--html", type=Path, metavar="PATH", help="the page (default: index.html beside the results)")
    commands.choices["report"].add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    return top


def list_cases() -> None:
    """Print every case with its sizes and providers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op in OPS:
        case = find(op)
        present, absent = split_providers(case, device)
        print(f"{op}: {case.about}\n    {case.formula}")
        print(f"    sizes on {device.type}: {', '.join(shape.name for shape in case.shapes(device.type, False))}")
        print(f"    runs here: {', '.join(provider.name for provider in present)}")
        if absent:
            print(f"    not here: {', '.join(f'{name} ({reason})' for name, reason in absent.items())}")
    for name, module in (("mini", e2e), ("ladder", ladder), ("scaling", scaling), ("quality", quality)):
        print(f"{name}: {(module.__doc__ or '').splitlines()[0]}\n    python -m benchmarks run --e2e {name}")


def _say(text: str) -> None:
    print(text, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """The ``run`` command; 0, or 1 where a parity check failed, or 2 for a wrong name."""
    ops = list(OPS) if arguments.all else arguments.op
    unknown = [suggest(op, OPS, "operator") for op in ops if op not in OPS]
    if arguments.e2e is not None and arguments.e2e not in ENDS:
        unknown.append(suggest(arguments.e2e, ENDS, "end-to-end benchmark"))
    if not ops and arguments.e2e is None:
        unknown.append(f"nothing to run: give --op with one of {', '.join(OPS)}, --all, or --e2e {ENDS[0]}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        unknown.append("there is no CUDA device here; leave --device out to measure on the CPU")
    if unknown:
        print("\n".join(unknown), file=sys.stderr)
        return 2
    out = arguments.out or RESULTS
    device, written = torch.device(arguments.device), not arguments.quick or arguments.out
    failed, measured = False, {}
    for op in ops:
        try:
            measured[op] = run_case(find(op), device, arguments.quick, _say, arguments.seconds)
        except ParityError as error:
            print(f"parity: {error}", file=sys.stderr)
            failed = True
            continue
        if written:
            print(f"wrote {write(measured[op], out)}")
    if arguments.e2e == "mini":
        e2e.run(arguments, out)
    elif arguments.e2e:
        benchmark = {"ladder": ladder, "scaling": scaling, "quality": quality}[arguments.e2e]
        benchmark.run(arguments, out if written else None)
    for op, result in measured.items() if device.type == "cuda" else ():
        captured = graphs.add(find(op), result, device, budget(arguments.quick, arguments.seconds), _say)
        if written:
            print(f"wrote {write(result, out)}")
        if not captured:
            break
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """The command line's exit code."""
    arguments = parser().parse_args(argv)
    if arguments.command in (None, "list"):
        list_cases()
        return 0
    if arguments.command == "run":
        return run(arguments)
    if arguments.command == "plot":
        for path in plot.plot(arguments.results):
            print(path)
        return 0
    if arguments.command == "compare":
        return compare.main(arguments.a, arguments.b, arguments.minimal)
    if arguments.command == "recipes":
        return recipes.run(arguments, arguments.out)
    if arguments.command == "soak":
        return soak.run(arguments, arguments.out)
    if arguments.command == "mutate":
        return mutate.run(arguments)
    return report.main(arguments.results, arguments.check, page=arguments.html)


if __name__ == "__main__":
    sys.exit(main())
