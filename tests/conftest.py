"""What the tests share: the `isa` marker, subprocesses, and the thread count put back after each test."""

from __future__ import annotations

import os
import signal
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
        with subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | environment,
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # with what it forked
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    return run
