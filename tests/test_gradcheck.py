"""op.recurrent against finite differences in float64, with every choice of what needs a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import GRADCHECK_CASES, Case, Inputs, make_inputs

from rnnfast._autograd.op import recurrent


def op_of(case: Case, inputs: Inputs) -> tuple[dict[str, torch.Tensor], Callable[..., tuple[torch.Tensor, ...]]]:
    """The case's differentiable inputs by name, and the op as a function of them that returns no None."""
    leaves = {"x": inputs.x, "h0": inputs.h0, "c0": inputs.c0} | inputs.weights
    leaves = {name: a for name, a in leaves.items() if a is not None}

    def op(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(leaves, values, strict=True))
        outputs = recurrent(
            case.mode,
            given["x"],
            None if inputs.packed is None else inputs.packed.batch_sizes,
            given.get("h0"),
            given.get("c0"),
            [given[name] for name in inputs.weights],
            case.L,
            case.D == 2,
            case.bias,
            inputs.dropout_masks,
        )
        return tuple(a for a in outputs if a is not None)

    return leaves, op


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=lambda case: case.id)
def test_gradcheck(case: Case) -> None:
    leaves, op = op_of(case, make_inputs(case))
    assert torch.autograd.gradcheck(op, [a.requires_grad_() for a in leaves.values()])


# One case that has everything for each kind of cell, and what is to be differentiated in it.
FULL_CASES = (
    Case("LSTM", T=3, B=2, I=2, H=3, L=2, D=2, proj=2),
    Case("LSTM", T=3, B=2, I=2, H=3, L=2, D=2, lengths=(3, 1)),
    Case("RNN_TANH", T=3, B=2, I=2, H=3, L=2, D=2),
    Case("RNN_RELU", T=3, B=2, I=2, H=3, L=2, D=2),
)
WEIGHT_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
WANTED = {
    **{name: lambda leaf, name=name: leaf == name for name in ("x", "h0", "c0")},
    **{kind: lambda leaf, kind=kind: leaf == f"{kind}_l0" for kind in WEIGHT_KINDS},
    "last_bias": lambda leaf: leaf == "bias_hh_l1_reverse",
    "top_layer": lambda leaf: "_l1" in leaf,
    "bottom_layer": lambda leaf: "_l0" in leaf,
    "one_direction": lambda leaf: leaf.endswith("_reverse"),
    "frozen_weights": lambda leaf: leaf in ("x", "h0", "c0"),
    "frozen_states": lambda leaf: leaf not in ("h0", "c0"),
    "frozen_x": lambda leaf: leaf != "x",
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("case", FULL_CASES, ids=lambda case: case.id)
def test_only_what_needs_a_gradient(case: Case, wanted: str) -> None:
    leaves, op = op_of(case, make_inputs(case))
    chosen = {name for name in leaves if WANTED[wanted](name)}
    if not chosen:
        pytest.skip(f"{case.mode} has no such input")

    full = [a.clone().requires_grad_() for a in leaves.values()]
    sum(output.square().sum() for output in op(*full)).backward()
    some = [a.clone().requires_grad_(name in chosen) for name, a in leaves.items()]
    sum(output.square().sum() for output in op(*some)).backward()
    for name, a, b in zip(leaves, some, full, strict=True):
        if name in chosen:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
        else:
            assert a.grad is None, name

    assert torch.autograd.gradcheck(op, some)


@pytest.mark.parametrize("case", FULL_CASES, ids=lambda case: case.id)
def test_nothing_needs_a_gradient(case: Case) -> None:
    leaves, op = op_of(case, make_inputs(case))
    assert not any(output.requires_grad for output in op(*leaves.values()))


@pytest.mark.parametrize("case", FULL_CASES, ids=lambda case: case.id)
def test_many_at_once(case: Case) -> None:
    """The checks that torch makes with its older vmap, in both modes and orders."""
    leaves, op = op_of(case, make_inputs(case))
    values = [a.requires_grad_() for a in leaves.values()]
    both = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(op, values, check_forward_ad=True, check_batched_forward_grad=True, **both)
    assert torch.autograd.gradgradcheck(op, values, check_fwd_over_rev=True, **both)


@pytest.mark.parametrize("of", ["gradients", "tangents"])
@pytest.mark.parametrize("lengths", [(3, 1), None], ids=["packed", "padded"])
def test_third_derivatives(lengths: tuple[int, ...] | None, of: str) -> None:
    case = Case("RNN_TANH" if lengths is None else "LSTM", T=3, B=2, I=2, H=3, lengths=lengths)
    leaves, op = op_of(case, make_inputs(case))
    values = [a.requires_grad_() for a in leaves.values()]
    direction = tuple(torch.cos(3 * a.detach()) for a in values)

    def function(*at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if of == "tangents":
            return torch.func.jvp(op, at, direction)[1]
        return torch.autograd.grad(sum(y.sin().sum() for y in op(*at)), at, create_graph=True)

    forward = of == "gradients"  # torch nests no forward mode in its own check
    assert torch.autograd.gradgradcheck(function, values, check_fwd_over_rev=forward, fast_mode=True)
