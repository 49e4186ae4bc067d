"""Second derivatives, forward mode, vmap and compilation of the op, against finite differences and torch's layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from cases import GRADCHECK_CASES, Case, make_inputs
from test_gradcheck import op_of
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import rnnfast
from rnnfast import fallback
from rnnfast._autograd import op
from rnnfast._backends import composite, cpu
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.types import Constants, Inputs, Stack

# relu has no second derivative where finite differences look across its bend
SMOOTH_CASES = [case for case in GRADCHECK_CASES if case.mode != "RNN_RELU"]
EXAMPLES = [
    Case("LSTM", T=5, B=3, I=3, H=6, L=2, D=2),
    Case("LSTM", T=5, B=3, I=3, H=6, L=2, D=2, proj=4, bias=False),
    Case("LSTM", T=5, B=3, I=3, H=6, L=2, D=2, lengths=(5, 3, 2)),
    Case("RNN_TANH", T=5, B=3, I=3, H=6, L=2, D=2),
    Case("RNN_RELU", T=5, B=3, I=3, H=6, L=2, lengths=(5, 3, 2)),
]
every_example = pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.id)


def torch_op(case: Case) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The same function as op_of gives, by torch's own operators: layer by layer, the dropout masks in between."""
    inputs = make_inputs(case)
    packed = () if inputs.packed is None else (inputs.packed.batch_sizes,)
    function = getattr(torch._VF, case.mode.lower())

    def op(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = (2 if case.mode == "LSTM" else 1) if case.hx else 0
        per, lasts = len(rest[states:]) // case.L, []
        zeros = [
            x.new_zeros(case.L * case.D, case.B, size)
            for size in ([case.R, case.H] if case.mode == "LSTM" else [case.H])
        ]
        for layer in range(case.L):
            hx = [state[layer * case.D : (layer + 1) * case.D] for state in rest[:states] or zeros]
            weights = list(rest[states + layer * per : states + (layer + 1) * per])
            arguments = (weights, case.bias, 1, 0.0, False, case.D == 2)
            x, *last = function(x, *packed, hx if len(hx) == 2 else hx[0], *arguments, *(() if packed else (False,)))
            lasts.append(last)
            if inputs.dropout_masks is not None and layer < case.L - 1:
                x = x * inputs.dropout_masks[layer]
        return x, *(torch.cat(one) for one in zip(*lasts, strict=True))

    return op


def leaves_of(case: Case) -> tuple[list[torch.Tensor], Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Inputs, and one smooth number of all outputs by rnnfast and by torch."""
    leaves, op = op_of(case, make_inputs(case))
    truth = torch_op(case)

    def loss_of(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
        return lambda *values: sum(output.sin().sum() for output in function(*values))

    return list(leaves.values()), loss_of(op), loss_of(truth)


def assert_equal(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", SMOOTH_CASES[::7], ids=lambda case: case.id)
def test_finite_differences(case: Case) -> None:
    leaves, op = op_of(case, make_inputs(case))
    values = [leaf.requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(
        op, values, check_forward_ad=True, check_backward_ad=False, check_batched_grad=False
    )
    assert torch.autograd.gradgradcheck(op, values)


@every_example
def test_directional_derivatives(case: Case) -> None:
    """Forward mode, and the Hessian along a direction in all three orders of the modes."""
    values, loss, truth = leaves_of(case)
    every = tuple(range(len(values)))
    torch.manual_seed(0)
    direction = tuple(torch.randn_like(value) for value in values)

    def slope(*at: torch.Tensor) -> torch.Tensor:
        return sum((g * v).sum() for g, v in zip(grad(loss, every)(*at), direction, strict=True))

    at = [value.clone().requires_grad_() for value in values]  # torch's packed operators know no torch.func
    gradients = torch.autograd.grad(truth(*at), at, create_graph=True)
    want = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
    curved = torch.autograd.grad(want, at)

    torch.testing.assert_close(jvp(loss, tuple(values), direction)[1], want.detach(), rtol=1e-12, atol=1e-12)
    assert_equal(jvp(lambda *at: grad(loss, every)(*at), tuple(values), direction)[1], curved)
    assert_equal(grad(slope, every)(*values), curved)
    assert_equal(grad(lambda *at: jvp(loss, at, direction)[1], every)(*values), curved)


@every_example
@pytest.mark.parametrize("inner", ["forward", "reverse"])
def test_backward_through_a_transform(case: Case, inner: str) -> None:
    """torch.func's derivative in x, and plain autograd in everything through that."""
    values, loss, _ = leaves_of(case)
    direction = torch.randn_like(values[0])

    def slope(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if inner == "forward":
            return jvp(lambda x: loss(x, *rest), (x,), (direction,))[1]
        return (grad(lambda x: loss(x, *rest))(x) * direction).sum()

    want = grad(slope, tuple(range(len(values))))(*values)
    at = [value.clone().requires_grad_() for value in values]
    assert_equal(torch.autograd.grad(slope(*at), at), want)
    with torch.no_grad():
        assert not slope(*at).requires_grad


@every_example
@pytest.mark.parametrize("way", ["once", "for more", "from a dual level"])
def test_double_backward_with_create_graph(case: Case, way: str) -> None:
    """The gradient of the gradients' squares; where that could be differentiated again; of a call that forward mode has
    seen."""
    values, loss, truth = leaves_of(case)
    penalties = []
    for function in (loss, truth):
        at = [value.clone().requires_grad_() for value in values]
        with forward_ad.dual_level() if way == "from a dual level" and function is loss else nullcontext():
            number = function(*at)
        grads = torch.autograd.grad(number, at, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        penalties.append(torch.autograd.grad(penalty, at, create_graph=way == "for more"))
    assert_equal(*penalties)


@every_example
def test_double_backward_of_a_part(case: Case) -> None:
    """Cotangents that are constant, as those of a sum; gradients of one input along another; one call or two behind."""
    values, _, _ = leaves_of(case)
    functions = op_of(case, make_inputs(case))[1], torch_op(case)

    def mixed(function: Callable[..., tuple[torch.Tensor, ...]], i: int, j: int) -> torch.Tensor:
        at = [value.clone().requires_grad_(k in (i, j)) for k, value in enumerate(values)]
        y = function(*at)[0]
        (g,) = torch.autograd.grad(y.sum(), at[i], create_graph=True)
        torch.autograd.grad(g.sum(), at[j], retain_graph=True)  # leaves nothing behind
        (more,) = torch.autograd.grad(y.square().sum(), at[i], create_graph=True)
        return torch.autograd.grad(g.sum() + more.sin().sum(), at[j])[0]

    last = len(values) - 1  # of a projection, or a bias
    for i, j in ((0, last), (last, 0), (last, 3), (3, 0), (1, 3)):
        torch.testing.assert_close(mixed(functions[0], i, j), mixed(functions[1], i, j), rtol=1e-10, atol=1e-10)


@every_example
@pytest.mark.parametrize("moved", [(0,), (1,), (0, 1, 2)], ids=["x", "h0", "x and states"])
def test_forward_mode_alone(case: Case, moved: tuple[int, ...], monkeypatch) -> None:
    """Without a graph and with the weights at rest, values and tangents come out of one pass: the same as of two."""
    values, _, _ = leaves_of(case)
    _, op = op_of(case, make_inputs(case))
    moved = moved[: 3 if case.mode == "LSTM" else 2]
    at, along = tuple(values[k] for k in moved), tuple(torch.randn_like(values[k]) for k in moved)

    def function(*some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(moved, some, strict=True))
        return op(*(given.get(k, value) for k, value in enumerate(values)))

    values[-1].requires_grad_()  # so that a graph is recorded, and the tangents are those of a finished pass
    want = [tuple(t.detach() for t in some) for some in jvp(function, at, along)]
    monkeypatch.delattr(cpu, "tangent")  # not to be called
    with torch.no_grad():
        assert_equal(sum(jvp(function, at, along), ()), sum(want, ()))
        with forward_ad.dual_level():
            duals = function(*(forward_ad.make_dual(*pair) for pair in zip(at, along, strict=True)))
            got = [tuple(some) for some in zip(*map(forward_ad.unpack_dual, duals), strict=True)]
    assert_equal(sum(got, ()), sum(want, ()))


@every_example
def test_forward_mode_with_more_around_it(case: Case) -> None:
    """Along x alone, where another transform needs what a pass by itself would not have kept."""
    values, loss, truth = leaves_of(case)
    x, rest = values[0], values[1:]
    along = torch.randn_like(x)
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(truth(at, *rest), at, create_graph=True)
    (curved,) = torch.autograd.grad((slope * along).sum(), at)

    def one(x: torch.Tensor) -> torch.Tensor:
        return loss(x, *rest)

    with torch.no_grad():
        torch.testing.assert_close(jvp(grad(one), (x,), (along,))[1], curved, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad(lambda x: jvp(one, (x,), (along,))[1])(x), curved, rtol=1e-10, atol=1e-10)
        slopes = vmap(lambda v: jvp(one, (x,), (v,))[1])(torch.stack([along, -along]))
        number = (slope.detach() * along).sum()
        torch.testing.assert_close(slopes, torch.stack([number, -number]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [Case("LSTM", T=2, B=2, I=2, H=3, D=2), Case("RNN_TANH", T=3, B=1, I=2, H=3, L=2)])
def test_jacobians(case: Case) -> None:
    values, _, _ = leaves_of(case)
    _, op = op_of(case, make_inputs(case))
    for i in (0, 1, len(values) - 1):  # x, h0, the last weight

        def one(value: torch.Tensor, function: Callable, i: int = i) -> torch.Tensor:
            return function(*values[:i], value, *values[i + 1 :])[0]

        want = torch.autograd.functional.jacobian(lambda v: one(v, torch_op(case)), values[i])
        torch.testing.assert_close(jacrev(lambda v: one(v, op))(values[i]), want)
        torch.testing.assert_close(jacfwd(lambda v: one(v, op))(values[i]), want)


def test_hessian() -> None:
    case = Case("LSTM", T=3, B=1, I=2, H=4, L=2)
    values, loss, truth = leaves_of(case)
    for i in (0, 3):
        at = [lambda v, f=f, i=i: f(*values[:i], v, *values[i + 1 :]) for f in (loss, truth)]
        want = torch.autograd.functional.hessian(at[1], values[i])
        torch.testing.assert_close(hessian(at[0])(values[i]), want)
        torch.testing.assert_close(jacrev(jacrev(at[0]))(values[i]), want)
        torch.testing.assert_close(torch.autograd.functional.hessian(at[0], values[i]), want)


# ------------------------------------------------------------------------------ where no kernel goes on

SMALL = [
    Case("LSTM", T=3, B=2, I=2, H=3, L=2, dropout=0.5),
    Case("LSTM", T=3, B=2, I=2, H=3, D=2, proj=2, bias=False, lengths=(3, 1)),
    Case("LSTM", T=3, B=2, I=2, H=3, hx=False),
    Case("RNN_TANH", T=3, B=2, I=2, H=3, L=2, D=2, lengths=(1, 3), dropout=0.5),
    Case("RNN_RELU", T=3, B=2, I=2, H=3, L=2),
]
every_small = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)


def slope(f: Callable, direction: tuple[torch.Tensor, ...], mode: str) -> Callable:
    """The derivative of f along a direction: by torch.func in forward or reverse mode, or by autograd."""

    def along(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))

    return {
        "f": lambda *at: jvp(f, at, direction)[1],
        "r": lambda *at: along(grad(f, tuple(range(len(at))))(*at)),
        "a": lambda *at: along(torch.autograd.grad(f(*at), at, create_graph=True)),
    }[mode]


@every_small
@pytest.mark.parametrize("modes", ["aa", "rr", "ff", "rf", "fr", "aaa", "frf"])
def test_higher_derivatives(case: Case, modes: str) -> None:
    """Of third and fourth order: all but the last along a direction, the last in both modes."""
    values, *functions = leaves_of(case)
    torch.manual_seed(0)
    direction = tuple(torch.randn_like(value) for value in values)
    at = [value.clone().requires_grad_() for value in values]
    gradients, numbers = [], []
    for function, ways in zip(functions, (modes, "a" * len(modes)), strict=True):
        for mode in ways:
            function = slope(function, direction, mode)
        numbers.append(function)
        gradients.append(torch.autograd.grad(function(*at), at))
    assert_equal(*gradients)
    if "a" not in modes:
        assert_equal(grad(numbers[0], tuple(range(len(at))))(*values), gradients[1])
        along = sum((g * v).sum() for g, v in zip(gradients[1], direction, strict=True))
        torch.testing.assert_close(jvp(numbers[0], tuple(values), direction)[1], along, rtol=1e-10, atol=1e-10)


@every_small
@pytest.mark.parametrize("i", [0, 1, 2, -1])
def test_hessians_by_every_way(case: Case, i: int) -> None:
    values, *functions = leaves_of(case)
    one, truth = (
        lambda v, f=f: f(*[v if k == i % len(values) else u for k, u in enumerate(values)]) for f in functions
    )
    value, direction = values[i], torch.randn_like(values[i])
    of = torch.autograd.functional
    want = of.hessian(truth, value)
    got = [
        of.hessian(one, value, vectorize=True, outer_jacobian_strategy=f"{mode}-mode")
        for mode in ("reverse", "forward")
    ]
    got += [transform(one)(value) for transform in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f)))]
    for some in got:
        torch.testing.assert_close(some, want, rtol=1e-10, atol=1e-10)
    curved = (want.reshape(value.numel(), -1) @ direction.flatten()).view_as(value)
    torch.testing.assert_close(of.hvp(one, value, direction)[1], curved, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(of.vhp(one, value, direction)[1], curved, rtol=1e-10, atol=1e-10)


def test_one_warning_where_torch_takes_over(weights, monkeypatch) -> None:
    monkeypatch.setattr(fallback, "_warned", set())
    x = torch.randn(3, 1, 3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(fallback.FallbackWarning) as caught:
        for _ in range(2):
            number = layer_loss(weights, x)
            for _ in range(3):
                (g,) = torch.autograd.grad(number, x, create_graph=True)
                number = g.sin().sum()
            jvp(lambda x: jvp(lambda x: layer_loss(weights, x), (x,), (x,))[1], (x,), (x,))
    assert [str(one.message).split(";")[0].removeprefix("rnnfast has no kernel for ") for one in caught] == [
        "third derivatives",
        "forward mode over forward mode",
    ]


@every_example
def test_hessian_vector_products_by_kernels(case: Case, monkeypatch) -> None:
    """By differentiating a third time, in what the second derivative is linear in."""
    values, loss, truth = leaves_of(case)
    direction = tuple(torch.randn_like(value) for value in values)
    want = torch.autograd.functional.vhp(truth, tuple(values), direction)[1]
    monkeypatch.delattr(composite, "with_tangents")  # not to be called
    assert_equal(torch.autograd.functional.hvp(loss, tuple(values), direction)[1], want)


@pytest.mark.parametrize("case", [SMALL[3], SMALL[4]], ids=lambda case: case.id)
def test_higher_derivatives_of_samples(case: Case) -> None:
    """vmap over those that torch's operators compute, and forward mode over gradients of samples."""
    (x, *rest), loss, _ = leaves_of(case)
    xs, vs = torch.randn(2, 3, *x.shape, dtype=x.dtype)

    def third(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return grad(slope(slope(lambda x: loss(x, *rest), (v,), "r"), (v,), "f"))(x)

    assert_equal(vmap(third)(xs, vs), tuple(map(third, xs, vs)))
    every = grad(lambda x, *rest: loss(x, *rest), tuple(range(1 + len(rest))))
    with forward_ad.dual_level():
        duals = vmap(every, (0, *[None] * len(rest)))(forward_ad.make_dual(xs, vs), *rest)
        tangents = [forward_ad.unpack_dual(dual).tangent for dual in duals]
    for k in range(3):
        want = jvp(lambda x: every(x, *rest), (xs[k],), (vs[k],))[1]
        assert_equal(tuple(t[k] for t in tangents), want)


def test_higher_derivatives_inside_compile() -> None:
    torch._dynamo.reset()
    layer, x = rnnfast.RNN(2, 3, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)

    def curve(x: torch.Tensor) -> torch.Tensor:  # of which the compiler traces a derivative, since the weights need one
        return jvp(grad(lambda x: layer(x)[0].sin().sum()), (x,), (x.cos(),))[1]

    compiled = torch.compile(curve, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x).sin().sum(), list(layer.parameters())) for f in (compiled, curve))
    assert_equal(got, want)


# --------------------------------------------------------------- many at once, by torch's vmap of old


@every_small
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_many_cotangents_at_once(case: Case, order: int, create_graph: bool) -> None:
    values, _, _ = leaves_of(case)
    _, op = op_of(case, make_inputs(case))
    at = [value.clone().requires_grad_() for value in values]
    outputs = op(*at)
    for _ in range(order - 1):
        outputs = torch.autograd.grad(sum(y.sin().sum() for y in outputs), at, create_graph=True)
    some = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]
    got = torch.autograd.grad(outputs, at, some, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
    each = [
        torch.autograd.grad(outputs, at, [s[k] for s in some], retain_graph=True, create_graph=create_graph)
        for k in range(3)
    ]
    want = tuple(map(torch.stack, zip(*each, strict=True)))
    assert_equal(got, want)
    if create_graph:
        assert_equal(
            *(torch.autograd.grad(sum(g.sin().sum() for g in some), at, retain_graph=True) for some in (got, want))
        )


@every_small
def test_vectorized_jacobians(case: Case) -> None:
    """Of everything in everything, and one of the other."""
    values, _, _ = leaves_of(case)
    _, op = op_of(case, make_inputs(case))
    of = torch.autograd.functional
    want = of.jacobian(torch_op(case), tuple(values))
    for mode in ("reverse", "forward"):
        got = of.jacobian(op, tuple(values), vectorize=True, strategy=f"{mode}-mode")
        for rows in zip(got, want, strict=True):
            assert_equal(*rows)
    x, *rest = values
    nested = [
        of.jacobian(
            lambda x, c=c, v=v: of.jacobian(lambda x: op(x, *rest)[0], x, create_graph=c, vectorize=v), x, vectorize=v
        )
        for c, v in ((True, True), (True, False))
    ]
    torch.testing.assert_close(*nested, rtol=1e-10, atol=1e-10)


def test_many_models_at_once() -> None:
    """The map itself, nested: of inputs and of weights, without a graph."""
    case = Case("RNN_TANH", T=3, B=2, I=2, H=3)
    values, _, _ = leaves_of(case)
    _, op = op_of(case, make_inputs(case))
    xs, ws = (
        torch.randn(2, 3, *values[0].shape, dtype=torch.float64),
        torch.randn(3, *values[2].shape, dtype=torch.float64),
    )
    old = torch._vmap_internals._vmap
    got = old(lambda xs: old(lambda x, w: op(x, values[1], w, *values[3:])[0])(xs, ws))(xs)
    want = torch.stack(
        [torch.stack([op(x, values[1], w, *values[3:])[0] for x, w in zip(some, ws, strict=True)]) for some in xs]
    )
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------ samples

K = 5  # samples or models


def layer_loss(weights: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    return op.recurrent("LSTM", x, None, None, None, list(weights), 2, True, True)[0].sin().sum()


@pytest.fixture
def weights() -> tuple[torch.Tensor, ...]:
    return tuple(make_inputs(Case("LSTM", T=1, B=1, I=3, H=6, L=2, D=2)).weights.values())


@pytest.mark.parametrize(("shape", "dim"), [((K, 7, 1, 3), 0), ((7, K, 2, 3), 1), ((7, 2, 3, K), 3)])
def test_per_sample_gradients(weights, shape, dim) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    got = vmap(grad(layer_loss), in_dims=(None, dim))(weights, x)
    for k in range(K):
        assert_equal(tuple(g[k] for g in got), grad(layer_loss)(weights, x.select(dim, k)))


def test_per_sample_gradients_of_packed_sequences(weights) -> None:
    batch_sizes = torch.tensor([3, 3, 1])
    x = torch.randn(K, 7, 3, dtype=torch.float64)

    def loss(weights, x):
        y, h_n, _ = op.recurrent("LSTM", x, batch_sizes, None, None, list(weights), 2, True, True)
        return y.sin().sum() + h_n.cos().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for k in range(K):
        assert_equal(tuple(g[k] for g in got), grad(loss)(weights, x[k]))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0)])
def test_ensembles(weights, in_dims) -> None:
    models = tuple(torch.randn(K, *w.shape, dtype=w.dtype) / 3 for w in weights)
    x = torch.randn(K, 7, 2, 3, dtype=torch.float64)
    got = vmap(grad(layer_loss), in_dims=in_dims)(models, x if in_dims[1] == 0 else x[0])
    for k in range(K):
        want = grad(layer_loss)(tuple(w[k] for w in models), x[k if in_dims[1] == 0 else 0])
        assert_equal(tuple(g[k] for g in got), want)


def test_nested_vmap_and_gradient_of_per_sample_gradients(weights) -> None:
    x = torch.randn(2, K, 4, 1, 3, dtype=torch.float64)
    nested = vmap(vmap(grad(layer_loss), in_dims=(None, 0)), in_dims=(None, 0))(weights, x)
    for a in range(2):
        for k in range(K):
            assert_equal(tuple(g[a, k] for g in nested), grad(layer_loss)(weights, x[a, k]))

    def penalty(weights, gradients_of):
        return sum(g.square().sum() for g in gradients_of(weights))

    mapped = grad(penalty)(weights, lambda w: vmap(grad(layer_loss), in_dims=(None, 0))(w, x[0]))
    looped = grad(penalty)(weights, lambda w: [g for k in range(K) for g in grad(layer_loss)(w, x[0, k])])
    assert_equal(mapped, looped)


def test_lengths_cannot_be_mapped(weights) -> None:
    x = torch.randn(3, 1, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="lengths must be shared"):
        vmap(lambda n: op.recurrent("LSTM", x[:, 0], n, None, None, list(weights), 2, True, True)[0])(
            torch.ones(2, 3, dtype=torch.int64)
        )


@pytest.mark.parametrize("lengths", [None, (5, 3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", ["LSTM", "RNN_TANH"])
def test_opcheck(mode: str, lengths: tuple[int, ...] | None) -> None:
    """torch.library.opcheck on each op: schema, fake tensors, compilation with symbolic sizes."""
    case = Case(mode, T=5, B=3, I=2, H=4, L=2, D=2, lengths=lengths)
    inputs = make_inputs(case)
    weights = list(inputs.weights.values())
    batch_sizes = None if inputs.packed is None else inputs.packed.batch_sizes
    stack = Stack(BY_MODE[mode].index, case.L, case.D, case.bias)
    given, constants = Inputs(inputs.x, inputs.h0, inputs.c0, weights), Constants(batch_sizes)
    outputs, reserve = cpu.forward(stack, given, constants, keep=True)
    call = (*stack, *given, *constants)
    past = (*call, outputs.y, reserve)
    cotangents = (inputs.dy, inputs.dh_n, inputs.dc_n)
    wanted = [True, True, case.mode == "LSTM", *[True] * len(weights)]
    check = torch.library.opcheck
    check(torch.ops.rnnfast.forward.default, (*call, True))
    check(torch.ops.rnnfast.forward.default, (*call, False))
    check(torch.ops.rnnfast.backward.default, (*past, *cotangents, wanted, 1, None, None, None))
    check(torch.ops.rnnfast.backward.default, (*past, *cotangents, wanted, 3, None, None, None))
    check(torch.ops.rnnfast.tangent.default, (*past, *given))
    check(torch.ops.rnnfast.second.default, (*past, *given, *cotangents, None, None, None, wanted, wanted, 1))
    check(torch.ops.rnnfast.forward_dual.default, (*call, *given[:3]))
    check(torch.ops.rnnfast.backward_adjoints.default, (*past, *cotangents, wanted))
    check(torch.ops.rnnfast.backward_saved.default, (*past, *cotangents, reserve, wanted))
    *_, adjoints = torch.ops.rnnfast.backward_adjoints(*past, *cotangents, wanted)
    check(torch.ops.rnnfast.second_local.default, (*past, adjoints, *given, wanted))
