"""What the tests share: the markers `long`, `isa` and `units`, subprocesses, one build for all workers, and the thread
count put back after each test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before NumPy and torch are imported. Threads that wait for each other stall if the machine is busy, and it is, with a
# worker for each core. A test of threads sets their number itself.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from cases import ISAS, UNITS, instruction_set
from filelock import FileLock  # torch needs it, too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long`, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: run for each instruction set of the CPU, or for that in RNNFAST_ISA")
    config.addinivalue_line("markers", "units: run for each unit that multiplies 16-bit numbers, emulated ones, too")
    config.addinivalue_line("markers", "long: run with --long only; something shorter catches most of the same breaks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.long:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for marker, isas in (("isa", ISAS), ("units", UNITS)):
        if metafunc.definition.get_closest_marker(marker):
            metafunc.parametrize("selected_isa", isas, indirect=True)


@pytest.fixture(autouse=True)
def selected_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of tests marked `isa` or `units`, each instruction set in turn."""
    if not hasattr(request, "param"):
        yield
        return
    with instruction_set(request.param):
        yield


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Calls build(folder) in a folder of this name, once for all workers; -> the folder."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name: str, build: Callable[[Path], object]) -> Path:
        folder = root / name
        folder.mkdir(exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            done = folder / "done"
            if not done.exists():
                build(folder)
                done.touch()
        return folder

    return once


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
