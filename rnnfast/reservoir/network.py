"""A network: its arguments, its weights, what was fitted, and where the last call ended.

Dims: B sequences, I inputs, H reservoir units, O outputs.
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from rnnfast.init import spectral_radius
from rnnfast.reservoir.bank import DTYPES, UNITS
from rnnfast.reservoir.data import Kind
from rnnfast.reservoir.guard import public
from rnnfast.reservoir.matrix import matrix
from rnnfast.reservoir.readout import Sums
from rnnfast.reservoir.weights import TOPOLOGIES, Drawn, draw

Self = TypeVar("Self", bound="Network")


class Network:
    """What the parts of this package know of an EchoState; its arguments and attributes are described there."""

    W_out_: np.ndarray
    ridge_: float
    ridge_errors_: dict[float, float]
    _drawn: Drawn | None
    _sums: Sums | None
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

    def set_params(self: Self, **params: Any) -> Self:
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
        return self.__dict__ | {"_drawn": None}  # follows from the arguments

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
        return matrix(self.drawn.w.astype(np.float64) * self._scale, self.drawn.starts)

    @property
    def _scale(self) -> float:
        """Of the recurrent weights as they were drawn."""
        return self.spectral_radius / self.drawn.radius

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

    @public
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

    def _reset(self) -> None:
        """Check the arguments, forget all that followed from others."""
        for name in ("input_size", "reservoir_size", "output_size"):
            value, least = getattr(self, name), 0 if name == "input_size" else 1
            if not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        check_range("spectral_radius", self.spectral_radius, above=0)
        check_range("leak", self.leak, above=0, most=1)
        check_range("density", self.density, above=0, most=1)
        for name in ("bias_scale", "feedback", "noise"):
            check_range(name, getattr(self, name), least=0)
        scales = np.asarray(self.input_scale)
        numeric = scales.dtype.kind in "biuf" and np.isfinite(scales).all()
        if not numeric or scales.shape not in ((), (self.input_size,)):
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
        self._drawn = self._sums = self._kind = None

    # ---------------------------------------------------------------------------------------------- fitted and run

    def _fitted(self, sums: Sums, weights: Tensor, ridge: float) -> None:
        self._sums = sums
        self.W_out_, self.ridge_ = weights.numpy(), ridge
        self.__dict__.pop("ridge_errors_", None)

    def _keep(self, kind: Kind, h: Tensor, y: Tensor) -> None:
        """Where a call ended: h (B,H) after the last step, y (B,T,O) of all steps. No step: as before."""
        if y.shape[1]:
            self._kind, self._h, self._y = kind, h, y[:, -1].clone()

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise RuntimeError("This EchoState instance is not fitted yet: call fit first")

    def _last_kind(self) -> Kind:
        if self._kind is None:
            raise AttributeError("state_ and output_ are there after a call of fit, predict, states or generate")
        return self._kind


def check_range(
    name: str, value: float, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    real = isinstance(value, (numbers.Real, Tensor)) and math.isfinite(value)
    if not (real and least <= value <= most and value > above):
        low = f"> {above}" if above > -math.inf else f">= {least}"
        raise ValueError(
            f"{name}: expected a number {low}{f' and <= {most}' if most < math.inf else ''}, got {value!r}"
        )
