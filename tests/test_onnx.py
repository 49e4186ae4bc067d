"""torch.onnx.export of models with rnnfast layers: ONNX Runtime gives the layers' own numbers, for any T and B."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import rnnfast
import rnnfast._backends.onnx

I, H, P = 5, 8, 3  # noqa: E741
ANY = torch.export.Dim.DYNAMIC
T_AND_B = {0: ANY, 1: ANY}


class Layers(nn.Module):
    """Each of the layers on the same input, with and without an initial state: one export for many options."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, state: Tensor) -> list[Any]:
        """x (T,B,I); state (4,B,H), of which each layer takes what it needs."""
        outputs = []
        for layer in self.layers:
            first = x.transpose(0, 1) if getattr(layer, "batch_first", False) else x
            if isinstance(layer, nn.RNNCellBase):
                hx = (state[0], state[1]) if isinstance(layer, rnnfast.LSTMCell) else state[0]
                first = x[0]
            else:
                LD = layer.num_layers * (2 if layer.bidirectional else 1)
                h = state[:LD]
                hx = (h[..., : layer.proj_size or H], h.cos()) if isinstance(layer, rnnfast.LSTM) else h
            outputs += [layer(first), layer(first, hx)]
        outputs.append(self.layers[0](x[:, 0]))  # unbatched
        return outputs


def export(model: nn.Module, inputs: Sequence[Any], **how: Any) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(model.eval(), tuple(inputs), verbose=False, **how)
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program


def nodes(program: torch.onnx.ONNXProgram) -> Counter[str]:
    return Counter(node.op_type for node in program.model_proto.graph.node)


def assert_same(file: bytes, model: nn.Module, *inputs: Any) -> None:
    """ONNX Runtime's outputs against the model's, but for roundings: a few in each of T steps, none above 1."""
    session = onnxruntime.InferenceSession(file)
    arrays = [tensor.numpy() for tensor in tree_leaves(inputs)]
    got = session.run(None, dict(zip([one.name for one in session.get_inputs()], arrays, strict=True)))
    with torch.no_grad():
        want = tree_leaves(model(*inputs))
    eps = 4 * len(inputs[0]) * np.finfo(arrays[0].dtype).eps
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=eps)


def file_of(program: torch.onnx.ONNXProgram) -> bytes:
    return program.model_proto.SerializeToString()


def inputs(T: int, B: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(T)
    return torch.randn(T, B, I, dtype=dtype), torch.rand(4, B, H, dtype=dtype)


def test_one_node_a_layer_for_all_sizes() -> None:
    torch.manual_seed(0)
    model = Layers(
        rnnfast.LSTM(I, H, 2, bidirectional=True, dropout=0.5),
        rnnfast.LSTM(I, H, 3, bias=False, batch_first=True),
        rnnfast.RNN(I, H, 2, bidirectional=True, batch_first=True),
        rnnfast.RNN(I, H, 3, nonlinearity="relu", bias=False),
        rnnfast.GRU(I, H, 2, bidirectional=True),
    )
    program = export(model, inputs(7, 3), dynamic_shapes=(T_AND_B, {1: ANY}))
    found = nodes(program)
    assert found["LSTM"] == 3 * 2 + 2 * 3 and found["RNN"] == 2 * 2 + 2 * 3 and found["GRU"] == 2 * 2, found
    assert not found["Scan"] and not found["MatMul"] and not found["Gemm"], found
    for T, B in ((7, 3), (1, 1), (20, 2)):
        assert_same(file_of(program), model, *inputs(T, B))


def test_scans_where_there_is_no_operator() -> None:
    """Projections have no operator, and in float64 ONNX Runtime has none."""
    torch.manual_seed(0)
    model = Layers(
        rnnfast.LSTM(I, H, 2, bias=False),
        rnnfast.LSTM(I, H, proj_size=P, bidirectional=True, batch_first=True),
        rnnfast.RNN(I, H, bidirectional=True),
        rnnfast.RNN(I, H, 2, nonlinearity="relu"),
        rnnfast.GRU(I, H, bidirectional=True),
        rnnfast.LeakyRNN(I, H, 2, leak=0.3),
        rnnfast.LSTMCell(I, H),
    ).double()
    program = export(model, inputs(7, 3, torch.float64), dynamic_shapes=(T_AND_B, {1: ANY}))
    assert nodes(program)["Scan"] and not nodes(program)["LSTM"] and not nodes(program)["RNN"]
    for T, B in ((7, 3), (1, 1), (20, 2)):
        assert_same(file_of(program), model, *inputs(T, B, torch.float64))


def test_cells() -> None:
    model = Layers(rnnfast.LSTMCell(I, H), rnnfast.RNNCell(I, H, nonlinearity="relu"), rnnfast.LSTMCell(I, H, False))
    assert_same(file_of(export(model, inputs(2, 3))), model, *inputs(2, 3))


class Model(nn.Module):
    """What users write: torch.nn between torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(I, H), nn.LSTM(H, 40, 2, dropout=0.5), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x).relu())[0][-1])


def test_converted_model_by_names() -> None:
    """dynamic_axes instead of dynamic_shapes, a file, inference mode, weights too large to be folded."""
    model, x = rnnfast.convert(Model()), inputs(7, 3)[0]
    file = BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about dynamic_axes
        names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "T", 1: "B"}}}
        torch.onnx.export(model.eval(), (x,), file, verbose=False, **names)
    assert_same(file.getvalue(), model, inputs(11, 2)[0])
    (size,) = (v.type.tensor_type.shape.dim for v in onnx.load_from_string(file.getvalue()).graph.output)
    assert size[0].dim_param == "B"


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exported_program(strict: bool, tmp_path) -> None:
    """What torch.export has saved; and the numbers of the program that the ONNX file was made from."""
    layer = rnnfast.RNN(I, H, 2, bidirectional=True) if strict else rnnfast.LSTM(I, H, 2, proj_size=P)
    model = nn.Sequential(nn.Linear(I, I), layer)
    exported = torch.export.export(model.eval(), (inputs(7, 3)[0],), dynamic_shapes=(T_AND_B,), strict=strict)
    torch.export.save(exported, tmp_path / "model.pt2")
    program = torch.onnx.export(torch.export.load(tmp_path / "model.pt2"), verbose=False)
    x = inputs(9, 2)[0]
    assert_same(file_of(program), model, x)
    got, want = (tree_leaves(f(x)) for f in (program.exported_program.module(), model))
    torch.testing.assert_close(got, want)


def test_operators_of_the_program() -> None:
    """torch.library.opcheck of what stands for ONNX's operators: schema, fake tensors, symbolic sizes."""
    lstm, rnn, (x, state) = rnnfast.LSTM(I, H, bidirectional=True), rnnfast.RNN(I, H, bias=False), inputs(4, 3)
    how = {"direction": "bidirectional", "hidden_size": H}
    weights = rnnfast._backends.onnx.parameters([w.detach() for w in lstm.parameters()], lstm.mode, 2)
    torch.library.opcheck(torch.ops.onnx.LSTM.opset14, (x, *weights, None, state[:2], state[2:]), how)
    how = {"direction": "forward", "hidden_size": H, "activations": ["Relu"]}
    weights = rnnfast._backends.onnx.parameters([w.detach() for w in rnn.parameters()], rnn.mode, 1)
    torch.library.opcheck(torch.ops.onnx.RNN.opset14, (x, *weights, None, None), how)
    gru, how = rnnfast.GRU(I, H), {"direction": "forward", "hidden_size": H, "linear_before_reset": 1}
    weights = rnnfast._backends.onnx.parameters([w.detach() for w in gru.parameters()], gru.mode, 1)
    torch.library.opcheck(torch.ops.onnx.GRU.opset14, (x, *weights, None, state[:1]), how)


def test_packed_input_says_so() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = rnnfast.LSTM(I, H)

        def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
            return self.layer(PackedSequence(data, batch_sizes))[0].data

    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"packed input has no ONNX operator"):
        export(Packed(), (torch.randn(6, I), torch.tensor([3, 2, 1])))


@pytest.mark.filterwarnings("ignore")  # the exporter itself is deprecated, and warns of what it does not know
@pytest.mark.parametrize("name", ["LSTM", "RNN", "LSTMCell"])
def test_exporter_by_tracing(name: str) -> None:
    model, x = getattr(rnnfast, name)(I, H), inputs(7, 3)[0]
    file = BytesIO()
    x = x[0] if "Cell" in name else x
    torch.onnx.export(model.eval(), (x,), file, dynamo=False)
    assert_same(file.getvalue(), model, x)
