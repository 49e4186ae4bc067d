"""Echo state networks: a fixed random reservoir, and a linear readout that is trained in one linear solve.

Dims: T steps, B sequences, I inputs, H reservoir units, O outputs, Z features = 1 + I + H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnfast.reservoir import ensemble as many
from rnnfast.reservoir.bank import DTYPES
from rnnfast.reservoir.data import Batch, Given, Kind, as_count, as_tensor, given
from rnnfast.reservoir.guard import public
from rnnfast.reservoir.layer import EchoStateLayer
from rnnfast.reservoir.network import Network, check_range
from rnnfast.reservoir.readout import RecursiveLeastSquares, Sums
from rnnfast.reservoir.weights import noise_generator


class EchoState(Network):
    """An echo state network (Jaeger 2001): leaky tanh units with fixed random weights, and a linear readout.

        h_t = (1-a) h_{t-1} + a tanh(W_in x_t + W h_{t-1} + W_fb y_{t-1} + b) + noise_t        y_t = W_out [1, x_t, h_t]

    Only W_out is trained, by ridge regression in float64: (X^T X + ridge I) W_out^T = X^T Y, where a row of X is
    [1, x_t, h_t] and, with feedback, y_{t-1} is the target (teacher forcing). The constant counts as any other feature.

        esn = rnnfast.EchoState(1, 500, 1, spectral_radius=0.9, leak=0.3, seed=0)
        esn.fit(x_train, y_train, ridge=[1e-8, 1e-6, 1e-4], washout=100)
        y = esn.predict(x_test)                        # (T,O)

    It follows scikit-learn's conventions (`get_params`, `set_params`, `fit`, `predict`, `score`, clone, grid search)
    without needing scikit-learn; attributes with a trailing underscore exist after a fit. x may be NumPy or torch,
    (T,I) or (B,T,I), or a list of sequences (T_i,I) of any lengths, and what comes back is of the same kind, in
    `dtype`. A list is what so many calls, one after another, would be, each from the state 0. Without a step (T = 0)
    outputs are empty, and the network stays as it was. Reservoir and readout run on the CPU, on one thread in a forked
    process. Several networks are fitted at once by `rnnfast.reservoir.fit_many`; `module` gives a layer that autograd
    goes through.

    Args:
        input_size: I; 0 for a network that is driven by its own output alone (x is None then).
        reservoir_size: H.
        output_size: O.
        spectral_radius: largest modulus of an eigenvalue of W, default 0.9.
        leak: a in (0, 1], default 1: no memory but W's.
        input_scale: W_in is uniform on [-1, 1] times this, default 1. One number, or one for each input.
        bias_scale: b is uniform on [-1, 1] times this, default 0.
        density: share of the recurrent connections that exist, default 0.1. Every unit has round(density * H) of them.
            (A cycle has its own.)
        feedback: W_fb is uniform on [-1, 1] times this, default 0: no feedback.
        noise: standard deviation of the Gaussian noise on the states while fitting, default 0.
        unit: 'tanh' (default), 'relu' or 'identity', the function of the units.
        topology: 'random' (default), or 'cycle': unit j hears unit j - 1 alone, all weights have the same modulus
            (Rodan & Tino 2011). All its eigenvalues lie on one circle, so what is in it fades slowly and evenly: linear
            units then remember about as many inputs as there are units.
        seed: of the weights, default 0. The same seed gives the same weights on every machine: the random numbers to
            the last bit; W is divided by its spectral radius rounded to 10 digits, which hides how machines round.
        dtype: 'float64' (default) or 'float32', of the reservoir; the readout is always fitted in float64.

    Attributes:
        W_out_: (O,Z) NumPy float64, after a fit.
        ridge_: the ridge that was used.
        ridge_errors_: {ridge: mean squared error}, where one of several was chosen.
        state_, output_: (H,), (O,) or (B,H), (B,O), h and y of the last step that was run (of a list: of its last
            sequence).

    Raises:
        ValueError: an argument out of range, or a density that leaves units without recurrent input.

    Sources: H. Jaeger, The "echo state" approach to analysing and training recurrent neural networks, GMD Report 148
    (2001); H. Jaeger, M. Lukosevicius, D. Popovici, U. Siewert, Optimization and applications of echo state networks
    with leaky-integrator neurons, Neural Networks 20 (2007); M. Lukosevicius, A practical guide to applying echo state
    networks (2012); cycles: A. Rodan, P. Tino, Minimum complexity echo state network, IEEE Transactions on Neural
    Networks 22 (2011).
    """

    _ensemble: many.Ensemble | None
    _learner: RecursiveLeastSquares | None
    _noise: np.random.Generator

    # ------------------------------------------------------------------------------------------------------ learning

    def fit(
        self,
        x: Any,
        y: Any,
        ridge: float | Sequence[float] = 1e-6,
        washout: int = 100,
        *,
        validation: tuple[Any, Any] | None = None,
        warm_start: bool = False,
        progress: bool = False,
    ) -> EchoState:
        """Fit the readout. Memory does not grow with T: states are used chunk by chunk and forgotten.

        Args:
            x: (T,I), (B,T,I), or a list of (T_i,I), sequences that each start from the state 0; None if I = 0.
            y: targets, likewise with O.
            ridge: >= 0, default 1e-6; not scaled by the number of rows. Of several the one with the smallest error is
                taken: that of `validation` if given, else the leave-one-out error of the training rows, exact for every
                ridge from one eigendecomposition and a second run of the reservoir. Rows next to each other in time are
                alike, so that leave-one-out errors are optimistic.
            washout: first steps of each sequence that are left out, default 100.
            validation: (x, y) like the training data, washed out alike, predicted with teacher forcing.
            warm_start: add the data to those of earlier fits instead of starting anew, default False.
            progress: show a bar (tqdm), default False.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, a negative ridge, T <= washout.
            numpy.linalg.LinAlgError: the Gram matrix is singular to float64 with this ridge.
        """
        many.fit_many([self], x, y, ridge, washout, validation=validation, warm_start=warm_start, progress=progress)
        return self

    @public
    def partial_fit(
        self, x: Any, y: Any, *, ridge: float = 1e-6, forgetting: float = 1.0, washout: int = 0
    ) -> EchoState:
        """Go on learning, by recursive least squares, from the state at which the last call ended.

        The first call starts from the state 0 and W_out = 0, or from what `fit` has found. With forgetting = 1, any
        number of calls comes to the same W_out as one `fit` on all of the data. With forgetting f < 1, W_out minimises
        sum_i f^(n-i) |y_i - W_out [1, x_i, h_i]|^2 + r |W_out|^2 after n steps. r is ridge f^n, forgotten like old
        data, as long as new data say something about every direction of W_out. While they do not (the input is
        constant, or a sine), r is held between 1e-4 and 1e-3 of `ridge`, so that W_out stays bounded. Which it is, is
        looked at once in the time in which data fade to a weight of 1e-4, but not before 2 Z steps.

        Args:
            x: (T,I), any T, the next steps of one sequence; or a list of (T_i,I), sequences that each start from the
                state 0; None if I = 0.
            y: (T,O), or a list of (T_i,O).
            ridge: of a first call without a `fit` before, > 0, default 1e-6.
            forgetting: weight of a row relative to the next one, in (0, 1], default 1.
            washout: first steps of this call, or of each sequence of a list, that are left out, default 0.

        Raises:
            ValueError: an argument out of range, or data as `fit` refuses them.
        """
        check_range("forgetting", forgetting, above=0, most=1)
        washout = as_count("washout", washout)
        sequences = self._given(x, y)
        for batch, _ in sequences.pairs:
            _targets(batch)
            if len(batch.x) != 1:
                raise ValueError(f"x: expected one sequence (T,{self.input_size}), got {len(batch.x)}")
        goes_on = self._kind is not None and not sequences.listed
        if goes_on and len(self._h) != 1:
            raise ValueError(
                f"partial_fit: expected to go on from one sequence, the last call ended with {len(self._h)}; a list, "
                "such as [x], starts from the state 0"
            )
        starts = [self._start(1, self.state_, self.output_) if goes_on else self._start(1) for _ in sequences.pairs]
        learner = self._learner or self._start_learner(ridge)
        learner.forgetting = float(forgetting)
        for (batch, kind), (h, before) in zip(sequences.pairs, starts, strict=True):
            targets = _targets(batch)
            for X, steps in self._one.features(batch, h, before[0], [self._noise]):
                first = max(0, washout - steps.start)
                learner.add(X[0, 0, first:].double(), targets[0, steps][first:].double())
            self._keep(kind, h[0], targets)
        self._learner = learner
        self.W_out_ = learner.weights.numpy()
        return self

    def _start_learner(self, ridge: float) -> RecursiveLeastSquares:
        if self._sums is not None:
            return RecursiveLeastSquares.resume(self._sums.gram[0], torch.from_numpy(self.W_out_), self.ridge_)
        check_range("ridge", ridge, above=0)
        self.ridge_ = float(ridge)
        return RecursiveLeastSquares.start(self._one.Z, self.output_size, self.ridge_)

    # ------------------------------------------------------------------------------------------------------- running

    @public
    def states(self, x: Any, y: Any = None, *, state: Any = None) -> Any:
        """Drive the reservoir.

        Args:
            x: (T,I), (B,T,I), or a list of (T_i,I), one sequence after another; None if I = 0.
            y: (T,O), (B,T,O), or a list of (T_i,O), what is fed back; needed with feedback.
            state: (H,) or (B,H) to start from, default 0; for a list (H,), or one for each of its sequences.

        Returns:
            (T,H), (B,T,H), or a list of (T_i,H), h_t. `generate` goes on from the last step, of the last sequence if
            there is a list.
        """
        if self.has_feedback and y is None:
            raise ValueError("states: a network with feedback needs y, what is fed back; `generate` feeds back its own")
        sequences = self._given(x, y)
        starts = [
            self._start(len(batch.x), start)
            for (batch, _), start in zip(sequences.pairs, sequences.each("state", state), strict=True)
        ]
        results = []
        for (batch, kind), (h, before) in zip(sequences.pairs, starts, strict=True):
            states = h.new_empty(*batch.x.shape[:2], self.reservoir_size)
            for X, steps in self._one.features(batch, h, before[0]):
                states[:, steps] = X[0, :, :, 1 + self.input_size :]
            if batch.y is not None:
                self._keep(kind, h[0], batch.y)
            elif self.__sklearn_is_fitted__():
                self._keep(kind, h[0], self._read_out(batch.x[:, -1:], states[:, -1:]))
            results.append(states)
        return sequences.back(results)

    @public
    def predict(self, x: Any, *, state: Any = None) -> Any:
        """Outputs (T,O) or (B,T,O) for x (T,I) or (B,T,I), from `state` (H,) or (B,H), default 0. With feedback the
        network's own outputs are fed back, from 0 on.

        For a list of (T_i,I) a list of (T_i,O), as if each had been predicted by a call of its own, from `state` (H,)
        or one for each of them."""
        self._check_fitted()
        sequences = self._given(x, None)
        return sequences.back(self._predict(sequences, state))

    def _predict(self, sequences: Given, state: Any = None) -> list[Tensor]:
        """(B,T,O) for each pair."""
        starts = [
            self._start(len(batch.x), start)
            for (batch, _), start in zip(sequences.pairs, sequences.each("state", state), strict=True)
        ]
        results = []
        for (batch, kind), (h, before) in zip(sequences.pairs, starts, strict=True):
            y = self._loop(batch.x, h, before) if self.has_feedback else many.predict(self._one, batch, h)
            self._keep(kind, h[0], y[0])
            results.append(y[0])
        return results

    @public
    def generate(self, steps: int, x: Any = None, *, state: Any = None, output: Any = None) -> Any:
        """Run in closed loop: what it puts out it gets back at the next step, through W_fb, or, without feedback and
        with as many inputs as outputs, as its input.

        Args:
            steps: how many.
            x: (steps,I), (B,steps,I), or a list of (steps,I), inputs beside the feedback, if there are any.
            state: (H,) or (B,H) to start from, default where the last call ended; for a list (H,), or one for each of
                its sequences.
            output: (O,) or (B,O) at the step before, default likewise.

        Returns:
            (steps,O), (B,steps,O), or a list of (steps,O).

        Raises:
            RuntimeError: the loop has left the finite numbers.
        """
        self._check_fitted()
        steps = as_count("steps", steps, 1)
        if not self.has_feedback and (self.input_size != self.output_size or x is not None):
            raise ValueError(
                "generate: without feedback an output is the next input: expected input_size == output_size and no x, "
                f"got input_size={self.input_size}, output_size={self.output_size}, x={type(x).__name__}"
            )
        if self.has_feedback and self.input_size and x is None:
            raise ValueError(f"x: expected {steps} steps of input_size={self.input_size} numbers, got None")
        if self._kind is None and state is None:
            raise ValueError("generate: expected a state to start from, as no step has been run yet")
        state = self.state_ if state is None else state
        output = (self.output_ if self._kind else None) if output is None else output
        sequences = self._beside(steps, state) if x is None else self._given(x, None)
        starts = []
        each = zip(sequences.pairs, sequences.each("state", state), sequences.each("output", output), strict=True)
        for (batch, _), one_state, one_output in each:
            if batch.x.shape[1] != steps:
                raise ValueError(f"x: expected {steps} steps, got {batch.x.shape[1]}")
            starts.append(self._start(len(batch.x), one_state, one_output))
        results = []
        for (batch, kind), (h, before) in zip(sequences.pairs, starts, strict=True):
            y = self._loop(batch.x, h, before)
            self._keep(kind, h[0], y[0])
            results.append(y[0])
        return sequences.back(results)

    def _beside(self, steps: int, state: Any) -> Given:
        """No inputs beside the feedback, for as many sequences as there are states."""
        start = as_tensor("state", state, DTYPES[self.dtype])
        batched = start.dim() == 2
        x = start.new_zeros(len(start) if batched else 1, steps, 0)
        return Given([(Batch(x, None), Kind.of(state, batched))], False)

    @public
    def score(self, x: Any, y: Any, *, washout: int = 0) -> float:
        """The coefficient of determination R^2 of `predict(x)`, the mean over outputs, as scikit-learn's regressors.

        Args:
            x, y: as for `fit`; of a list all steps count together.
            washout: first steps of each sequence that are left out, default 0.
        """
        self._check_fitted()
        washout = as_count("washout", washout)
        sequences = self._given(x, y)
        targets = [_targets(batch)[:, washout:].double().flatten(0, 1) for batch, _ in sequences.pairs]
        y = torch.cat(targets)  # (n,O)
        if len(y) < 2:
            raise ValueError(f"x: expected more than one step after the washout of {washout}, got {len(y)}")
        inputs = sequences._replace(pairs=[(Batch(batch.x, None), kind) for batch, kind in sequences.pairs])
        predicted = torch.cat([one[:, washout:].double().flatten(0, 1) for one in self._predict(inputs)])
        residual = (y - predicted).square().sum(0)
        total = (y - y.mean(0)).square().sum(0)
        if (total == 0).any():
            raise ValueError("score: an output has the same target everywhere, R^2 is not defined")
        return float((1 - residual / total).mean())

    @public
    def module(self) -> EchoStateLayer:
        """This network as a torch module that autograd goes through: a copy of the weights, the reservoir's
        frozen until `requires_grad_()`. Without feedback only.

            layer = esn.module()
            y, h = layer(x)        # (B,T,O), (B,H), differentiable in x, h_0 and the weights
        """
        self._check_fitted()
        if self.has_feedback:
            raise ValueError(f"module: expected a network without feedback, got feedback={self.feedback}")
        return EchoStateLayer(self)

    # ------------------------------------------------------------------------------------------------------- helpers

    @property
    def _one(self) -> many.Ensemble:
        """This network as an ensemble."""
        if self._ensemble is None:
            self._ensemble = many.Ensemble([self])
        return self._ensemble

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_ensemble": None}  # follows from the arguments

    def _reset(self) -> None:
        super()._reset()
        self._ensemble = self._learner = None
        self._noise = noise_generator(int(self.seed))

    def _fitted(self, sums: Sums, weights: Tensor, ridge: float) -> None:
        super()._fitted(sums, weights, ridge)
        self._learner = None

    def _given(self, x: Any, y: Any) -> Given:
        return given(x, y, self.input_size, self.output_size, DTYPES[self.dtype])

    def _start(self, B: int, state: Any = None, output: Any = None) -> tuple[Tensor, Tensor]:
        """h (1,B,H) and y (1,B,O) to start from; None: zeros."""
        starts = []
        for name, value, width in (("state", state, self.reservoir_size), ("output", output, self.output_size)):
            start = torch.zeros(B, width, dtype=DTYPES[self.dtype], device="cpu")
            if value is not None:
                found = as_tensor(name, value, start.dtype)
                if found.shape not in ((width,), (B, width)):
                    raise ValueError(f"{name}: expected shape ({width},) or ({B},{width}), got {tuple(found.shape)}")
                if not torch.isfinite(found).all():
                    raise ValueError(f"{name}: expected finite numbers, got {found[~torch.isfinite(found)][0]}")
                start.copy_(found)
            starts.append(start[None])
        return starts[0], starts[1]

    def _loop(self, x: Tensor, h: Tensor, y: Tensor) -> Tensor:
        """(1,B,T,O) in closed loop with x (B,T,X); h (1,B,H) in place."""
        out = self._one.bank.loop(x, h, y, self._one.readouts())
        finite = torch.isfinite(out).all(-1).all(0).all(0)  # (T)
        if not finite.all():
            raise RuntimeError(
                f"generate: the closed loop has left the finite numbers at step {int((~finite).nonzero()[0])}"
            )
        return out

    def _read_out(self, x: Tensor, h: Tensor) -> Tensor:
        """(B,T,O) from x (B,T,I), h (B,T,H)."""
        features = torch.cat([x.new_ones(*x.shape[:2], 1), x, h], 2).double()
        return (features @ torch.from_numpy(self.W_out_).T).to(x.dtype)


def _targets(batch: Batch) -> Tensor:
    if batch.y is None:
        raise ValueError("y: expected targets, got None")
    return batch.y
