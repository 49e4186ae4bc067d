"""Runs the clients whose packages are installed, prints a line for each, and writes docs/clients.md on request."""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import platform
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import torch

import rnnfast
from tests.clients import PACKAGES
from tests.clients.compare import EPS, FACTOR, Comparison, compare

HEAD = ("package", "version", "what was run", "equal?", "torch's error", "rnnfast's error", "speed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each time (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and rnnfast (default 1)")
    parser.add_argument("--markdown", type=Path, help="write the table here, docs/clients.md say")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(PACKAGES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # the packages' own; what they compute is compared
    logging.disable(logging.WARNING)
    rows, good = [], True
    for name in arguments.names or PACKAGES:
        row, agrees = run(name, arguments.rounds)
        rows.append(row)
        good &= agrees
        print(" | ".join(row), flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows, arguments.rounds))
    return 0 if good else 1


def run(name: str, rounds: int) -> tuple[list[str], bool]:
    """A row of the table, and whether there is nothing wrong with it."""
    package, what = PACKAGES[name], _describe(name)
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return [package, "not installed", what, "", "", "", ""], True
    start = time.perf_counter()
    result = compare(importlib.import_module(f"tests.clients.{name}").run, rounds)
    print(
        f"{name}: {time.perf_counter() - start:.0f} s; {result.calls} calls of rnnfast's layers; furthest off: "
        f"{result.worst}; {result.torch_s * 1e3:.0f} and {result.rnnfast_s * 1e3:.0f} ms",
        file=sys.stderr,
        flush=True,
    )
    return [package, version, what, *_numbers(result)], result.agrees and result.calls > 0


def _describe(name: str) -> str:
    """The client's docstring, read without its package."""
    source = (Path(__file__).parent / f"{name}.py").read_text()
    return " ".join((ast.get_docstring(ast.parse(source)) or "").split())


def _numbers(result: Comparison) -> list[str]:
    verdict = "yes" if result.agrees else f"NO: {result.worst}"
    return [
        verdict if result.calls else "NO: no layer of rnnfast was called",
        f"{result.torch_error:.1e}",
        f"{result.rnnfast_error:.1e}",
        f"{result.speed:.2f}",
    ]


def markdown(rows: list[list[str]], rounds: int) -> str:
    info = rnnfast.info()
    threads = f"{info['threads']} thread{'s' if info['threads'] != 1 else ''}"
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows))
    return f"""# Packages that run on converted layers

Each package's own model, built twice from one seed: with torch's layers, and with those that `rnnfast.convert(model)`
makes of them. Both take the same steps.

{table}

- rnnfast {info["version"]} ({info["isa"]}), torch {info["torch"]}, Python {info["python"]}, {threads} of {_cpu()}.
- Errors are the length of the difference from what the same model gives whose recurrent layers compute in float64,
  divided by the length of the latter; of all outputs, losses, gradients and parameters the one that is furthest off,
  measured by what is allowed for it: {FACTOR} times torch's own error there, or {FACTOR} roundings of float32
  ({EPS:.1e}) where torch errs by less than one. "yes" means that all are within that.
- Adam divides a gradient by its size, so rounding in one that is nearly zero becomes a whole step: a "NO" at trained
  parameters alone, with outputs and losses that agree, is no fault yet.
- Speed is torch's CPU time divided by rnnfast's, of all that the steps take and not of the layers alone: medians of
  {rounds} runs each, in turns.

`python -m tests.clients --markdown docs/clients.md`, from the root of the repository, makes this page of the packages
that are installed; `python -m tests.clients skorch_classifier` runs one of
{", ".join(f"`{name}`" for name in PACKAGES)}.
"""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
