"""Large tensors stand on memory that is used again, once nobody has them; until then they are like any other."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import threading
import warnings
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast._backends import memory

SIZES = {"small": (2, 3, 4, 5), "large": (2, 600, 130, 130)}  # T, B, I, H; from 256 KB on memory is kept


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_kept", memory._Kept())


def results(size: str) -> dict[str, Tensor]:
    """What a user gets of an LSTM: outputs, gradients, tangents, second derivatives."""
    T, B, I, H = SIZES[size]  # noqa: E741
    torch.manual_seed(0)
    layer, x = rnnfast.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    h0, c0 = torch.randn(1, B, H, requires_grad=True), torch.randn(1, B, H, requires_grad=True)
    y, (h_n, c_n) = layer(x, (h0, c0))
    wrt = {"x": x, "h0": h0, "c0": c0, **dict(layer.named_parameters())}
    first = torch.autograd.grad(y.square().sum(), list(wrt.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(wrt.values()))  # type: ignore[arg-type]
    tangent = torch.func.jvp(lambda x: layer(x)[0], (x.detach(),), (torch.randn(T, B, I),))[1]
    with torch.inference_mode():
        inferred = layer(x)[0]
    found = {"y": y, "h_n": h_n, "c_n": c_n, "tangent": tangent, "inferred": inferred}
    found |= {f"d{name}": g for name, g in zip(wrt, first, strict=True)}
    found |= {f"dd{name}": g for name, g in zip(wrt, second, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def resized(t: Tensor) -> None:
    numbers = t.flatten()[:6].clone()
    t.resize_(2 * t.numel())
    assert torch.equal(t[:6], numbers)
    t.fill_(1)
    t.resize_(2, 3)
    assert torch.equal(t, torch.ones(2, 3))


def written(t: Tensor) -> None:
    """By `out=` of another shape."""
    a = torch.randn(3, t.numel())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is resized
        torch.add(a, a, out=t)
    assert torch.equal(t, 2 * a)


def freed_and_back(t: Tensor) -> None:
    """As sharded data parallelism does."""
    storage, size = t.untyped_storage(), t.untyped_storage().nbytes()
    storage.resize_(0)
    assert storage.nbytes() == 0
    storage.resize_(size)
    assert torch.equal(t.fill_(2), torch.full(t.shape, 2.0))


def replaced(t: Tensor) -> None:
    other = torch.randn(7)
    t.set_(other)
    assert torch.equal(t, other) and t.data_ptr() == other.data_ptr()


def succeeds_in_child(function: Callable[[], object]) -> bool:
    """Of a fork, where no thread of torch's is left: does it return what is true?"""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if function() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def shared(t: Tensor) -> None:
    numbers = t.clone()
    assert t.share_memory_().is_shared() and torch.equal(t, numbers)
    assert succeeds_in_child(lambda: t.numpy().fill(5) is None)
    assert torch.equal(t, torch.full(t.shape, 5.0))


def copied(t: Tensor) -> None:
    file = io.BytesIO()
    torch.save(t, file)
    assert len(file.getvalue()) < t.nbytes + 4096
    for other in (copy.deepcopy(t), pickle.loads(pickle.dumps(t)), torch.load(io.BytesIO(file.getvalue()))):
        assert torch.equal(other, t) and other.data_ptr() != t.data_ptr()


@pytest.mark.parametrize(
    "use", [resized, written, freed_and_back, replaced, shared, copied], ids=lambda use: use.__name__
)
@pytest.mark.parametrize("size", SIZES)
def test_results_are_ordinary_tensors(size: str, use: Callable[[Tensor], None]) -> None:
    for name, t in results(size).items():
        storage = t.untyped_storage()
        assert storage.nbytes() == t.nbytes and storage.resizable() and not storage.is_shared(), name
        assert t.is_contiguous() and t.storage_offset() == 0 and not t._is_view(), name
        del storage
        use(t)


def test_results_are_of_version_0() -> None:
    for size in SIZES:
        layer, x = rnnfast.LSTM(SIZES[size][2], SIZES[size][3]), torch.randn(SIZES[size][:3])
        assert [t._version for t in (layer(x)[0], *layer(x)[1])] == [0, 0, 0]


def test_what_the_backward_pass_reads_may_lose_its_memory_until_then() -> None:
    """What the kernels alone read, not y: offloaded as sharded data parallelism does it."""
    freed: list[int] = []

    def pack(t: Tensor) -> tuple[Tensor, Tensor | None, int]:
        storage = t.untyped_storage()
        size = storage.nbytes()
        if t.dim() > 1 or isinstance(t, torch.nn.Parameter):
            return t, None, size
        numbers = t.clone()
        storage.resize_(0)
        freed.append(size)
        return t, numbers, size

    def unpack(packed: tuple[Tensor, Tensor | None, int]) -> Tensor:
        t, numbers, size = packed
        if numbers is not None:
            t.untyped_storage().resize_(size)
            t.copy_(numbers)
        return t

    layer, x = rnnfast.LSTM(130, 130), torch.randn(2, 600, 130, requires_grad=True)
    expected = torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        total = layer(x)[0].sum()
    found = torch.autograd.grad(total, [x, *layer.parameters()])
    assert len(freed) == 1 and freed[0] > memory.LARGE
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --------------------------------------------------------------------------------------------- used again, and when


def large(value: float = 0) -> Tensor:
    return memory.empty(torch.float32, 2**16).fill_(value)


def test_memory_is_used_again() -> None:
    t = large()
    address = t.data_ptr()
    del t
    assert large().data_ptr() == address
    assert memory.empty(torch.float64, 2, 2**14).data_ptr() == address  # of another dtype and shape
    first, second = large(), large()
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("cell", ["LSTM", "RNN"])
def test_a_second_step_needs_no_new_memory(cell: str) -> None:
    T, B, I, H = SIZES["large"]  # noqa: E741
    layer, x = getattr(rnnfast, cell)(I, H, num_layers=2), torch.randn(T, B, I, requires_grad=True)
    kept = []
    for _ in range(3):
        (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        layer.zero_grad()
        x.grad = gradient = None  # type: ignore[assignment]
        kept.append({storage.data_ptr() for storage in memory._kept.storages})
    assert len(kept[0]) > 3 and kept[0] == kept[1] == kept[2]


def test_a_few_steps_less_need_no_new_memory() -> None:
    """Where the storage may be larger than what is asked for, which no result's is."""
    address = memory.empty(torch.float32, 2**18).data_ptr()
    assert memory.empty(torch.float32, 2**18 - 2**15, slack=0.25).data_ptr() == address
    for size, slack in ((2**18 - 2**15, 0.0), (2**17, 0.25)):
        fresh = memory.empty(torch.float32, size, slack=slack)
        assert fresh.data_ptr() != address and fresh.untyped_storage().nbytes() == fresh.nbytes


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda t: t,
    "view": lambda t: t[5:6],
    "detached": lambda t: t.detach(),
    "storage": lambda t: t.untyped_storage(),
    "typed storage": lambda t: torch.storage.TypedStorage(
        wrap_storage=t.untyped_storage(), dtype=t.dtype, _internal=True
    ),
    "NumPy": lambda t: t.numpy(),
    "NumPy's view": lambda t: t.numpy()[5:6],
    "DLPack": lambda t: torch.utils.dlpack.to_dlpack(t),
    "NumPy by DLPack": lambda t: np.from_dlpack(t),
    "graph": lambda t: torch.ones(2**16, requires_grad=True) * t,
    "parameter": lambda t: torch.nn.Parameter(t),
    "set on it": lambda t: torch.empty(0).set_(t.untyped_storage()),
    "closure": lambda t: lambda: t,
    "watched": lambda t: weakref.ref(t.untyped_storage()),
    "marked": lambda t: setattr(t.untyped_storage(), "mine", True),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_is_not_used_again_as_long_as_anybody_has_it(name: str) -> None:
    t = large(1)
    before, storage = t.data_ptr(), id(t.untyped_storage())
    holder = HOLDERS[name](t)
    del t
    others = [large(2) for _ in range(3)]
    assert before not in [other.data_ptr() for other in others]
    assert storage not in [id(other.untyped_storage()) for other in others]
    if isinstance(holder, (Tensor, np.ndarray)) and name != "set on it":
        assert holder.min() == holder.max() == 1


def test_no_more_is_kept_than_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [large() for _ in range(memory.MOST + 5)]
    del held
    assert len(memory._kept.storages) == memory.MOST
    monkeypatch.setattr(memory, "MOST_BYTES", 2**20)
    for size in (2**18, 2**17 + 1, 2**16):  # 2^20 bytes: all there may be, and less
        memory.empty(torch.float32, size)
        assert sum(storage.nbytes() for storage in memory._kept.storages) <= 2**20
    assert memory.empty(torch.float32, 2**18 + 1).untyped_storage() not in memory._kept.storages


def test_what_is_of_no_use_is_not_kept() -> None:
    large().share_memory_()
    assert not large().is_shared()
    large().share_memory_()
    large().untyped_storage().resize_(0)
    memory.empty(torch.float32, 2**17)
    assert [storage.nbytes() for storage in memory._kept.storages] == [2**19]


def test_a_call_in_the_middle_of_another_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalizer that the garbage collector runs may call a layer, while the list of storages is being changed."""
    inner: list[Tensor] = []
    is_private = memory._is_private

    def interrupted(storage: torch.UntypedStorage) -> bool:
        inner.append(memory.empty(torch.float32, 2**16))
        return is_private(storage)

    large()
    monkeypatch.setattr(memory, "_is_private", interrupted)
    outer = large()
    assert len(inner) == 1 and outer.data_ptr() != inner[0].data_ptr()
    monkeypatch.undo()
    assert not memory._kept.lock.locked()


def test_a_child_process_has_memory_of_its_own() -> None:
    large()
    memory._kept.lock.acquire()  # by a thread that the child will not have

    def is_used_again() -> bool:
        address = memory.empty(torch.float32, 2**16).data_ptr()
        return memory.empty(torch.float32, 2**16).data_ptr() == address

    assert succeeds_in_child(is_used_again)


def test_nobody_writes_into_what_is_alive() -> None:
    """Four threads train, keep random ones of what they get for a while, in all ways, and find it as it was."""
    torch.set_num_threads(1)
    failures: list[str] = []

    def train(seed: int) -> None:
        random_ = random.Random(seed)
        layer = rnnfast.LSTM(64, 64) if seed % 2 else rnnfast.RNN(64, 64)
        kept: list[tuple[object, Tensor]] = []
        holders = [HOLDERS[name] for name in ("tensor", "view", "storage", "NumPy", "NumPy by DLPack")]
        for _ in range(60):
            x = torch.full((16, 64 + 16 * random_.randrange(3), 64), random_.random(), requires_grad=True)
            y, _ = layer(x)
            y.sum().backward()
            for t in (y.detach(), x.grad):
                if random_.random() < 0.5:
                    holder = random_.choice(holders)(t)
                    kept.append((holder, numbers(holder).clone()))
            random_.shuffle(kept)
            del kept[random_.randrange(6) :]
            for holder, expected in kept:
                if not torch.equal(numbers(holder), expected):
                    failures.append(f"thread {seed}")

    def numbers(holder: object) -> Tensor:
        if isinstance(holder, torch.UntypedStorage):
            return torch.empty(0).set_(holder)
        return holder if isinstance(holder, Tensor) else torch.from_numpy(holder)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(memory._kept.storages) > 4  # some have been kept, so there was something to find
