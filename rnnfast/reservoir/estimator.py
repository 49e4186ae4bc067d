"""Echo state networks: a fixed random reservoir, and a linear readout that is trained in one linear solve.

Dims: T steps, B sequences, I inputs, H reservoir units, O outputs, Z features = 1 + I + H.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnfast.init import spectral_radius
from rnnfast.reservoir import ensemble as many
from rnnfast.reservoir.bank import DTYPES, UNITS
from rnnfast.reservoir.data import Batch, Kind, as_tensor, batches
from rnnfast.reservoir.layer import EchoStateLayer
from rnnfast.reservoir.readout import RecursiveLeastSquares, Sums
from rnnfast.reservoir.weights import TOPOLOGIES, Drawn, draw, matrix


class EchoState:
    """An echo state network (Jaeger 2001): leaky tanh units with fixed random weights, and a linear readout.

        h_t = (1-a) h_{t-1} + a tanh(W_in x_t + W h_{t-1} + W_fb y_{t-1} + b) + noise_t        y_t = W_out [1, x_t, h_t]

    Only W_out is trained, by ridge regression in float64: (X^T X + ridge I) W_out^T = X^T Y, where a row of X is
    [1, x_t, h_t] and, with feedback, y_{t-1} is the target (teacher forcing). The constant counts as any other feature.

        esn = rnnfast.EchoState(1, 500, 1, spectral_radius=0.9, leak=0.3, seed=0)
        esn.fit(x_train, y_train, ridge=[1e-8, 1e-6, 1e-4], washout=100)
        y = esn.predict(x_test)                        # (T,O)

    It follows scikit-learn's conventions (`get_params`, `set_params`, `fit`, `predict`, `score`, clone, grid search)
    without needing scikit-learn; attributes with a trailing underscore exist after a fit. x may be NumPy or torch,
    (T,I) or (B,T,I), and what comes back is of the same kind, in `dtype`. Reservoir and readout run on the CPU. Several
    networks are fitted at once by `rnnfast.reservoir.fit_many`; `module` gives a layer that autograd goes through.

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
        state_, output_: (H,), (O,) or (B,H), (B,O), h and y of the last step that was run.

    Raises:
        ValueError: an argument out of range, or a density that leaves units without recurrent input.

    Sources: H. Jaeger, The "echo state" approach to analysing and training recurrent neural networks, GMD Report 148
    (2001); H. Jaeger, M. Lukosevicius, D. Popovici, U. Siewert, Optimization and applications of echo state networks
    with leaky-integrator neurons, Neural Networks 20 (2007); M. Lukosevicius, A practical guide to applying echo state
    networks (2012); cycles: A. Rodan, P. Tino, Minimum complexity echo state network, IEEE Transactions on Neural
    Networks 22 (2011).
    """

    W_out_: np.ndarray
    ridge_: float
    ridge_errors_: dict[float, float]
    _drawn: Drawn | None
    _ensemble: many.Ensemble | None
    _sums: Sums | None
    _learner: RecursiveLeastSquares | None
    _noise: np.random.Generator
    _kind: Kind | None  # of the last call; None: nothing has been run
    _h: Tensor  # (B,H) where it ended
    _y: Tensor  # (B,O)

    def __init__(
        self,
        input_size: int,
        reservoir_size: int,
        output_size: int,
        spectral_radius: float = 0.9,
        leak: float = 1.0,
        input_scale: float | Sequence[float] = 1.0,
        bias_scale: float = 0.0,
        density: float = 0.1,
        feedback: float = 0.0,
        noise: float = 0.0,
        unit: str = "tanh",
        topology: str = "random",
        seed: int = 0,
        dtype: str = "float64",
    ) -> None:
        self.input_size = input_size
        self.reservoir_size = reservoir_size
        self.output_size = output_size
        self.spectral_radius = spectral_radius
        self.leak = leak
        self.input_scale = input_scale
        self.bias_scale = bias_scale
        self.density = density
        self.feedback = feedback
        self.noise = noise
        self.unit = unit
        self.topology = topology
        self.seed = seed
        self.dtype = dtype
        self._reset()

    # ------------------------------------------------------------------------------------- scikit-learn's conventions

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor; `deep` is there for scikit-learn."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> EchoState:
        """Change arguments; what was drawn and fitted is forgotten."""
        known = self.get_params()
        for name in params:
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r} for EchoState. Valid parameters are: {sorted(known)}")
        for name, value in params.items():
            setattr(self, name, value)
        self._reset()
        return self

    def __repr__(self) -> str:
        return f"EchoState({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True, multi_output=True, single_output=False),
            regressor_tags=RegressorTags(),
            input_tags=InputTags(two_d_array=True, three_d_array=True),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "W_out_")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ensemble": None, "_drawn": None}  # both follow from the arguments

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
            x: (T,I), any T; None if I = 0.
            y: (T,O).
            ridge: of a first call without a `fit` before, > 0, default 1e-6.
            forgetting: weight of a row relative to the next one, in (0, 1], default 1.
            washout: first steps of this call that are left out, default 0.

        Raises:
            ValueError: an argument out of range, or data as `fit` refuses them.
        """
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting: expected a number in (0, 1], got {forgetting}")
        batch, kind = self._batch(x, y)
        targets = _given(batch.y)
        if len(batch.x) != 1:
            raise ValueError(f"x: expected one sequence (T,{self.input_size}), got {len(batch.x)}")
        learner = self._learner or self._start_learner(ridge)
        h, before = self._start(1, self.state_, self.output_) if self._kind else self._start(1)
        learner.forgetting = forgetting
        noise = [self._noise]
        for X, steps in self._one.features(batch, h, before[0], noise):
            first = max(0, washout - steps.start)
            learner.add(X[0, 0, first:].double(), targets[0, steps][first:].double())
        self._learner = learner
        self.W_out_ = learner.weights.numpy()
        self._keep(kind, h[0], targets[:, -1])
        return self

    def _start_learner(self, ridge: float) -> RecursiveLeastSquares:
        if self._sums is not None:
            return RecursiveLeastSquares.resume(self._sums.gram[0], torch.from_numpy(self.W_out_), self.ridge_)
        if not (math.isfinite(ridge) and ridge > 0):
            raise ValueError(f"ridge: expected a positive number, got {ridge}")
        self.ridge_ = float(ridge)
        return RecursiveLeastSquares.start(self._one.Z, self.output_size, self.ridge_)

    # ------------------------------------------------------------------------------------------------------- running

    def states(self, x: Any, y: Any = None, *, state: Any = None) -> Any:
        """Drive the reservoir.

        Args:
            x: (T,I) or (B,T,I); None if I = 0.
            y: (T,O) or (B,T,O), what is fed back; needed with feedback.
            state: (H,) or (B,H) to start from, default 0.

        Returns:
            (T,H) or (B,T,H), h_t. `generate` goes on from the last step.
        """
        if self.has_feedback and y is None:
            raise ValueError("states: a network with feedback needs y, what is fed back; `generate` feeds back its own")
        batch, kind = self._batch(x, y)
        B, T = batch.x.shape[:2]
        h, before = self._start(B, state)
        states = torch.empty(B, T, self.reservoir_size, dtype=self._one.dtype)
        for X, steps in self._one.features(batch, h, before[0]):
            states[:, steps] = X[0, :, :, 1 + self.input_size :]
        if batch.y is not None:
            self._keep(kind, h[0], batch.y[:, -1])
        elif self.__sklearn_is_fitted__():
            self._keep(kind, h[0], self._read_out(batch.x[:, -1], h[0]))
        return kind.back(states)

    def predict(self, x: Any, *, state: Any = None) -> Any:
        """Outputs (T,O) or (B,T,O) for x (T,I) or (B,T,I), from `state` (H,) or (B,H), default 0. With feedback the
        network's own outputs are fed back, from 0 on."""
        self._check_fitted()
        batch, kind = self._batch(x, None)
        h, before = self._start(len(batch.x), state)
        y = self._loop(batch.x, h, before) if self.has_feedback else many.predict(self._one, batch, h)
        self._keep(kind, h[0], y[0, :, -1])
        return kind.back(y[0])

    def generate(self, steps: int, x: Any = None, *, state: Any = None, output: Any = None) -> Any:
        """Run in closed loop: what it puts out it gets back at the next step, through W_fb, or, without feedback and
        with as many inputs as outputs, as its input.

        Args:
            steps: how many.
            x: (steps,I) or (B,steps,I), inputs beside the feedback, if there are any.
            state: (H,) or (B,H) to start from, default where the last call ended.
            output: (O,) or (B,O) at the step before, default likewise.

        Returns:
            (steps,O) or (B,steps,O).

        Raises:
            RuntimeError: the loop has left the finite numbers.
        """
        self._check_fitted()
        if steps < 1:
            raise ValueError(f"steps: expected a positive number, got {steps}")
        if not self.has_feedback and (self.input_size != self.output_size or x is not None):
            raise ValueError(
                "generate: without feedback an output is the next input: expected input_size == output_size and no x, "
                f"got input_size={self.input_size}, output_size={self.output_size}, x={type(x).__name__}"
            )
        if self.has_feedback and self.input_size and x is None:
            raise ValueError(f"x: expected {steps} steps of input_size={self.input_size} numbers, got None")
        if self._kind is None and state is None:
            raise ValueError("generate: expected a state to start from, as no step has been run yet")
        given = None if x is None else self._batch(x, None)
        if given and given[0].x.shape[1] != steps:
            raise ValueError(f"x: expected {steps} steps, got {given[0].x.shape[1]}")
        state = self.state_ if state is None else state
        output = (self.output_ if self._kind else None) if output is None else output
        B = len(state) if np.ndim(state) == 2 else 1
        h, before = self._start(B, state, output)
        kind = given[1] if given else Kind(isinstance(state, Tensor), np.ndim(state) == 2)
        y = self._loop(given[0].x if given else torch.zeros(B, steps, 0, dtype=self._one.dtype), h, before)
        self._keep(kind, h[0], y[0, :, -1])
        return kind.back(y[0])

    def score(self, x: Any, y: Any, *, washout: int = 0) -> float:
        """The coefficient of determination R^2 of `predict(x)`, the mean over outputs, as scikit-learn's regressors.

        Args:
            x, y: as for `fit`, one array each.
            washout: first steps of each sequence that are left out, default 0.
        """
        batch, _ = self._batch(x, y)
        targets = _given(batch.y)
        if batch.x.shape[1] <= washout + 1:
            raise ValueError(f"x: expected more than one step after the washout of {washout}, got {batch.x.shape[1]}")
        predicted = torch.as_tensor(self.predict(x)).reshape(targets.shape)[:, washout:].double()
        y = targets[:, washout:].double()
        residual = (y - predicted).square().sum((0, 1))
        total = (y - y.mean((0, 1))).square().sum((0, 1))
        if (total == 0).any():
            raise ValueError("score: an output has the same target everywhere, R^2 is not defined")
        return float((1 - residual / total).mean())

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

    # ----------------------------------------------------------------------------------------------- the reservoir

    @property
    def state_(self) -> Any:
        return self._last_kind().back(self._h.clone())

    @property
    def output_(self) -> Any:
        return self._last_kind().back(self._y.clone())

    @property
    def W_(self) -> Any:
        """(H,H) recurrent weights: scipy.sparse.csr_array, or NumPy where every unit hears every unit."""
        return matrix(self.drawn.w * self.spectral_radius, self.drawn.starts)

    @property
    def W_in_(self) -> np.ndarray:
        """(H,I) input weights."""
        return self.drawn.w_in * np.asarray(self.input_scale)

    @property
    def W_fb_(self) -> np.ndarray:
        """(H,O) feedback weights."""
        return self.drawn.w_fb * self.feedback

    @property
    def bias_(self) -> np.ndarray:
        """(H,)"""
        return self.drawn.bias * self.bias_scale

    @property
    def fan_in(self) -> int:
        """Recurrent connections into each unit."""
        return 1 if self.topology == "cycle" else round(self.density * self.reservoir_size)

    @property
    def has_feedback(self) -> bool:
        return self.feedback != 0

    def effective_spectral_radius(self) -> float:
        """The largest modulus of an eigenvalue of (1-a) I + a W, which, not W's, says whether linear units are stable
        (and tanh units near 0)."""
        W = self.W_
        if isinstance(W, np.ndarray):
            eye: Any = np.eye(len(W))
        else:
            from scipy.sparse import eye_array

            eye = eye_array(W.shape[0], format="csr")
        return spectral_radius((1 - self.leak) * eye + self.leak * W)

    def warn_if_unstable(self) -> None:
        """relu and identity have no bound: where (1-a) I + a W has an eigenvalue of modulus 1 or more, states may grow
        without end. For such units only; tanh saturates."""
        if self.unit == "tanh" or 1 - self.leak + self.leak * self.spectral_radius < 1:
            return
        radius = self.effective_spectral_radius()
        if radius >= 1:
            warnings.warn(
                f"{self.unit} units with spectral_radius={self.spectral_radius} and leak={self.leak}: the spectral "
                f"radius of (1-a) I + a W is {radius:.4g}, not below 1, so the states may grow without bound",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def drawn(self) -> Drawn:
        """The weights before scaling."""
        if self._drawn is None:
            sizes = self.input_size, self.reservoir_size, self.output_size
            self._drawn = draw(self.seed, *sizes, self.fan_in, self.topology)
        return self._drawn

    @drawn.setter
    def drawn(self, weights: Drawn) -> None:
        self._drawn = weights

    @property
    def _one(self) -> many.Ensemble:
        """This network as an ensemble."""
        if self._ensemble is None:
            self._ensemble = many.Ensemble([self])
        return self._ensemble

    def _reset(self) -> None:
        """Check the arguments, forget all that followed from others."""
        for name in ("input_size", "reservoir_size", "output_size"):
            value, least = getattr(self, name), 0 if name == "input_size" else 1
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        _check_range("spectral_radius", self.spectral_radius, above=0)
        _check_range("leak", self.leak, above=0, most=1)
        _check_range("density", self.density, above=0, most=1)
        for name in ("bias_scale", "feedback", "noise"):
            _check_range(name, getattr(self, name), least=0)
        scales = np.asarray(self.input_scale, dtype=float)
        if scales.shape not in ((), (self.input_size,)) or not np.isfinite(scales).all():
            raise ValueError(f"input_scale: expected one number or {self.input_size}, finite, got {self.input_scale!r}")
        if self.unit not in UNITS:
            raise ValueError(f"unit: expected one of {list(UNITS)}, got {self.unit!r}")
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology: expected one of {list(TOPOLOGIES)}, got {self.topology!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}")
        if not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed!r}")
        if self.fan_in < 1:
            raise ValueError(
                f"density: {self.density} leaves the {self.reservoir_size} units without recurrent input; expected at "
                f"least {1 / self.reservoir_size:g}"
            )
        for name in ("W_out_", "ridge_", "ridge_errors_"):
            self.__dict__.pop(name, None)
        self._drawn = self._ensemble = self._sums = self._learner = self._kind = None
        self._noise = many.noise_generator(int(self.seed))

    def _fitted(self, sums: Sums, weights: Tensor, ridge: float) -> None:
        self._sums, self._learner = sums, None
        self.W_out_, self.ridge_ = weights.numpy(), ridge
        self.__dict__.pop("ridge_errors_", None)

    def _keep(self, kind: Kind, h: Tensor, y: Tensor) -> None:
        """h (B,H), y (B,O): where the last call ended."""
        self._kind, self._h, self._y = kind, h, y.clone()

    def _batch(self, x: Any, y: Any) -> tuple[Batch, Kind]:
        (pair,) = batches(x, y, self.input_size, self.output_size, self._one.dtype)
        return pair

    def _start(self, B: int, state: Any = None, output: Any = None) -> tuple[Tensor, Tensor]:
        """h (1,B,H) and y (1,B,O) to start from; None: zeros."""
        starts = []
        for name, given, width in (("state", state, self.reservoir_size), ("output", output, self.output_size)):
            if given is None:
                starts.append(torch.zeros(1, B, width, dtype=self._one.dtype))
                continue
            if np.shape(given) not in ((width,), (B, width)):
                raise ValueError(f"{name}: expected shape ({width},) or ({B},{width}), got {tuple(np.shape(given))}")
            start = as_tensor(name, given if np.ndim(given) == 2 else given[None], width, self._one.dtype)  # (1,B,.)
            starts.append(start.expand(1, B, width).clone(memory_format=torch.contiguous_format))
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
        """(B,O) from x (B,I), h (B,H)."""
        features = torch.cat([torch.ones(len(x), 1), x.double(), h.double()], 1)
        return (features @ torch.from_numpy(self.W_out_).T).to(self._one.dtype)

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise RuntimeError("This EchoState instance is not fitted yet: call fit first")

    def _last_kind(self) -> Kind:
        if self._kind is None:
            raise AttributeError("state_ and output_ are there after a call of fit, predict, states or generate")
        return self._kind


def _given(y: Tensor | None) -> Tensor:
    if y is None:
        raise ValueError("y: expected targets, got None")
    return y


def _check_range(
    name: str, value: float, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    if not (math.isfinite(value) and least <= value <= most and value > above):
        low = f"> {above}" if above > -math.inf else f">= {least}"
        raise ValueError(f"{name}: expected a number {low}{f' and <= {most}' if most < math.inf else ''}, got {value}")
