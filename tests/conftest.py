"""For every test: one thread, here and in the processes that tests start, and the same random numbers in each run and each order."""

import os

import pytest
from hypothesis import settings

# Read when torch is imported. Threads wait busily for each other, which costs more than small tensors gain, most of all where other tests
# run on the other cores.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

# What is drawn depends neither on chance, nor on what an earlier run left in a folder, nor on how fast the machine is.
settings.register_profile("same everywhere", derandomize=True, database=None, deadline=None)
settings.load_profile("same everywhere")
torch.manual_seed(0)  # parameters of tests are drawn while they are collected, and processes that share the tests must draw alike


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)
