"""csrc/stream.h: installed on its own, the C example gives what Python gives, without Python or torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import rnnfast

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "stream"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "cc", "c++"))), reason="needs CMake, ninja and a C compiler"
)


def call(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built_library() -> Path | None:
    """A folder whose library of streams is as new as its source: building one takes the better part of a minute."""
    folders = [ROOT / "csrc/cells", ROOT / "csrc/cpu"]
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc" / name for name in ("rnnfast.h", "stream.h", "unit.h"))]
    newest = max(path.stat().st_mtime for path in [*sources, *(p for folder in folders for p in folder.rglob("*.*"))])
    for library in (ROOT / "build").glob("*/librnnfast_stream.a"):
        cache = (library.parent / "CMakeCache.txt").read_text()
        if library.stat().st_mtime > newest and re.search(r"^RNNFAST_SANITIZE:STRING=$", cache, re.MULTILINE):
            return library.parent
    return None


def install(folder: Path) -> None:
    build = built_library()
    if build is None:
        build = folder / "build"
        call("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, "-DRNNFAST_PYTHON=OFF")
        call("cmake", "--build", build, "--target", "rnnfast_stream")
    call("cmake", "--install", build, "--component", "stream", "--prefix", folder)


@pytest.fixture(scope="module")
def prefix(built_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Where header and library are installed."""
    return built_once("installed_stream", install)


def compile_c(source: Path, program: Path, prefix: Path, *options: str) -> Path:
    """As docs/stream.md says."""
    strict = ("-Wall", "-Wextra", "-pedantic", "-Werror")
    libraries = ("-lrnnfast_stream", "-lstdc++", "-lm", "-lpthread")
    call("cc", *options, *strict, source, f"-I{prefix}/include", f"-L{prefix}/lib", *libraries, "-o", program)
    return program


@pytest.fixture(scope="module")
def effect(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("effect") / "effect"
    return compile_c(EXAMPLE / "effect.c", program, prefix, "-O2", "-D_POSIX_C_SOURCE=199309L", "-std=c99")


def test_what_is_installed(prefix: Path) -> None:
    assert (prefix / "include/rnnfast/stream.h").read_text() == (ROOT / "csrc/stream.h").read_text()
    assert (prefix / "lib/librnnfast_stream.a").exists()


@pytest.mark.parametrize("steps", [0, 1, 47, 48, 4807])
def test_the_example_gives_what_python_gives(effect: Path, tmp_path: Path, steps: int) -> None:
    torch.manual_seed(0)
    stream = rnnfast.Stream(rnnfast.LSTM(1, 16), head=torch.nn.Linear(16, 1))
    stream.save(tmp_path / "effect.rnn")
    x = np.random.default_rng(0).normal(size=(steps, 1, 1)).astype(np.float32)
    done = subprocess.run([effect, tmp_path / "effect.rnn"], input=x.tobytes(), capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr.startswith(b"%d samples" % steps), done.stderr
    y = np.frombuffer(done.stdout, np.float32)
    with_best_isa = rnnfast._C.isa() == rnnfast._C.usable_isas()[-1]  # which C takes
    expected = stream(x).ravel() if steps else x.ravel()
    assert np.array_equal(y, expected) if with_best_isa else np.allclose(y, expected, atol=1e-5)


def test_the_example_needs_no_python(effect: Path) -> None:
    linked = call("ldd", effect)
    assert "libc.so" in linked and not re.search("python|torch|gomp", linked)


def test_the_example_says_what_is_wrong(effect: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.rnn"
    rnnfast.Stream(rnnfast.LSTM(2, 16)).save(model)
    wide = subprocess.run([effect, model], input=b"", capture_output=True, timeout=60)
    assert wide.returncode == 1 and b"one sample in and one out" in wide.stderr
    model.write_bytes(model.read_bytes()[:-9])
    cut = subprocess.run([effect, model], input=b"", capture_output=True, timeout=60)
    assert cut.returncode == 1 and b"cut off" in cut.stderr
    missing = subprocess.run([effect, tmp_path / "none.rnn"], input=b"", capture_output=True, timeout=60)
    assert missing.returncode == 1 and b"No such file" in missing.stderr


def test_training_writes_a_model_that_plays(effect: Path, tmp_path: Path) -> None:
    model = tmp_path / "effect.rnn"
    printed = call(sys.executable, EXAMPLE / "train.py", "--updates", 60, "--save", model)
    first, last = map(float, re.findall(r"(\d\S*) (?:in the first|on new)", printed))
    assert 0 < last < 0.5 * first
    done = subprocess.run([effect, model], input=bytes(4 * 480), capture_output=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) == 4 * 480


@pytest.mark.skipif(sys.platform != "linux", reason="replaces functions of glibc, and lets Linux watch over calls")
def test_no_step_allocates_locks_or_calls_the_system(prefix: Path, tmp_path: Path) -> None:
    program, source = tmp_path / "realtime", ROOT / "csrc/tests/test_stream_realtime.cpp"
    libraries = ("-lrnnfast_stream", "-lpthread", "-ldl")
    call("c++", "-std=c++17", "-O1", source, f"-I{ROOT}/csrc", f"-L{prefix}/lib", *libraries, "-o", program)
    call(program)


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_header_stands_alone(language: str, prefix: Path, tmp_path: Path) -> None:
    source = tmp_path / f"alone.{'c' if language == 'c' else 'cpp'}"
    source.write_text("#include <rnnfast/stream.h>\nint main(void) { return rnnfast_step(NULL, NULL, NULL) != 1; }\n")
    call(compile_c(source, tmp_path / "alone", prefix, "-std=c99" if language == "c" else "-std=c++11"))
