"""Echo state networks of the same sizes, run and fitted at once.

Dims: T steps, B sequences, I inputs, H reservoir units, O outputs, S networks, Z features = 1 + I + H, n rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rnnfast.reservoir.bank import DTYPES, Bank, Inputs, Matrix, Readouts
from rnnfast.reservoir.data import Batch, Kind, as_count, as_tensor, chunks, given
from rnnfast.reservoir.guard import public
from rnnfast.reservoir.network import Network
from rnnfast.reservoir.readout import LeaveOneOut, Sums, Validation, solve
from rnnfast.reservoir.weights import noise_generator

Networks = TypeVar("Networks", bound=Sequence[Network])

# Features (S,B,t,Z) held at a time: in the cache when they are multiplied, and so many rows that the Gram matrix, which
# every product reads and writes, is not what takes the time.
CHUNK_BYTES, MOST_BYTES = 2 << 20, 16 << 20
CHUNK_ROWS = 512

# Cycles of a vector of units for each connection and for the rest, and of a vector of a row of the Gram matrix.
CONNECTION, UNIT, GRAM = 2.5, 25, 0.5

_SHARED = ("input_size", "reservoir_size", "output_size", "fan_in", "topology", "unit", "dtype", "has_feedback")


class Ensemble:
    """The reservoirs of some networks as one bank. Networks with the same seed and connections share the matrix."""

    def __init__(self, networks: Sequence[Network]) -> None:
        if not isinstance(networks, Sequence) or not all(isinstance(network, Network) for network in networks):
            raise TypeError(f"networks: expected a list of EchoState, got {networks!r}")
        if not networks:
            raise ValueError("networks: expected at least one, got none")
        first = networks[0]
        for name in _SHARED:
            values = {getattr(network, name) for network in networks}
            if len(values) > 1:
                raise ValueError(f"networks: expected the same {name} in all of them, got {sorted(values)}")
        groups: dict[int, list[Network]] = {}
        for network in networks:
            groups.setdefault(network.seed, []).append(network)
        if len({len(group) for group in groups.values()}) > 1:  # a bank has as many reservoirs on every matrix
            groups = {i: [network] for i, network in enumerate(networks)}
        self.networks = [network for group in groups.values() for network in group]  # [S], in the order of the bank
        drawn = [group[0].drawn for group in groups.values()]
        for group, weights in zip(groups.values(), drawn, strict=True):
            for network in group:
                network.drawn = weights
                network.warn_if_unstable()
        self.dtype = DTYPES[first.dtype]
        self.I, self.H, self.O = first.input_size, first.reservoir_size, first.output_size
        self.feedback = first.has_feedback
        matrices = [Matrix(weights.w, weights.starts) for weights in drawn]
        self.ahead: Executor | None = None  # the thread that runs the reservoir one part ahead, while there is one
        self.bank = Bank(first.unit, self.dtype, matrices, [_inputs(network) for network in self.networks])

    @property
    def S(self) -> int:
        return len(self.networks)

    @property
    def Z(self) -> int:
        return 1 + self.I + self.H

    def features(
        self,
        batch: Batch,
        h: Tensor,
        y: Tensor,
        noise: Sequence[np.random.Generator] | None = None,
        summed: bool = False,
    ) -> Iterator[tuple[Tensor, slice]]:
        """Rows [1, x_t, h_t] of some steps at a time, (S,B,t,Z), and which steps these are.

        h (S,B,H), state before the first step; in place, that after the last step once all have been given. y (B,O),
        the output before the first step. `summed`: a Gram matrix is summed up from them. Memory is used again for later
        steps. Where the reservoir keeps a single thread busy, it runs one part ahead in a thread of its own.
        """
        B, T = batch.x.shape[:2]
        step = self.S * max(1, B) * self.Z * h.element_size()  # bytes
        size = max(16, CHUNK_BYTES // step, min(CHUNK_ROWS // max(1, B), MOST_BYTES // step))
        runs_ahead = size < T and self._runs_ahead(B, summed)
        memory = [h.new_empty(self.S, B, min(T, size), self.Z) for _ in range(1 if size >= T else 2)]

        def run(steps: slice) -> tuple[Tensor, slice]:
            X = memory[steps.start // size % 2][:, :, : steps.stop - steps.start]
            if X.shape[2] < memory[0].shape[2]:
                X = torch.empty_like(X, memory_format=torch.contiguous_format)  # rows at equal distances
            x = batch.x[:, steps]
            X[..., 0] = 1
            X[..., 1 : 1 + self.I] = x
            u = x if batch.y is None or not self.feedback else torch.cat([x, _before(batch.y, steps, y)], 2)
            self.bank.drive(u, h, X[..., 1 + self.I :], self._noise(noise, X), threads=1 if runs_ahead else None)
            return X, steps

        parts = chunks(T, size)
        if not runs_ahead:
            yield from map(run, parts)
            return
        with self._one_ahead() as ahead:
            coming = ahead.submit(run, next(parts))
            for steps in parts:
                given, coming = coming.result(), ahead.submit(run, steps)
                yield given
            yield coming.result()

    def _runs_ahead(self, B: int, summed: bool) -> bool:
        """Is one thread for the reservoir, and for the others what is done with its states, at least as fast as all of
        them for the one and then for the other? So no step ends with a barrier."""
        threads = torch.get_num_threads()
        if threads == 1 or self.bank.is_serial(B):
            return threads > 1
        step, sums = CONNECTION * self.bank.F + UNIT, GRAM * self.Z  # of a vector of units
        return summed and self.S * B == 1 and sums >= (threads - 1) * step

    @contextmanager
    def _one_ahead(self) -> Iterator[Executor]:
        with ThreadPoolExecutor(1) as self.ahead:
            try:
                yield self.ahead
            finally:
                self.ahead = None

    def _noise(self, generators: Sequence[np.random.Generator] | None, X: Tensor) -> Tensor | None:
        """(S,B,t,H), whatever the number of steps t at a time; None if no network has any."""
        if generators is None or not any(network.noise for network in self.networks):
            return None
        _, B, t, _ = X.shape
        parts = [
            network.noise * generator.standard_normal((t, B, self.H)).swapaxes(0, 1)
            for network, generator in zip(self.networks, generators, strict=True)
        ]
        return torch.from_numpy(np.stack(parts)).to(self.dtype).contiguous()

    def rows(self, data: Iterable[Batch], washout: int, noise: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """X (S,n,Z) and Y (n,O), float64, of all sequences, each from the state 0 and without its first steps. At the
        end `h` (S,B,H) are the states after the last batch, and `y` (B,T,O) its outputs."""
        generators = [noise_generator(network.seed) for network in self.networks] if noise else None
        for batch in data:
            assert batch.y is not None
            self.h, self.y = _rest(self, batch), batch.y
            for X, steps in self.features(
                batch, self.h, batch.y.new_zeros(len(batch.y), self.O), generators, summed=True
            ):
                first = min(max(0, washout - steps.start), X.shape[2])
                if first < X.shape[2]:
                    yield (
                        X[:, :, first:].double().reshape(self.S, -1, self.Z),
                        batch.y[:, steps.start + first : steps.stop].double().reshape(-1, self.O),
                    )

    def readouts(self) -> Readouts:
        """The fitted readouts, as the kernel takes them."""
        W = torch.stack([torch.from_numpy(network.W_out_) for network in self.networks]).to(self.dtype)  # (S,O,Z)
        return Readouts(*[part.contiguous() for part in (W[..., 0], W[..., 1 : 1 + self.I], W[..., 1 + self.I :])])


def _before(y: Tensor, steps: slice, start: Tensor) -> Tensor:
    """y_{t-1} of some steps, (B,t,O)."""
    first = start if steps.start == 0 else y[:, steps.start - 1]
    return torch.cat([first[:, None], y[:, steps.start : steps.stop - 1]], 1)


def _inputs(network: Network) -> Inputs:
    w_in = network.drawn.w_in * np.asarray(network.input_scale)
    if network.has_feedback:
        w_in = np.concatenate([w_in, network.feedback * network.drawn.w_fb], 1)
    return Inputs(w_in, network.bias_scale * network.drawn.bias, network.leak, network._scale)


@public
def fit_many(
    networks: Networks,
    x: Any,
    y: Any,
    ridge: float | Sequence[float] = 1e-6,
    washout: int = 100,
    *,
    validation: tuple[Any, Any] | None = None,
    warm_start: bool = False,
    progress: bool = False,
) -> Networks:
    """Fit the readouts of several networks to the same data, their reservoirs running at once.

    What comes out is what `EchoState.fit` gives for each of them. Networks with the same seed share the recurrent
    matrix, up to a factor: for those (a search over spectral_radius, leak and scales) a step costs far less than one
    after another. `networks[i].ridge_errors_` compares them.

        networks = [EchoState(1, 300, 1, spectral_radius=r, leak=a) for r in (0.7, 0.9, 1.1) for a in (0.1, 0.3, 1)]
        fit_many(networks, x, y, ridge=[1e-8, 1e-6, 1e-4])
        best = min(networks, key=lambda network: min(network.ridge_errors_.values()))

    Args:
        networks: of the same sizes, fan-in, unit and dtype, with feedback or without.
        x, y, ridge, washout, validation, warm_start: as for `EchoState.fit`; every network gets its own choice.
        progress: show a bar (tqdm), default False.

    Returns:
        networks

    Raises:
        ValueError, numpy.linalg.LinAlgError: as `EchoState.fit`; then no network has changed.
    """
    ridges = _checked_ridges(ridge)
    ensemble = Ensemble(networks)
    data, kind = _data(ensemble, x, y, washout)
    steps = _Progress(progress)
    sums = _sums_before(ensemble) if warm_start else Sums.zeros(ensemble.S, ensemble.Z, ensemble.O)
    for X, Y in steps(ensemble.rows(data, washout, noise=True), "fit"):
        sums.add(X, Y, ensemble.ahead)
    h, last = ensemble.h, ensemble.y
    if len(ridges) == 1:
        best, errors = ridges.expand(ensemble.S), None
    else:
        if validation is None:
            judge: LeaveOneOut | Validation = LeaveOneOut(sums, ridges)
            rows = ensemble.rows(data, washout, noise=True)
        else:
            if not isinstance(validation, (list, tuple)) or len(validation) != 2:
                raise ValueError(f"validation: expected (x, y), got {type(validation).__name__}")
            judge = Validation(sums, ridges)
            rows = ensemble.rows(_data(ensemble, *validation, washout)[0], washout, noise=False)
        count = 0
        for X, Y in steps(rows, "choose the ridge"):
            judge.add(X, Y)
            count += Y.numel()
        errors = judge.errors / count  # (S,K)
        best = ridges[errors.argmin(1)]
    weights = solve(sums, best)
    for s, network in enumerate(ensemble.networks):
        network._fitted(sums.of(s), weights[s], float(best[s]))
        network._keep(kind, h[s], last)
        if errors is not None:
            network.ridge_errors_ = dict(zip(ridges.tolist(), errors[s].tolist(), strict=True))
    return networks


@public
def predict_many(networks: Sequence[Network], x: Any) -> list[Any]:
    """What `EchoState.predict` gives for each network (without feedback), their reservoirs running at once.

    Args:
        networks: fitted, of the same sizes, fan-in, unit and dtype.
        x: as for `EchoState.predict`: (T,I), (B,T,I), or a list of (T_i,I).

    Returns:
        for each network (T,O), (B,T,O), or a list of (T_i,O)
    """
    ensemble = Ensemble(networks)
    if ensemble.feedback:
        raise ValueError("predict_many: expected networks without feedback; use EchoState.predict for each of them")
    sequences = given(x, None, ensemble.I, ensemble.O, ensemble.dtype)
    results = [predict(ensemble, batch, _rest(ensemble, batch)) for batch, _ in sequences.pairs]  # (S,B,T,O) each
    place = {id(network): s for s, network in enumerate(ensemble.networks)}
    return [sequences.back([y[place[id(network)]] for y in results]) for network in networks]


def _rest(ensemble: Ensemble, batch: Batch) -> Tensor:
    """(S,B,H) the state 0."""
    return batch.x.new_zeros(ensemble.S, len(batch.x), ensemble.H)


def predict(ensemble: Ensemble, batch: Batch, h: Tensor) -> Tensor:
    """(S,B,T,O) from h (S,B,H), in place. In open loop."""
    for network in ensemble.networks:
        network._check_fitted()
    W = torch.cat([part if part.dim() == 3 else part[..., None] for part in ensemble.readouts()], 2)  # (S,O,Z)
    B, T = batch.x.shape[:2]
    y = h.new_empty(ensemble.S, B, T, ensemble.O)
    for X, steps in ensemble.features(batch, h, batch.x.new_zeros(B, ensemble.O)):
        y[:, :, steps] = X @ W.mT[:, None]
    return y


def _checked_ridges(ridge: float | Sequence[float]) -> Tensor:
    ridges = as_tensor("ridge", ridge, torch.float64).reshape(-1)
    for value in ridges.tolist():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"ridge: expected finite numbers >= 0, got {value:g}")
    if not len(ridges):
        raise ValueError("ridge: expected a number, or at least one in a list")
    return ridges


def _data(ensemble: Ensemble, x: Any, y: Any, washout: int) -> tuple[list[Batch], Kind]:
    if y is None:
        raise ValueError("y: expected targets, got None")
    washout = as_count("washout", washout)
    pairs, listed = given(x, y, ensemble.I, ensemble.O, ensemble.dtype)
    for i, (batch, _) in enumerate(pairs):
        B, T = batch.x.shape[:2]
        name = f"x[{i}]" if listed else "x"
        if B == 0:
            raise ValueError(f"{name}: expected at least one sequence, got shape {tuple(batch.x.shape)}")
        if washout >= T:
            raise ValueError(f"{name}: expected more steps than the washout of {washout}, got T={T}")
    return [batch for batch, _ in pairs], pairs[-1][1]


def _sums_before(ensemble: Ensemble) -> Sums:
    before = []
    for network in ensemble.networks:
        network._check_fitted()
        if network._sums is None:
            raise ValueError("warm_start: expected networks that were fitted by fit, not by partial_fit")
        before.append(network._sums)
    return Sums.cat(before)


class _Progress:
    """Wraps an iteration in a bar, if there shall be one."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def __call__(self, rows: Iterator[tuple[Tensor, Tensor]], what: str) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shown:
            yield from rows
            return
        from tqdm import tqdm

        with tqdm(desc=what, unit=" rows", unit_scale=True) as bar:
            for X, Y in rows:
                yield X, Y
                bar.update(len(Y))
