"""What the tests share: the `isa` marker, subprocesses, and the thread count put back after each test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before NumPy is imported: the reference's products are small, and BLAS threads stall if the machine is busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: run again in a subprocess for each instruction set of the CPU")


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS...` in the tests' folder with extra environment variables, capture its output."""

    def run(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | environment,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
