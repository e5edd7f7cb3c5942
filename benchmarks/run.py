"""Runs cases and writes their rows: benchmarks/results/<device>/<op>.csv and .json."""

from __future__ import annotations

import csv
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Limits, cores, describe, load, measure_limits
from benchmarks.measure import Budget, Clock, budget, build, check_parity, extra_bytes, paired_ratio, percentile, results, sample
from benchmarks.registry import Case, InapplicableError, Mode, Problem, Provider, Task
from benchmarks.rivals import version

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "op", "provider", "kind", "mode", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms", "samples", "rival", "ratio_rival", "ratio_eager",
    "flops", "bytes", "tflops", "share_of_limit", "graph_ms", "graph_note", "extra_mb", "error",
    "version", "device", "threads", "torch", "triton", "python", "commit", "timestamp",
)  # fmt: skip

Row = dict[str, Any]


def split_providers(case: Case, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Those that can run on the device, and for the others the reason."""
    reasons = {provider.name: provider.why_not(device) for provider in case.providers}
    return [p for p in case.providers if not reasons[p.name]], {name: reason for name, reason in reasons.items() if reason}


def _best_rival(providers: Iterable[Provider], medians: dict[str, float]) -> str | None:
    """The fastest rival package; where none ran, the fastest of eager and torch.compile; None where nobody else ran."""
    others = [p for p in providers if p.kind != "ours"]
    packages = [p.name for p in others if p.kind == "rival"]
    return min(packages or [p.name for p in others], key=lambda name: medians[name], default=None)


def measure_mode(
    case: Case, problem: Problem, tasks: dict[str, Task], mode: Mode, limits: Limits, clock: Clock, spend: Budget, memory: bool
) -> list[Row]:
    """One row per provider of one problem in one mode; times and ratios come from interleaved calls."""
    providers = [p for p in case.providers if p.name in tasks]
    taken = sample({name: functools.partial(results, task, mode) for name, task in tasks.items()}, clock, spend)
    medians = {name: percentile(seconds, 50) for name, seconds in taken.items()}
    rival, eager = _best_rival(providers, medians), next((p.name for p in providers if p.kind == "eager"), None)
    rows = []
    for provider in providers:
        flops, moved = (provider.work or case.work)(problem, mode)
        floor = limits.seconds(flops, moved, problem.shape.dtype)
        seconds, median = taken[provider.name], medians[provider.name]
        extra = extra_bytes(case, problem, provider, tasks[provider.name], mode) if memory else None
        rows.append({
            "op": case.op, "provider": provider.name, "kind": provider.kind, "mode": mode, "shape": problem.shape.name,
            "dtype": str(problem.shape.dtype).removeprefix("torch."),
            "p20_ms": 1e3 * percentile(seconds, 20), "p50_ms": 1e3 * median, "p80_ms": 1e3 * percentile(seconds, 80),
            "samples": len(seconds), "rival": rival, "ratio_rival": rival and paired_ratio(taken[rival], seconds),
            "ratio_eager": eager and paired_ratio(taken[eager], seconds), "flops": flops, "bytes": moved,
            "tflops": flops / median / 1e12, "share_of_limit": floor / median,
            "extra_mb": None if extra is None else extra / 1e6, "version": version(provider.distribution) or "source",
        })  # fmt: skip
    return rows


def run_case(case: Case, device: torch.device, quick: bool, say: Callable[[str], None], seconds: float | None = None) -> dict[str, Any]:
    """Every shape of a case: parity first, then times and memory. The result file's content.

    ``seconds`` replaces the time after which one shape in one mode takes no further samples.

    Raises:
        ParityError: before anything of that shape is timed.
    """
    providers, absent = split_providers(case, device)
    shapes = case.shapes(device.type, quick) if providers else []
    busy = load()
    if device.type == "cpu" and busy is not None and busy > 0.3 * cores():
        say(f"the machine is busy (load {busy:.1f}, {cores()} cores): these times will not be clean")
    limits = measure_limits(device, {shape.dtype for shape in shapes}, quick)
    rates = {str(dtype).removeprefix("torch."): rate / 1e12 for dtype, rate in limits.flops.items()}
    say(f"{case.op}: limits {', '.join(f'{rate:.3g} TFLOP/s {name}' for name, rate in rates.items())}, copy {limits.copy / 1e9:.3g} GB/s")
    for name, reason in absent.items():
        say(f"  {name}: {reason}")
    about, clock, rows, facts = describe(device), Clock(device), [], {}
    for shape in shapes:
        torch._dynamo.reset()
        try:
            problem = case.problem(shape, device)
        except InapplicableError as why:
            say(f"  {shape.name} is left out, {why}")
            absent[shape.name] = str(why)
            continue
        facts[shape.name] = dict(problem.facts)
        tasks, left_out = build(providers, problem)
        worst, not_timed = check_parity(case, problem, tasks)
        for name in not_timed:
            del tasks[name]
        for name, reason in (left_out | not_timed).items():
            say(f"  {shape.name}: {name} is left out, {reason}")
            absent[f"{name} at {shape.name}"] = reason
        for mode in case.modes:
            measured = measure_mode(case, problem, tasks, mode, limits, clock, budget(quick, seconds), memory=not quick)
            for row in measured:
                rows.append(row | {"error": worst.get(row["provider"])} | about)
                say("  " + line(rows[-1], share=not quick))
    described = {"limits": {"tflops": rates, "copy_gb_s": limits.copy / 1e9}, "absent": absent, "facts": facts, "load_before": busy}
    return {"op": case.op, "about": case.about, "machine": about, **described, "rows": rows}


def line(row: Row, share: bool = True) -> str:
    """A row for people; a small size says nothing about its ``share`` of the limit."""
    extra = "" if row["extra_mb"] is None else f"{row['extra_mb']:9.1f} MB"
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    times = f"{row['p50_ms']:10.3f} ms ({row['p20_ms']:.3f}-{row['p80_ms']:.3f})"
    ratio = f"{row['ratio_rival']:5.2f}x of {row['rival']}" if row["rival"] else ""
    limit = f"{row['share_of_limit']:4.0%} of limit  " if share else ""
    return f"{row['shape']:<22} {row['mode']:<17} {row['provider']:<14} {times:<34} {limit}{ratio} {extra}{error}"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8", newline="") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)


def write(result: dict[str, Any], folder: Path, columns: Sequence[str] = COLUMNS) -> Path:
    """Write <folder>/<device>/<op>.json and the rows alone as .csv; returns the JSON's path."""
    path = folder / result["machine"]["device"] / f"{result['op']}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _short(row.get(name)) for name in columns} for row in result["rows"])
    os.replace(temporary, path.with_suffix(".csv"))
    return path


def _short(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
