"""Errors of the kernels' sigmoid and tanh alone, in ulps, over all numbers that there are: a layer whose other gates
stand open or shut computes them bare."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from rnnfast._autograd import op

pytestmark = pytest.mark.isa
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# Units, all alike: a part of the narrowest vector; whole ones of the widest and a part.
units = pytest.mark.parametrize("H", [1, 17])
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


def one_of(results: torch.Tensor) -> torch.Tensor:
    """(N) of (1,N,H): what every unit has."""
    first = results[..., :1]
    torch.testing.assert_close(results, first.expand_as(results), rtol=0, atol=0, equal_nan=True)
    return first.flatten()


def assert_ulps(results: torch.Tensor, function: str, dtype: torch.dtype) -> None:
    got, want = one_of(results).numpy(), truth(function, dtype)
    tiny = np.finfo(got.dtype).tiny
    ulps = np.abs(got - want) / np.spacing(np.maximum(np.abs(want), tiny).astype(got.dtype))
    lost = (function == "sigmoid") & (want < tiny)  # denormal: may be 0
    assert ((got[lost] >= 0) & (got[lost] <= tiny)).all()
    worst = np.where(lost, 0, ulps).argmax()
    assert ulps[worst] <= ULPS[function], (numbers(dtype)[worst], got[worst], want[worst])


def elman(mode: str, x: torch.Tensor, H: int) -> torch.Tensor:
    """y (1,N,H) of pre-activations x (N)"""
    weights = [torch.ones(H, 1, dtype=x.dtype), torch.zeros(H, H, dtype=x.dtype)]
    return op.recurrent(mode, x.view(1, -1, 1), None, None, None, weights, 1, False, False)[0]


def lstm(z: torch.Tensor, c0: torch.Tensor, H: int) -> tuple[torch.Tensor, torch.Tensor]:
    """h_1 and c_1 (1,N,H) of pre-activations z, (N,4) or (N,1) for all gates alike, and c_0 (N)"""
    gates = torch.eye(4, dtype=z.dtype) if z.size(1) == 4 else torch.ones(4, 1, dtype=z.dtype)
    weights = [gates.repeat_interleave(H, 0), torch.zeros(4 * H, H, dtype=z.dtype)]
    c0 = c0.view(1, -1, 1).repeat(1, 1, H)
    y, _, c_n = op.recurrent("LSTM", z.unsqueeze(0), None, torch.zeros_like(c0), c0, weights, 1, False, False)
    assert c_n is not None
    return y, c_n


@units
@both_dtypes
def test_tanh_of_an_elman_network(dtype: torch.dtype, H: int) -> None:
    assert_ulps(elman("RNN_TANH", torch.from_numpy(numbers(dtype)), H), "tanh", dtype)


# Pre-activations i, f, g, o and c_0; None for the one that sweeps over all numbers.
BARE = {
    "i": (None, 0, OPEN, OPEN, 0),
    "f": (OPEN, None, 0, OPEN, 1),
    "g": (OPEN, 0, None, OPEN, 0),
    "o": (OPEN, OPEN, 0, None, OPEN),
    "c": (OPEN, OPEN, 0, OPEN, None),
}


@units
@both_dtypes
@pytest.mark.parametrize("bare", BARE)
def test_activations_of_an_lstm(dtype: torch.dtype, bare: str, H: int) -> None:
    """c_1 is sigmoid(i), sigmoid(f) or tanh(g), or h_1 is sigmoid(o) or tanh(c_1)."""
    swept = torch.from_numpy(numbers(dtype))
    *z, c0 = (swept if value is None else torch.full_like(swept, value) for value in BARE[bare])
    y, c_n = lstm(torch.stack(z, 1), c0, H)
    assert_ulps(y if bare in "oc" else c_n, "tanh" if bare in "gc" else "sigmoid", dtype)


@units
@both_dtypes
def test_no_number_and_infinities(dtype: torch.dtype, H: int) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0], dtype=dtype)
    for mode, want in (("RNN_TANH", [1, -1, torch.nan, 0]), ("RNN_RELU", [torch.inf, 0, torch.nan, 0])):
        y = one_of(elman(mode, x, H))
        torch.testing.assert_close(y, torch.tensor(want, dtype=dtype), equal_nan=True)
    y, c_n = map(one_of, lstm(x[:3, None], torch.full((3,), 0.5, dtype=dtype), H))
    assert c_n[:2].tolist() == [1.5, 0.0] and y[1] == 0
    torch.testing.assert_close(y[0], torch.tanh(torch.tensor(1.5, dtype=dtype)))
    assert c_n[2].isnan() and y[2].isnan()
