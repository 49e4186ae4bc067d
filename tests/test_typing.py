"""The package has types, and a user's script that relies on them is checked by mypy --strict."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rnnfast

pytest.importorskip("mypy")

SCRIPT = """
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

lstm = rnnfast.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
x = torch.randn(5, 2, 3, dtype=torch.float64)
y, (h, c) = lstm(x)
packed, (h, c) = lstm(pack_padded_sequence(x, torch.tensor([5, 2])), (h, c))
out, h_n = rnnfast.RNN(3, 4, nonlinearity="relu", device="cpu")(x)
h1, c1 = rnnfast.LSTMCell(3, 4)(x[0])
h2 = rnnfast.RNNCell(3, 4, bias=False)(x[0], h1)
model: torch.nn.Module = rnnfast.revert(rnnfast.convert(torch.nn.Sequential(torch.nn.LSTM(3, 4))))
facts: dict[str, object] = rnnfast.info()
wrong = rnnfast.LSTM("3", 4)
"""


def test_strict_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "script.py"]
    path = os.pathsep.join([str(Path(rnnfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    line = len(SCRIPT.splitlines())
    assert errors == [
        f'script.py:{line}: error: Argument 1 to "LSTM" has incompatible type "str"; expected "int"  [arg-type]'
    ], done.stdout + done.stderr
