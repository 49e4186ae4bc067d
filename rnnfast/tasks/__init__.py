"""Test problems for learning with recurrent networks: sequences with long lags, and chaotic series.

    task = rnnfast.tasks.make("addition", T=80)
    x, y, mask = task.sample(100, torch.Generator().manual_seed(0))  # x (T',B,I), mask (T',B): the steps with a target
    outputs = readout(rnn(x)[0][mask])  # (N,O), a row for each target
    loss = task.loss(outputs, y[mask])
    solved = task.error(outputs, y, mask) < rnnfast.tasks.SOLVED

The series (`mackey_glass`, `narma10`, `lorenz`, `delay_line`) are float64 NumPy arrays (T,I).
"""

from __future__ import annotations

from rnnfast.tasks.sequences import (
    SOLVED,
    TASKS,
    Batch,
    Task,
    addition,
    make,
    memorisation_5bit,
    memorisation_20bit,
    multiplication,
    permutation,
    temporal_order,
    temporal_order_3bit,
    xor,
)
from rnnfast.tasks.series import delay_line, lorenz, mackey_glass, memory_capacity, narma10

__all__ = [
    "SOLVED",
    "TASKS",
    "Batch",
    "Task",
    "addition",
    "delay_line",
    "lorenz",
    "mackey_glass",
    "make",
    "memorisation_5bit",
    "memorisation_20bit",
    "memory_capacity",
    "multiplication",
    "narma10",
    "permutation",
    "temporal_order",
    "temporal_order_3bit",
    "xor",
]
