"""A stack of recurrent layers as an ONNX model, one LSTM or RNN node for each layer, with the weights of torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

import rnnfast._backends.onnx
from benchmarks.grid import Shape

OPSET, IR_VERSION = 17, 9

Array = NDArray[np.float32]


def state_names(shape: Shape) -> list[str]:
    """Names of the states of all layers; an input has "0_" before it, an output "n_"."""
    letters = "hc" if shape.cell == "lstm" else "h"
    return [f"{letter}{layer}" for layer in range(shape.L) for letter in letters]


def build_model(shape: Shape, weights: Mapping[str, Array], carry: bool) -> ModelProto:
    """x (T,B,I) -> y (T,B,D*H), then "n_" + each of `state_names` (D,B,H), float32.

    Args:
        shape: float32, padded, not projected.
        weights: torch's state_dict.
        carry: take initial states (D,B,H), named "0_" + each of `state_names`; if not, they are zero.

    Source: the operators LSTM, RNN and GRU of ONNX, https://onnx.ai/onnx/operators/.
    """
    nodes: list[NodeProto] = []
    constants = [numpy_helper.from_array(np.array([0, 0, -1]), "rows")]
    for layer in range(shape.L):
        parameters = _parameters(shape, weights, layer)
        constants += [numpy_helper.from_array(a, name) for name, a in parameters.items()]
        nodes += _layer(shape, layer, list(parameters), carry)
    states = state_names(shape)
    inputs = [_value("x", ("T", "B", shape.I))]
    inputs += [_value("0_" + name, (shape.D, "B", shape.H)) for name in states] if carry else []
    outputs = [_value(_y(shape.L), ("T", "B", shape.D * shape.H))]
    outputs += [_value("n_" + name, (shape.D, "B", shape.H)) for name in states]
    graph = helper.make_graph(nodes, "recurrent", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _y(layer: int) -> str:
    return f"y{layer - 1}" if layer else "x"


def _value(name: str, shape: tuple[str | int, ...]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _parameters(shape: Shape, weights: Mapping[str, Array], layer: int) -> dict[str, Array]:
    """W (D,G*H,I), R (D,G*H,H), B (D,2*G*H) of a layer, in ONNX's order of gates."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    own = [weights[name + suffix] for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: shape.D] for name in names]
    arrays = rnnfast._backends.onnx.parameters([torch.from_numpy(w) for w in own], shape.mode, shape.D)
    return {f"{name}{layer}": array.numpy() for name, array in zip("WRB", arrays, strict=True)}


def _layer(shape: Shape, layer: int, parameters: list[str], carry: bool) -> list[NodeProto]:
    """The recurrent node, then its Y (T,D,B,H) brought to (T,B,D*H)."""
    states = [name for name in state_names(shape) if name[1:] == str(layer)]
    y, raw = _y(layer + 1), f"Y{layer}"
    node = helper.make_node(
        shape.cell.upper(),
        [_y(layer), *parameters, "", *(("0_" + name for name in states) if carry else ())],
        [raw, *("n_" + name for name in states)],
        hidden_size=shape.H,
        **({"linear_before_reset": 1} if shape.cell == "gru" else {}),
        direction="bidirectional" if shape.D == 2 else "forward",
    )
    swap = helper.make_node("Transpose", [raw], [raw + "t"], perm=[0, 2, 1, 3])
    join = helper.make_node("Reshape", [raw + "t", "rows"], [y])
    return [node, swap, join]
