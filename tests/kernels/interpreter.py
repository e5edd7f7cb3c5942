"""Runs a function of a test file in a process of its own, in which Triton may interpret its kernels on the CPU."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable

PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("case", {path!r})
case = importlib.util.module_from_spec(spec)
sys.modules["case"] = case
spec.loader.exec_module(case)
case.{name}(*{args!r})
"""


def interpreted(function: Callable[..., None], *args: object, timeout: float = 300) -> str:
    """``in_a_process`` under TRITON_INTERPRET=1."""
    return in_a_process(function, *args, timeout=timeout, TRITON_INTERPRET="1")


def in_a_process(function: Callable[..., None], *args: object, timeout: float = 300, **environment: str) -> str:
    """Call ``function(*args)``, a module-level function of a test file, with more environment variables; returns what it printed.

    The file is imported afresh in the new process; ``args`` must survive ``repr``. One call should hold many cases: each
    costs a start of Python and torch.

    Raises:
        AssertionError: the function raised; the message holds its traceback.
    """
    program = PROGRAM.format(path=inspect.getfile(function), name=function.__name__, args=args)
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{function.__name__}{args} failed with {environment}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
