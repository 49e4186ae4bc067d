"""Layers on two processes that talk through gloo: DistributedDataParallel and FSDP2 against one process, in float64."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast._autograd import op

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

WORLD = 2
T, B, I = 7, 6, 3  # noqa: E741
LENGTHS = torch.tensor([7, 2, 5, 7, 1, 4])  # (B)


class Net(nn.Module):
    """Everything that has weights: several layers and directions, a projection, packed input, a cell."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.lstm = rnnfast.LSTM(I, 6, 2, bidirectional=True, proj_size=4, dtype=dtype)
        self.rnn = rnnfast.RNN(8, 5, dtype=dtype)
        self.cell = rnnfast.LSTMCell(5, 6, dtype=dtype)
        self.readout = nn.Linear(6, 2, dtype=dtype)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        _, h_n = self.rnn(packed)  # (1,B,5)
        h, c = self.cell(h_n[0])
        return self.readout(h + c)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x (T,B,I) and a target (B,2), the same on every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, B, I, generator=generator, dtype=dtype), torch.randn(B, 2, generator=generator, dtype=dtype)


def train(model: nn.Module, rows: slice, steps: int) -> list[dict[str, Tensor]]:
    """Plain gradient descent on some rows of the batch; the gradients of every step, whole, by name."""
    x, target = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x[:, rows], LENGTHS[rows]) - target[rows]).square().mean().backward()
        seen.append({name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
    return seen


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-12, atol=1e-14, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_same_everywhere(model: nn.Module) -> None:
    for parameter in model.parameters():
        everywhere = [torch.empty_like(parameter) for _ in range(WORLD)]
        dist.all_gather(everywhere, parameter.detach())
        assert all(torch.equal(other, parameter) for other in everywhere)


def kernel_calls() -> list[type]:
    """From now on, the type of the first weight of every call of the kernels."""
    calls, recurrent = [], op.recurrent

    def spy(mode, x, batch_sizes, h0, c0, weights, *rest):
        calls.append(type(weights[0]))
        return recurrent(mode, x, batch_sizes, h0, c0, weights, *rest)

    op.recurrent = spy
    return calls


# --------------------------------------------------------------------- what each of the two processes runs


def data_parallel(rank: int) -> None:
    net = Net()
    alone = train(copy.deepcopy(net), slice(0, B), steps=4)
    model = nn.parallel.DistributedDataParallel(net)
    calls = kernel_calls()
    for got, want in zip(train(model, slice(rank, B, WORLD), steps=4), alone, strict=True):
        assert_equal(got, want)
    assert len(calls) == 2 * 4  # of two layers; the cell is torch's
    assert_same_everywhere(net)


def shard(net: nn.Module, **options) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (net.lstm, net.rnn, net):  # the cell and the readout are of the last group
        fully_shard(part, mesh=mesh, **options)
    return net


def fully_sharded(rank: int) -> None:
    from torch.distributed.checkpoint import state_dict as checkpoint
    from torch.distributed.tensor import DTensor

    net = Net()
    single = copy.deepcopy(net)
    alone = train(single, slice(0, B), steps=4)
    model = shard(net)
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    calls = kernel_calls()
    for got, want in zip(train(model, slice(rank, B, WORLD), steps=4), alone, strict=True):
        assert_equal(got, want)
    assert calls == [nn.Parameter] * 2 * 4  # whole again wherever a kernel reads them

    options = checkpoint.StateDictOptions(full_state_dict=True)
    trained = checkpoint.get_model_state_dict(model, options=options)
    assert_equal(trained, {name: p.detach() for name, p in single.named_parameters()})
    rnnfast.revert(Net()).load_state_dict(trained)  # torch's layers read it

    fresh = shard(Net())  # other weights
    checkpoint.set_model_state_dict(fresh, trained, options=options)
    shards = copy.deepcopy(fresh.state_dict())
    again = shard(Net())
    again.load_state_dict(shards)
    x, _ = batch()
    want = single(x, LENGTHS)
    for loaded in (fresh, again):
        torch.testing.assert_close(loaded(x, LENGTHS), want, rtol=1e-12, atol=1e-14)


def sharded_in_bfloat16(rank: int) -> None:
    """The kernels read the weights that FSDP put in place, not others, and widen them."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x, _ = batch(torch.float32)
    net = Net(torch.float32)
    whole = copy.deepcopy(net).bfloat16()
    got = shard(net, mp_policy=policy)(x, LENGTHS)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, whole(x.bfloat16(), LENGTHS))


def weights_in_pieces(rank: int) -> None:
    """Outside of the forward that FSDP knows of there is only a piece of each weight: an error, as in torch."""
    net = shard(Net())
    x, _ = batch()
    for call in (nn.LSTM.forward, rnnfast.LSTM.forward):
        with pytest.raises(RuntimeError, match="DTensor"):
            call(net.lstm, x)


# ---------------------------------------------------------------------------------------------- two processes

RUNS = (data_parallel, fully_sharded, sharded_in_bfloat16, weights_in_pieces)


def process(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=300)
    )
    for run in RUNS:
        torch.manual_seed(0)
        run(rank)
    dist.destroy_process_group()
    os._exit(0)  # at the interpreter's end a thread of torch's was seen to be running still, which aborts the process


def test_two_processes(tmp_path: Path, monkeypatch) -> None:
    """All of RUNS in one pair of processes, since it takes one longer to start than to run them."""
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(process, (str(tmp_path / "store"),), nprocs=WORLD)
