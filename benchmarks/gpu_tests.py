"""A pytest plugin that keeps the tests that need a CUDA device: ``python -m pytest -p benchmarks.gpu_tests tests``."""

from __future__ import annotations

import pytest

REASON = "no CUDA device here"  # of the skipif that such a test carries


def _needs_cuda(item: pytest.Item) -> bool:
    return any(mark.kwargs.get("reason") == REASON for mark in item.iter_markers("skipif"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect everything else."""
    config.hook.pytest_deselected(items=[item for item in items if not _needs_cuda(item)])
    items[:] = [item for item in items if _needs_cuda(item)]
