"""How contenders are timed: in turns A B C A B C ... in one process, so that whatever slows the machine down for a
while slows all of them down."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 30
SAMPLE_S = 5e-3  # a sample of something shorter is a loop
QUIET_S = 1e-3  # threads spin for some time after a parallel region: a sample begins once they have stopped ...
QUIET_TRIES = 30  # ... or after so many times QUIET_S

Run = Callable[[], object]
Timer = Callable[[Run, int], float]
"""timer(run, calls): seconds per call, over `calls` calls"""


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of the samples in seconds per call; each sample is the mean of `calls` calls."""

    median_s: float
    iqr_s: float
    samples: int
    calls: int


def cpu_timer(run: Run, calls: int) -> float:
    """Wall time, after one call that wakes the threads up and pays for what the contender before has left: caches, and
    memory that the C library gives back to the system when somebody frees the next block."""
    wait_until_quiet()
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def first_call(run: Run) -> float:
    """Wall time of one call with nothing before it."""
    wait_until_quiet()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_timer(run: Run, calls: int) -> float:
    """Time between two CUDA events around the calls, after one call that fills the queue."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3 / calls


def wait_until_quiet() -> None:
    """Return when this process uses next to no CPU time while it sleeps."""
    for _ in range(QUIET_TRIES):
        before = time.process_time()
        time.sleep(QUIET_S)
        if time.process_time() - before < 0.3 * QUIET_S:
            return


def time_in_turns(runs: Mapping[str, Run], timer: Timer, budget_s: float) -> dict[str, Timing]:
    """Time each of `runs` as often as `budget_s` allows, between MIN_ROUNDS and MAX_ROUNDS times."""
    calls = {name: max(1, math.ceil(SAMPLE_S / _estimate(run, timer))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # so that a collection has only to look at what the samples leave
    gc.disable()
    try:
        spent = 0.0
        while len(_first(samples)) < MIN_ROUNDS or (spent < budget_s and len(_first(samples)) < MAX_ROUNDS):
            for name, run in runs.items():
                gc.collect()  # some transforms leave their graphs to the collector, gigabytes in a few calls
                samples[name].append(timer(run, calls[name]))
                spent += samples[name][-1] * calls[name]
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: summarise(taken, calls[name]) for name, taken in samples.items()}


def _estimate(run: Run, timer: Timer) -> float:
    """Seconds of one call when warm; one try tells that a call fills a sample."""
    first = timer(run, 1)
    if first >= SAMPLE_S:
        return first
    return max(min(timer(run, 1) for _ in range(2)), 1e-9)


def _first(samples: Mapping[str, list[float]]) -> list[float]:
    return next(iter(samples.values()))


def summarise(samples: Sequence[float], calls: int) -> Timing:
    low, median, high = np.percentile(samples, (25, 50, 75))
    return Timing(float(median), float(high - low), len(samples), calls)
