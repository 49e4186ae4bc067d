"""Errors of the kernels' sigmoid and tanh alone, in ulps, over all numbers that there are: a layer of one unit whose
other gates stand open or shut computes them bare."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from rnnfast._autograd import op

pytestmark = pytest.mark.isa
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
OPEN = 100.0  # sigmoid and tanh of it are 1
ULPS = {"sigmoid": 2.5, "tanh": 3}  # 2.27 and 2.57 are the largest seen, of all instruction sets and both dtypes


@cache
def numbers(dtype: torch.dtype) -> np.ndarray:
    """(N) finite ones: of every exponent and sign, denormal ones too, and many where the functions bend and end."""
    random = np.random.default_rng(0)
    name, bits = ("float32", np.uint32) if dtype == torch.float32 else ("float64", np.uint64)
    any_bits = random.integers(0, np.iinfo(bits).max, 40_000, bits, endpoint=True).view(name)
    bends = [random.uniform(-limit, limit, 40_000).astype(name) for limit in (1, 20, 120, 760)]
    ends = [0.0, -0.0, np.finfo(name).tiny, np.finfo(name).smallest_subnormal, np.finfo(name).max, -np.finfo(name).max]
    x = np.concatenate([any_bits, *bends, np.array(ends, name)])
    return x[np.isfinite(x)]


@cache
def truth(function: str, dtype: torch.dtype) -> np.ndarray:
    x = numbers(dtype).astype(np.longdouble)
    with np.errstate(over="ignore"):
        return np.tanh(x) if function == "tanh" else 1 / (1 + np.exp(-x))


def assert_ulps(got: torch.Tensor, function: str, dtype: torch.dtype) -> None:
    got, want = got.flatten().numpy(), truth(function, dtype)
    tiny = np.finfo(got.dtype).tiny
    ulps = np.abs(got - want) / np.spacing(np.maximum(np.abs(want), tiny).astype(got.dtype))
    lost = (function == "sigmoid") & (want < tiny)  # denormal: may be 0
    assert ((got[lost] >= 0) & (got[lost] <= tiny)).all()
    worst = np.where(lost, 0, ulps).argmax()
    assert ulps[worst] <= ULPS[function], (numbers(dtype)[worst], got[worst], want[worst])


@both_dtypes
def test_tanh_of_an_elman_network(dtype: torch.dtype) -> None:
    x = torch.from_numpy(numbers(dtype)).view(1, -1, 1)
    weights = [torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)]
    y, _, _ = op.recurrent("RNN_TANH", x, None, None, None, weights, 1, False, False)
    assert_ulps(y, "tanh", dtype)


# Pre-activations i, f, g, o and c_0; None for the one that sweeps over all numbers.
BARE = {
    "i": (None, 0, OPEN, OPEN, 0),
    "f": (OPEN, None, 0, OPEN, 1),
    "g": (OPEN, 0, None, OPEN, 0),
    "o": (OPEN, OPEN, 0, None, OPEN),
    "c": (OPEN, OPEN, 0, OPEN, None),
}


@both_dtypes
@pytest.mark.parametrize("bare", BARE)
def test_activations_of_an_lstm(dtype: torch.dtype, bare: str) -> None:
    """c_1 is sigmoid(i), sigmoid(f) or tanh(g), or h_1 is sigmoid(o) or tanh(c_1)."""
    swept = torch.from_numpy(numbers(dtype))
    *z, c0 = (swept if value is None else torch.full_like(swept, value) for value in BARE[bare])
    weights = [torch.eye(4, dtype=dtype), torch.zeros(4, 1, dtype=dtype)]  # x is z
    c0 = c0.view(1, -1, 1)
    y, _, c_n = op.recurrent(
        "LSTM", torch.stack(z, 1).unsqueeze(0), None, torch.zeros_like(c0), c0, weights, 1, False, False
    )
    assert_ulps(y if bare in "oc" else c_n, "tanh" if bare in "gc" else "sigmoid", dtype)


@both_dtypes
def test_no_number_and_infinities(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype).view(1, 3, 1)
    weights = [torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)]
    y, _, _ = op.recurrent("RNN_TANH", x, None, None, None, weights, 1, False, False)
    torch.testing.assert_close(y.flatten().double(), torch.tensor([1, -1, torch.nan]).double(), equal_nan=True)
    weights = [torch.ones(4, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)]  # all gates at once
    h0, c0 = torch.zeros(1, 3, 1, dtype=dtype), torch.full((1, 3, 1), 0.5, dtype=dtype)
    y, _, c_n = op.recurrent("LSTM", x, None, h0, c0, weights, 1, False, False)
    assert c_n.flatten()[:2].tolist() == [1.5, 0.0] and y.flatten()[1] == 0
    torch.testing.assert_close(y.flatten()[0], torch.tanh(torch.tensor(1.5, dtype=dtype)))
    assert c_n.flatten()[2].isnan() and y.flatten()[2].isnan()
