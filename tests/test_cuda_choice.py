"""What runs a call on a GPU: sweeps, cuDNN, or torch's operators. No GPU, no kernels: the choice alone."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rnnfast._backends import cuda_sweeps, cudnn
from rnnfast._backends.cells import BY_MODE
from rnnfast._backends.sweeps import Sweep
from rnnfast._backends.types import Stack


class _Plans:
    """An extension whose plans are made up."""

    def __init__(self, kernel: str, waves: int, runs: bool = True) -> None:
        self.made = SimpleNamespace(kernel=kernel, waves=waves)
        self.runs = runs

    def runs_on(self, device) -> bool:
        return self.runs

    def plan(self, s, like, backward):
        return self.made


@pytest.mark.parametrize(
    ("kernel", "waves", "T", "runs", "cudnns"),
    [
        ("cluster", 1, 512, True, False),
        ("grid", 8, 512, True, False),
        ("grid", 9, 512, True, True),
        ("steps", 0, 512, True, True),
        ("steps", 0, 8, True, False),  # the copy of the weights would cost more
        ("steps", 0, 1, False, True),  # nothing else runs on this card
    ],
)
def test_what_is_cudnns(monkeypatch: pytest.MonkeyPatch, kernel, waves, T, runs, cudnns) -> None:
    monkeypatch.setattr(cuda_sweeps, "load_extension", lambda: _Plans(kernel, waves, runs))
    monkeypatch.setattr(cuda_sweeps, "on_device_of", lambda x: nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    stack = Stack(BY_MODE["LSTM"].index, 1, 1, True)
    sweep = Sweep(stack.cell_index, 1, 8, 0, T, 1, None, None)
    call = SimpleNamespace(like=gpu, dropout=None, sizes=SimpleNamespace(T=T), sweep=sweep, stack=stack)
    assert cudnn.is_cudnns(call, True) == cudnns
    assert not cudnn.is_cudnns(SimpleNamespace(**vars(call) | {"dropout": object()}), True)
    unknown = SimpleNamespace(cell=SimpleNamespace(mode="of ours alone"))
    assert not cudnn.is_cudnns(SimpleNamespace(**vars(call) | {"stack": unknown}), True)
    reset = sweep._replace(resets=torch.zeros(T, dtype=torch.bool))
    assert not cudnn.is_cudnns(SimpleNamespace(**vars(call) | {"sweep": reset}), True)
    index = BY_MODE["GRU"].index
    gru = {"stack": Stack(index, 1, 1, True), "sweep": sweep._replace(cell_index=index)}
    assert cudnn.is_cudnns(SimpleNamespace(**vars(call) | gru), True)  # has no persistent kernel
    monkeypatch.setenv("RNNFAST_CUDA_KERNEL", "steps")
    assert not cudnn.is_cudnns(call, True)


def test_products_take_tf32_where_cudnn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as one lasts; `torch.backends.cuda.matmul` is as it was afterwards, after an error, too."""
    gpu, matmul = SimpleNamespace(dtype=torch.float32, is_cuda=True), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with pytest.raises(KeyError), cuda_sweeps.products_as_cudnns(gpu):
        assert matmul.fp32_precision == "tf32"
        raise KeyError
    assert matmul.fp32_precision == before and not matmul.allow_tf32
    with cuda_sweeps.products_as_cudnns(SimpleNamespace(dtype=torch.float64, is_cuda=True)):
        assert matmul.fp32_precision == before
    monkeypatch.setattr(cuda_sweeps, "takes_tf32", lambda: False)
    with cuda_sweeps.products_as_cudnns(gpu):
        assert matmul.fp32_precision == before


def test_a_card_without_kernels_gets_torchs_operators_and_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(sm=75)
    module = SimpleNamespace(runs_on=lambda device: False, Card=SimpleNamespace(of=lambda device: card), Plan=object)
    extension = cuda_sweeps.Extension(module)
    monkeypatch.setattr(cuda_sweeps, "load_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    gpu = SimpleNamespace(is_cpu=False, device=torch.device("cuda", 0))
    with pytest.warns(UserWarning, match=r"without kernels for an old card \(sm_75\).*sm_80 and later"):
        assert cuda_sweeps.sweeps_for(gpu) is cuda_sweeps.Composite
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_sweeps.sweeps_for(gpu) is cuda_sweeps.Composite  # said once
