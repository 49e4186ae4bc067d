"""Initialisations for recurrent layers, in place: what makes first-order training of recurrent networks work.

All work on rnnfast's and torch.nn's recurrent layers and cells, for every layer and direction; they run
under no_grad, return their module, and draw from an optional `torch.Generator` (a CPU one, whatever the layer's
device), in float64, so that a seed gives the same weights in every dtype up to rounding.

Weights under torch.nn.utils.parametrize are set through its right inverse. A weight that cannot be set, because a hook
computes it (pruning, the older torch.nn.utils.weight_norm and spectral_norm), a parametrization has no right inverse or
makes something else of the values (spectral_norm unless the norm is 1, orthogonal unless they are), is a ValueError,
and leaves all weights as they were: initialise first, then parametrize or prune.

    rnn = rnnfast.init.echo_state_(rnnfast.RNN(2, 100), input_scale=0.001)
    lstm = rnnfast.init.forget_bias_(rnnfast.LSTM(2, 100), 1.0)

One file, long as it is: all of them read and set weights in the same careful way.

Only `Center` and `output_bias_` look at data: they take a sample of it. `InitialState` is a state to learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "Center",
    "InitialState",
    "chrono_",
    "echo_state_",
    "forget_bias_",
    "identity_",
    "orthogonal_",
    "output_bias_",
    "spectral_radius",
]

DENSE_UP_TO = 200  # rows: so far, all eigenvalues cost less than ARPACK's search for the largest

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

Recurrent = TypeVar("Recurrent", bound=nn.Module)
Linear = TypeVar("Linear", bound=nn.Linear)


class _Weights(NamedTuple):
    """The present weights of one layer and direction, to read; the gates of an LSTM are in torch's order i,f,g,o."""

    suffix: str  # of their names
    w_ih: Tensor  # (G*H,I), I the width of what is below
    w_hh: Tensor  # (G*H,R)
    b_ih: Tensor | None  # (G*H)
    b_hh: Tensor | None  # (G*H)
    w_hr: Tensor | None  # (P,H)

    def zero_biases(self) -> dict[str, Tensor]:
        """What makes the biases zero, if there are any: for `_set`."""
        if self.b_ih is None or self.b_hh is None:
            return {}
        return {
            f"bias_ih{self.suffix}": torch.zeros_like(self.b_ih),
            f"bias_hh{self.suffix}": torch.zeros_like(self.b_hh),
        }


def _layers(rnn: nn.Module) -> Iterator[_Weights]:
    """The weights of each layer and direction, those of the bottom first."""
    if not isinstance(rnn, (RNNBase, RNNCellBase)):
        raise TypeError(f"rnn should be a recurrent layer or cell, got {type(rnn).__name__}")
    suffixes = [""]
    if isinstance(rnn, RNNBase):
        directions = ("", "_reverse") if rnn.bidirectional else ("",)
        suffixes = [f"_l{layer}{direction}" for layer in range(rnn.num_layers) for direction in directions]
    for suffix in suffixes:
        yield _Weights(suffix, *[_present(rnn, name + suffix) for name in _NAMES])  # type: ignore[arg-type]


def _present(module: nn.Module, name: str) -> Tensor | None:
    """The tensor of this name as a call would see it; None if there is none."""
    hook = _hook_of(module, name)
    if hook is not None:
        hook(module, None)
    return getattr(module, name, None)


def _hook_of(module: nn.Module, name: str) -> Any:
    """What computes this tensor before each call, in torch.nn.utils' older ways; None if nothing does."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name:
            return hook
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook
    return None


def _gates(rnn: nn.Module, tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor (G*H,...) by gate, (H,...) each."""
    return tensor.split(cast(int, rnn.hidden_size))


def _lstm_biases(rnn: nn.Module) -> Iterator[tuple[dict[str, Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Copies of b_ih and b_hh of each layer and direction of an LSTM: by name, and each as its gates i,f,g,o, (H)."""
    for layer in _layers(rnn):
        if len(_gates(rnn, layer.w_hh)) != 4:
            raise TypeError(f"rnn should be an LSTM or LSTMCell, which have a forget gate, got {type(rnn).__name__}")
        if layer.b_ih is None or layer.b_hh is None:
            raise ValueError(f"{type(rnn).__name__} has no forget gate bias to set: it was made with bias=False")
        b_ih, b_hh = layer.b_ih.clone(), layer.b_hh.clone()
        values = {f"bias_ih{layer.suffix}": b_ih, f"bias_hh{layer.suffix}": b_hh}
        yield values, _gates(rnn, b_ih), _gates(rnn, b_hh)


def _set(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Gives the module's tensors of these names these values, all of them or none."""
    computed = [name for name in values if parametrize.is_parametrized(module, name)]
    stored = [name for name in values if name not in computed]
    for name in stored:
        _check_is_stored(module, name)
    before = [(ways, deepcopy(ways.state_dict())) for ways in (_ways(module, name) for name in computed)]
    try:
        for name in computed:
            _set_computed(module, name, values[name])
    except BaseException:
        for ways, state in before:
            ways.load_state_dict(state)
        raise
    for name in stored:
        getattr(module, name).copy_(values[name])


def _ways(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    """How torch.nn.utils.parametrize computes the tensor of this name, from what."""
    return cast(Any, module).parametrizations[name]


def _check_is_stored(module: nn.Module, name: str) -> None:
    hook, stored = _hook_of(module, name), module._parameters.get(name, module._buffers.get(name))
    if hook is None and stored is not None and stored.is_leaf:
        return
    by = "" if hook is None else f" by {type(hook).__name__}"
    raise ValueError(
        f"{name} of {type(module).__name__} is computed{by} and cannot be set: initialise the layer before that"
    )


def _set_computed(module: nn.Module, name: str, value: Tensor) -> None:
    """By the right inverse of its parametrizations, if they make this value of it."""
    value = value.to(getattr(module, name), copy=True)
    by = ", ".join(type(way).__name__.lstrip("_") for way in _ways(module, name))
    what = f"{name} of {type(module).__name__} is computed by {by}"
    try:
        setattr(module, name, value.clone())  # which may become the parameter's memory
        found = getattr(module, name)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{what} and cannot be set: {error}") from error
    rounding = math.sqrt(torch.finfo(value.dtype).eps) * float(value.abs().max())
    off = float((found - value).abs().max())
    if not off <= rounding:  # or NaN
        raise ValueError(
            f"{what}, which makes something else of the values to set, off by {off:.3g}: initialise the layer before "
            "that"
        )


# ------------------------------------------------------------------------------------------ recurrent weights


@torch.no_grad()
def echo_state_(
    rnn: Recurrent,
    spectral_radius: float = 1.1,
    nonzero: int = 15,
    input_scale: float = 0.1,
    generator: Generator | None = None,
) -> Recurrent:
    """Sparse recurrent weights of a given spectral radius, as in an echo state network.

    Every unit gets `nonzero` incoming recurrent weights from N(0,1), and the matrix is scaled to `spectral_radius`. The
    input weights are dense, from N(0,1) times `input_scale`; the biases are zero. At a spectral radius a little above 1
    the states neither die out nor turn chaotic at once, and gradients reach far back before training has begun. Large
    input weights overwrite what the states hold; small ones take long to be noticed.

    An LSTM has four recurrent matrices, a GRU three; each gate's is drawn and scaled on its own, independently of the
    others. If the layer projects, h_t = W_hr m_t, then what goes around the loop is W_hr times the gate's matrix, and
    that product (P,P) gets the spectral radius; W_hr itself stays as it is.

    Source: Sutskever, Martens, Dahl & Hinton (2013), On the importance of initialization and momentum in deep
    learning, section 4 and table 4: H=100 tanh units, 15 incoming weights, spectral radius 1.1, input scale 0.001 for
    addition and multiplication, 0.1 for memorisation. Their output weights, which are not this layer's, are 0.1 N(0,1),
    and the output bias is the mean target (`output_bias_`).

    Args:
        rnn: a recurrent layer or cell of rnnfast or torch.nn.
        spectral_radius: largest modulus of an eigenvalue of the recurrent weights, default 1.1.
        nonzero: incoming recurrent weights of a unit, default 15.
        input_scale: standard deviation of the input weights (every layer's), default 0.1. Depends on the task.
        generator: where the weights are drawn from, default torch's global one.

    Raises:
        TypeError: `rnn` is no such layer.
        ValueError: spectral_radius not positive, nonzero below 1 or above the units there are, input_scale negative, or
            recurrent weights that cannot be scaled because their spectral radius is 0.
        ImportError: more than 200 units, and no scipy.
    """
    if not (math.isfinite(spectral_radius) and spectral_radius > 0):
        raise ValueError(f"spectral_radius should be a positive number, got {spectral_radius}")
    if not (math.isfinite(input_scale) and input_scale >= 0):
        raise ValueError(f"input_scale should be a number >= 0, got {input_scale}")
    values: dict[str, Tensor] = {}
    for layer in _layers(rnn):
        values[f"weight_ih{layer.suffix}"] = input_scale * _normal(layer.w_ih, generator)
        values |= layer.zero_biases()
        blocks = []
        for block in _gates(rnn, layer.w_hh):  # (H,R)
            w = _sparse(block.size(0), block.size(1), nonzero, generator)  # (H,R)
            loop = w if layer.w_hr is None else layer.w_hr.to(w) @ w  # (R,R)
            radius = _spectral_radius(loop)
            if radius == 0:
                raise ValueError(
                    f"recurrent weights of {type(rnn).__name__} have spectral radius 0 and cannot be scaled to "
                    f"{spectral_radius}" + ("" if layer.w_hr is None else ": is weight_hr zero?")
                )
            blocks.append(w * (spectral_radius / radius))
        values[f"weight_hh{layer.suffix}"] = torch.cat(blocks)
    _set(rnn, values)
    return rnn


@torch.no_grad()
def identity_(rnn: Recurrent, scale: float = 1.0) -> Recurrent:
    """Recurrent weights `scale` times the identity, and zero biases: without input the state stays as it is.

    Meant for RNN(nonlinearity='relu'): the "IRNN" of Le, Jaitly & Hinton (2015), A simple way to initialize recurrent
    networks of rectified linear units. Smaller scales forget sooner. In an LSTM each gate's matrix becomes `scale`
    times the identity ((H,P), ones where the row is the column, if it projects). Input weights stay as they are.

    Raises:
        TypeError: `rnn` is no recurrent layer or cell.
    """
    values: dict[str, Tensor] = {}
    for layer in _layers(rnn):
        blocks = _gates(rnn, layer.w_hh)  # (H,R) each
        identity = scale * torch.eye(*blocks[0].shape, dtype=torch.float64, device="cpu")
        values |= layer.zero_biases() | {f"weight_hh{layer.suffix}": identity.repeat(len(blocks), 1)}
    _set(rnn, values)
    return rnn


@torch.no_grad()
def orthogonal_(rnn: Recurrent, gain: float = 1.0, generator: Generator | None = None) -> Recurrent:
    """Recurrent weights random orthogonal times `gain`, gate by gate: all singular values of each block are `gain`.

    torch.nn.init.orthogonal_ on the whole (4H,H) of an LSTM would make its columns orthonormal, and each gate's block
    half as large; so each gate's (H,R) is drawn on its own. Input weights and biases stay as they are.

    Source: Saxe, McClelland & Ganguli (2014), Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks.

    Raises:
        TypeError: `rnn` is no recurrent layer or cell.
    """
    values: dict[str, Tensor] = {}
    for layer in _layers(rnn):
        drawn = torch.empty(layer.w_hh.shape, dtype=torch.float64, device="cpu")
        for block in _gates(rnn, drawn):  # (H,R)
            nn.init.orthogonal_(block, gain, generator=generator)
        values[f"weight_hh{layer.suffix}"] = drawn
    _set(rnn, values)
    return rnn


# ------------------------------------------------------------------------------------------ gate biases


@torch.no_grad()
def forget_bias_(rnn: Recurrent, value: float = 1.0) -> Recurrent:
    """The forget gates' bias: `value` in b_ih and 0 in b_hh, as the gate sees their sum.

    With 1 a unit keeps s(1) = 0.73 of its cell a step, with torch's own initialisation about 1/2. The other gates'
    biases stay as they are.

    Source: Gers, Schmidhuber & Cummins (2000), Learning to forget; Jozefowicz, Zaremba & Sutskever (2015), An empirical
    exploration of recurrent network architectures.

    Raises:
        TypeError: `rnn` is no LSTM or LSTMCell.
        ValueError: it has no biases.
    """
    values: dict[str, Tensor] = {}
    for biases, b_ih, b_hh in _lstm_biases(rnn):
        b_ih[1].fill_(value)
        b_hh[1].zero_()
        values |= biases
    _set(rnn, values)
    return rnn


@torch.no_grad()
def chrono_(rnn: Recurrent, t_max: float, generator: Generator | None = None) -> Recurrent:
    """Biases of forget and input gates for dependencies of up to `t_max` steps.

        b_f = log u, u ~ U(1, t_max - 1)        b_i = -b_f        so 1 / (1 - s(b_f)) = 1 + u steps of memory

    They stand in b_ih, with 0 in b_hh; the biases of g and o stay as they are.

    Source: Tallec & Ollivier (2018), Can recurrent neural networks warp time?

    Args:
        rnn: an LSTM or LSTMCell.
        t_max: longest expected dependency in steps, above 2.
        generator: where u is drawn from, default torch's global one.

    Raises:
        TypeError: `rnn` is no LSTM or LSTMCell.
        ValueError: it has no biases, or t_max <= 2.
    """
    if not (math.isfinite(t_max) and t_max > 2):
        raise ValueError(f"t_max should be a number of steps above 2, got {t_max}")
    values: dict[str, Tensor] = {}
    for biases, b_ih, b_hh in _lstm_biases(rnn):
        u = torch.empty(b_ih[1].shape, dtype=torch.float64, device="cpu").uniform_(1, t_max - 1, generator=generator)
        b_ih[1].copy_(u.log())
        b_ih[0].copy_(-u.log())
        b_hh[0].zero_()
        b_hh[1].zero_()
        values |= biases
    _set(rnn, values)
    return rnn


# ------------------------------------------------------------------------------------------ state, inputs, outputs


class InitialState(nn.Module):
    """A learned initial state for a recurrent layer or cell, the same for every sequence; the default state is zero.

        state = rnnfast.init.InitialState(lstm)
        output, (h, c) = lstm(x, state(x.size(1)))  # x (T,B,I)
        optimizer = torch.optim.Adam([*lstm.parameters(), *state.parameters()])

    Where sequences begin in the middle of something, or a network without input should not start from rest. The code
    that Martens & Sutskever (2011) released learns one, from N(0,1/15).

    Parameters, of the dtype and on the device of the layer's weights:
        h_0: (L*D,1,R), R the size of h: P if the layer projects, else H. A cell's: (1,H).
        c_0: (L*D,1,H), for an LSTM only. A cell's: (1,H).

    Args:
        rnn: an RNN, LSTM or GRU layer or cell, of rnnfast or torch.nn; it is not kept.
        std: of the normal distribution that the states are drawn from, default 0: zeros.
        generator: where they are drawn from, default torch's global one.

    Inputs: how many sequences, B; None for one without a batch dimension.
    Outputs: the layer's `hx`: h_0 (L*D,B,R), for an LSTM (h_0, c_0 (L*D,B,H)); (L*D,R) and (L*D,H) for None. Those of a
    cell lack the dimension L*D.

    Raises:
        TypeError: `rnn` is none of these.
        ValueError: std negative or not finite.
    """

    h_0: Tensor
    c_0: Tensor | None

    def __init__(self, rnn: nn.Module, std: float = 0.0, generator: Generator | None = None) -> None:
        super().__init__()
        if not isinstance(rnn, (RNNBase, RNNCellBase)):
            raise TypeError(f"rnn should be an RNN, LSTM or GRU layer or cell, got {type(rnn).__name__}")
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std should be a number >= 0, got {std}")
        layers: tuple[int, ...] = ()
        R = H = cast(int, rnn.hidden_size)
        if isinstance(rnn, RNNBase):
            layers, R = (rnn.num_layers * (1 + rnn.bidirectional),), rnn.proj_size or H

        def drawn(width: int) -> nn.Parameter:
            values = torch.empty(*layers, 1, width, dtype=torch.float64, device="cpu")
            return nn.Parameter(values.normal_(0, std, generator=generator).to(next(rnn.parameters())))

        self.h_0 = drawn(R)
        self.register_parameter("c_0", drawn(H) if isinstance(rnn, (nn.LSTM, nn.LSTMCell)) else None)

    def forward(self, batch: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        h_0, c_0 = self.h_0, self.c_0
        return _batched(h_0, batch) if c_0 is None else (_batched(h_0, batch), _batched(c_0, batch))


def _batched(state: Tensor, batch: int | None) -> Tensor:
    """(...,1,H) -> (...,B,H), or (...,H)"""
    if batch is None:
        return state.squeeze(-2)
    return state.expand(*state.shape[:-2], batch, state.size(-1)).contiguous()


class Center(nn.Module):
    """Subtracts from its input the mean of a sample: put it in front of the recurrent layer.

    Inputs of non-zero mean push all states the same way at every step; Sutskever et al. (2013), section 4, found
    centring needed for the multiplication problem. The mean is a buffer: saved with the model, never trained.

    Args:
        sample: (...,I), floating point, as large as you like; its mean over all but the last dimension is kept.

    Inputs: (...,I). Outputs: likewise.

    Raises:
        ValueError: the sample is empty or its mean not finite.
    """

    mean: Tensor  # (I)

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", _finite_mean(sample))

    def forward(self, input: Tensor) -> Tensor:
        return input - self.mean


@torch.no_grad()
def output_bias_(readout: Linear, targets: Tensor) -> Linear:
    """Set the bias of an output layer so that without any input it predicts the mean target.

    The dtype of the targets tells what the outputs mean:

        floating point (...,O)   values, squared error        b = mean
        bool (...,O)             logits, logistic loss        b = log(p / (1 - p)), p the share of True
        integer (...)            class logits, cross-entropy  b = log p_k, p_k the frequency of class k

    Frequencies count one extra example of each kind, so that what the sample lacks is improbable, not impossible.
    Learning the mean first costs gradient descent with momentum large oscillations (Sutskever et al. 2013, section 4).

    Args:
        readout: a Linear layer with O outputs and a bias.
        targets: a sample of targets.

    Raises:
        TypeError: `readout` is no torch.nn.Linear.
        ValueError: it has no bias, the targets have another width, none is given, or some are not finite or no class.
    """
    if not isinstance(readout, nn.Linear):
        raise TypeError(f"readout should be a torch.nn.Linear, got {type(readout).__name__}")
    if readout.bias is None:
        raise ValueError("readout has no bias to set: it was made with bias=False")
    O = readout.out_features  # noqa: E741
    classes = not targets.dtype.is_floating_point and targets.dtype != torch.bool
    if not classes and (targets.numel() == 0 or targets.dim() == 0 or targets.size(-1) != O):
        raise ValueError(f"targets should be (...,{O}) and not empty, got shape {tuple(targets.shape)}")
    if classes:
        if targets.numel() == 0 or targets.min() < 0 or targets.max() >= O:
            raise ValueError(f"targets should be classes 0 to {O - 1}, got {_range(targets)}")
        bias = ((torch.bincount(targets.flatten(), minlength=O) + 1).double() / (targets.numel() + O)).log()
    elif targets.dtype == torch.bool:
        true, rows = targets.reshape(-1, O).sum(dim=0), targets.numel() // O
        bias = ((true + 1).double() / (rows - true + 1)).log()
    else:
        bias = _finite_mean(targets)
    _set(readout, {"bias": bias})
    return readout


def _finite_mean(sample: Tensor) -> Tensor:
    """(...,I) -> (I)"""
    if sample.numel() == 0 or sample.dim() == 0:
        raise ValueError(f"sample should be (...,I) and not empty, got shape {tuple(sample.shape)}")
    mean = sample.reshape(-1, sample.size(-1)).mean(dim=0)
    if not mean.isfinite().all():
        raise ValueError(f"sample should be finite, got a mean of {mean.tolist()}")
    return mean


def _range(values: Tensor) -> str:
    return "none" if values.numel() == 0 else f"{int(values.min())} to {int(values.max())}"


# ------------------------------------------------------------------------------------------ random matrices


def spectral_radius(matrix: Any) -> float:
    """Largest modulus of an eigenvalue of a square matrix, in float64.

    Up to 200 rows from all eigenvalues; above by ARPACK (scipy.sparse.linalg.eigs) on the non-zero elements, started
    from a fixed vector so that the answer is always the same. Where ARPACK does not converge, from all eigenvalues.

    Args:
        matrix: (H,H), a Tensor, NumPy array, or scipy.sparse matrix or array.

    Raises:
        ValueError: not square, or not finite.
        ImportError: more than 200 rows and no scipy.
    """
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().cpu().double().numpy()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"matrix should be square, got shape {tuple(matrix.shape)}")
    dense = isinstance(matrix, np.ndarray)
    if not np.isfinite(matrix if dense else matrix.data).all():
        raise ValueError("matrix should be finite, got inf or NaN")
    largest = None
    if matrix.shape[0] > DENSE_UP_TO:
        largest = _arpack_radius(matrix)
    if largest is None:
        largest = np.abs(np.linalg.eigvals(matrix if dense else matrix.toarray())).max()
    return float(largest)


_spectral_radius = spectral_radius  # an argument of `echo_state_` has the same name


def _arpack_radius(matrix: Any) -> float | None:
    """None where ARPACK does not converge."""
    try:
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError(
            f"the spectral radius of {matrix.shape[0]} units needs scipy: pip install 'rnnfast[learn]'"
        ) from error
    sparse = csr_array(matrix, dtype=np.float64, copy=True)  # counting sorts its elements in place
    return 0.0 if sparse.count_nonzero() == 0 else radius_of_products(sparse)


def radius_of_products(operator: Any) -> float | None:
    """Of what multiplies vectors, a LinearOperator or sparse array of scipy's; None where ARPACK does not converge."""
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigs

    H = operator.shape[0]
    start = np.random.default_rng(0).standard_normal(H)
    try:
        # The eigenvalues of random matrices fill a disc: some more of them, and more vectors than the default, find
        # its rim sooner.
        values = eigs(operator, k=4, ncv=min(H, 60), v0=start, return_eigenvectors=False, maxiter=100 * H)
    except (ArpackNoConvergence, ArpackError):
        return None
    return np.abs(values).max()


def _normal(like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64, device="cpu", generator=generator)


def _sparse(rows: int, columns: int, nonzero: int, generator: Generator | None) -> Tensor:
    """(rows,columns) with `nonzero` elements a row from N(0,1), in places drawn without replacement."""
    if not 1 <= nonzero <= columns:
        raise ValueError(f"nonzero should be 1 to {columns}, the units that a unit can listen to, got {nonzero}")
    order = torch.rand(rows, columns, dtype=torch.float64, device="cpu", generator=generator)
    places = order.topk(nonzero, dim=1).indices  # (rows,nonzero)
    values = torch.randn(rows, nonzero, dtype=torch.float64, device="cpu", generator=generator)
    return torch.zeros(rows, columns, dtype=torch.float64, device="cpu").scatter_(1, places, values)
