"""Compiles the C++ core with CMake and ninja. It must never import torch: build isolation would download gigabytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).resolve().parent
        build = source / "build" / f"{sys.implementation.cache_tag}-{self.plat_name}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # isolated builds move the tools that it remembers
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={source / 'rnnfast'}",
            f"-DRNNFAST_CUDA={os.environ.get('RNNFAST_CUDA', 'off')}",
            *([f"-DRNNFAST_CUDA_ARCHS={archs}"] if (archs := os.environ.get("RNNFAST_CUDA_ARCHS")) else []),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        # Built where the package lies: Python in this folder finds it here before the installed one, and after a change
        # `cmake --build build/cpython*` alone is enough.
        targets = [Path(self.get_ext_fullpath(module)).resolve() for module in ("rnnfast._C", "rnnfast._cuda")]
        built = {target: source / "rnnfast" / target.name for target in targets}
        for file in built.values():
            file.unlink(missing_ok=True)  # of another configuration
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        for target, file in built.items():
            if file.exists() and file != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(file), str(target))


setup(ext_modules=[Extension("rnnfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
