"""Runs functions of test files in processes of their own, in which Triton, if it is installed, may interpret its kernels on the CPU.

A server that has imported torch and Triton forks for each call: imports, which take longer than most calls, are paid for once.
"""

import atexit
import importlib
import importlib.util
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

# One server for each value of TRITON_INTERPRET, which Triton reads when it is imported.
_SERVERS: dict[str, subprocess.Popen] = {}


def interpreted(function: Callable[..., None], *args: object, timeout: float = 300) -> None:
    """``in_a_process`` under TRITON_INTERPRET=1."""
    in_a_process(function, *args, timeout=timeout, TRITON_INTERPRET="1")


def in_a_process(function: Callable[..., None], *args: object, timeout: float = 300, **environment: str) -> None:
    """Call ``function(*args)``, a module-level function of a test file, with more environment variables.

    The file is imported afresh in the new process; ``args`` are what JSON can hold.

    Raises:
        AssertionError: the function raised or took longer than ``timeout`` seconds; the message holds what the process wrote.
    """
    server = _server(environment.get("TRITON_INTERPRET", "0"))
    with tempfile.NamedTemporaryFile("r") as output:
        call = {"path": inspect.getfile(function), "name": function.__name__, "args": args, "environment": environment}
        print(json.dumps(call | {"output": output.name}), file=server.stdin, flush=True)
        ready, _, _ = select.select([server.stdout], [], [], timeout)
        code = server.stdout.readline().strip() if ready else f"no answer within {timeout} s"
        if not ready:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        assert code == "0", f"{function.__name__}{args} failed ({code}) with {environment}:\n{output.read()}"


def _server(interpret: str) -> subprocess.Popen:
    if interpret not in _SERVERS or _SERVERS[interpret].poll() is not None:
        variables = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        _SERVERS[interpret] = subprocess.Popen([sys.executable, __file__], env=variables, text=True, stdin=subprocess.PIPE,
                                               stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
    return _SERVERS[interpret]


@atexit.register
def _end_servers() -> None:
    for server in _SERVERS.values():
        server.communicate()


def _serve() -> None:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton.language")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _call(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _call(path: str, name: str, args: list[Any], environment: dict[str, str], output: str) -> None:
    """In the child: ends the process."""
    code = 1
    file = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        os.environ |= environment
        spec = importlib.util.spec_from_file_location("case", path)
        case = importlib.util.module_from_spec(spec)
        sys.modules["case"] = case
        spec.loader.exec_module(case)
        getattr(case, name)(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
