"""Changes that no test notices: ``python -m benchmarks mutate`` tries those that would break a promise (``benchmarks/changes.py``).

``python -m benchmarks mutate MODULE TEST...`` tries all of one module, by cosmic-ray (``fastvlp[mutate]``): every operator, number,
condition and loop is changed once, in a copy of the tracked files, and the tests are run against it. Hours for a module; the same command
goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.changes import CHANGES

ROOT = Path(__file__).parent.parent
TOOL = "cosmic_ray.cli", "cosmic_ray.tools.filters.operators_filter"
# Unions in annotations, which are never evaluated; no flags are combined in the sources.
SKIPPED = "core/ReplaceBinaryOperator_BitOr_.*"


@dataclass(frozen=True)
class Session:
    """The copy that is changed, what is to be done, and what was done."""

    folder: Path
    module: str
    tests: tuple[str, ...]
    seconds: float

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    def config(self) -> str:
        """The tool's settings."""
        command = json.dumps(" ".join([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *self.tests]))
        return (f"[cosmic-ray]\nmodule-path = {json.dumps(self.module)}\ntimeout = {self.seconds:g}\nexcluded-modules = []\n"
                f"test-command = {command}\n\n[cosmic-ray.distributor]\nname = \"local\"\n\n"
                f"[cosmic-ray.filters.operators-filter]\nexclude-operators = [{json.dumps(SKIPPED)}]\n")  # fmt: skip

    def python(self, *command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Run a Python module in the copy; raises TimeoutExpired."""
        paths = [str(self.tree), str(self.tree / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", *command], cwd=self.tree, env=environment, capture_output=True, text=True,
                              timeout=timeout)

    def call(self, *command: str) -> str:
        """What a Python module that must succeed prints in the copy."""
        run = self.python(*command)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)}: {(run.stderr or run.stdout)[-2000:]}")
        return run.stdout

    def copy(self) -> None:
        """Copy the tracked files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]:
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.tree / name)

    def begin(self) -> None:
        """Copy, see that the tests pass as they are, and list the changes."""
        self.copy()
        (self.tree / "mutate.toml").write_text(self.config(), encoding="utf-8")
        self.call("pytest", "-q", "-x", *self.tests)
        self.call(TOOL[0], "init", "mutate.toml", "begun.sqlite")
        self.call(TOOL[1], "begun.sqlite", "mutate.toml")
        shutil.copy2(self.tree / self.module, self.folder / "unchanged.py")
        (self.tree / "begun.sqlite").rename(self.tree / "session.sqlite")

    def results(self) -> Iterator[tuple[str, str]]:
        """(outcome, what was changed) of each change that was tried or skipped."""
        for line in self.call(TOOL[0], "dump", "session.sqlite").splitlines():
            work, result = json.loads(line)
            (change,) = work["mutations"]
            if result is not None:
                outcome = result["test_outcome"] or result["worker_outcome"]
                row, column = change["start_pos"]
                yield outcome, f"{change['module_path']}:{row}:{column} {change['operator_name']}\n{result['diff'] or ''}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mutate``."""
    parser.add_argument("module", nargs="?", help="such as fastvlp/train/checkpoint.py (default: the changes of benchmarks/changes.py)")
    parser.add_argument("tests", nargs="*", help="files or tests that should notice, as pytest takes them")
    parser.add_argument("--folder", type=Path, default=ROOT / ".mutants", help="for the copy and the session (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="after which a change is taken for noticed (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Try what was not tried yet, and print what survived; 1 where something did."""
    if arguments.module is None:
        return _promises(Session(arguments.folder / "changes", "", (), arguments.seconds))
    name = arguments.module.replace("/", ".").removesuffix(".py")
    session = Session(arguments.folder / name, arguments.module, tuple(arguments.tests), arguments.seconds)
    if not (ROOT / arguments.module).is_file():
        raise SystemExit(f"{arguments.module} is no file of {ROOT}; name a module such as fastvlp/train/checkpoint.py")
    if not (session.tree / "session.sqlite").exists():
        session.begin()
    shutil.copy2(session.folder / "unchanged.py", session.tree / session.module)  # what was interrupted left its change there
    session.call(TOOL[0], "exec", "mutate.toml", "session.sqlite")
    found = list(session.results())
    for outcome, change in found:
        if outcome == "survived":
            print(change)
    counts = {outcome: sum(one == outcome for one, _ in found) for outcome in sorted({one for one, _ in found})}
    print(f"{arguments.module}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}")
    return int("survived" in counts)


def _promises(session: Session) -> int:
    """Try the changes that are known; whether one of them survived."""
    session.copy()
    survived = 0
    for change in CHANGES:
        file = session.tree / change.file
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(change.old, change.new), encoding="utf-8")
        try:
            status = session.python("pytest", "-q", "-x", "-p", "no:cacheprovider", change.test, timeout=session.seconds).returncode
        except subprocess.TimeoutExpired:  # what is read for ever
            status = 1
        file.write_text(text, encoding="utf-8")
        survived += status != 1  # 1: a test failed; others: it could not be run
        print(f"{'noticed' if status == 1 else 'SURVIVED'}: {change.about} ({change.test})", flush=True)
    print(f"{len(CHANGES) - survived} of {len(CHANGES)} changes were noticed")
    return int(survived > 0)
