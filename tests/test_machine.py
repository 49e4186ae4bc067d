"""What plans know of the machine, as `info` shows it. csrc/tests/test_plan.cpp has the choices themselves."""

from __future__ import annotations

import json

import rnnfast

CALLS = """
import json, torch, rnnfast
torch.set_num_threads(2)
seen = []
for T, B, H in ((5, 2, 16), (4, 64, 512), (4, 64, 512)):
    with torch.no_grad():
        rnnfast.LSTM(8, H)(torch.zeros(T, B, 8))
    seen.append(rnnfast.info()["machine"])
print(json.dumps(seen))
"""
RATES = ("vectors_per_cycle", "far_bytes_per_cycle")


def test_info_describes_the_machine():
    machine = rnnfast.info()["machine"]
    assert isinstance(machine, dict)
    assert 8 <= machine["l1d_kib"] <= 512
    assert 128 <= machine["l2_kib"] <= 4096
    assert machine["l3_kib"] is None or machine["l3_kib"] >= machine["l2_kib"]
    assert (machine["l3_threads"] is None) == (machine["l3_kib"] is None)


def test_rates_are_measured_once_a_large_call_needs_them(run_python):
    small, large, again = json.loads(run_python("-c", CALLS).stdout)
    assert all(small[rate] is None for rate in RATES)
    assert 0.25 <= large["vectors_per_cycle"] <= 4
    assert 2 <= large["far_bytes_per_cycle"] <= 64
    assert again == large


def test_the_command_prints_it(run_python):
    lines = run_python("-m", "rnnfast", "info").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("machine")]
    assert "l2_kib" in line
    assert "far_bytes_per_cycle None" in line
    assert "{" not in line
