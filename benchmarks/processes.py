"""Processes that start in a moment: forked from a server that has imported torch and the library, and has computed nothing."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# DDP imports torch._dynamo.
_PRELOAD = ("torch.distributed.nn", "torch._dynamo", "benchmarks.__main__", "fastvlp.train.loop", "fastvlp.losses")


def forkserver() -> ForkServerContext:
    """The context whose processes these are."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context
