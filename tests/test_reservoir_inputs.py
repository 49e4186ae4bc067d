"""What users call echo state networks with and in: lists, odd arrays, defaults of torch's that are not its own, forked
processes. The right numbers in kind, or an error that names what was given and what was expected."""

from __future__ import annotations

import ast
import graphlib
import inspect
import os
import re
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rnnfast.reservoir
from rnnfast.reservoir import EchoState, fit_many, predict_many


def data(T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x (T,2), y (T,2): x one step before, and some noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, 2))
    return x, np.concatenate([np.zeros((1, 2)), x[:-1]])[:T] + 0.1 * rng.normal(size=(T, 2))


def network(**options) -> EchoState:
    return EchoState(2, 20, 2, **({"density": 0.4, "leak": 0.7, "bias_scale": 0.3} | options))


# ------------------------------------------------------------------------------------------ defaults of torch's


@contextmanager
def set_for_a_while(change: Callable, value: Any, back: Any):
    change(value)
    try:
        yield
    finally:
        change(back)


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "device": lambda: torch.device("meta"),
    "default device": lambda: set_for_a_while(torch.set_default_device, "meta", None),
    "default dtype": lambda: set_for_a_while(torch.set_default_dtype, torch.float16, torch.float32),
    "autocast": lambda: torch.autocast("cpu"),
    "inference mode": torch.inference_mode,
}


def everything(x: Any, y: Any, dtype: str) -> list[np.ndarray]:
    """Each of the public functions, with data on the CPU."""
    esn, looped = network(dtype=dtype), network(dtype=dtype, feedback=0.3, noise=0.01)
    esn.fit(x, y, ridge=[1e-3, 1e-1], washout=10)
    results = [esn.W_out_.copy(), esn.predict(x), esn.states(x), esn.generate(4), esn.state_, esn.output_]
    results += [esn.score(x, y, washout=5), *esn.predict([x, x[:7]], state=[esn.state_] * 2)]
    results.append(esn.module()(torch.from_numpy(np.asarray(x, dtype)))[1].detach())
    esn.partial_fit(x, y, forgetting=0.9)
    results.append(esn.W_out_.copy())
    esn.fit(x, y, ridge=[1e-3, 1e-1], washout=10, warm_start=True, validation=(x, y))
    results.append(esn.W_out_.copy())
    looped.partial_fit(x, y, ridge=1e-3).partial_fit(x, y)
    results += [looped.W_out_.copy(), looped.predict(x[:9]), looped.generate(4, x[:4]), looped.states(x, y)]
    many = fit_many([network(dtype=dtype, leak=a) for a in (0.4, 0.8)], x, y, washout=10)
    return [np.asarray(result) for result in results + predict_many(many, x)]


@pytest.mark.parametrize("tensors", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_defaults_of_torch(name: str, tensors: bool) -> None:
    dtype = "float32" if name == "autocast" else "float64"
    x, y = (torch.from_numpy(a) for a in data(60)) if tensors else data(60)
    want = everything(x, y, dtype)
    with CONTEXTS[name]():
        got = everything(x, y, dtype)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_between_inference_mode_and_none() -> None:
    """What is kept in the one is used in the other."""
    x, y = data(100)
    with torch.inference_mode():
        esn = network().fit(x, y, washout=10)
        online = network().partial_fit(x, y)
        layer = esn.module().requires_grad_()
    esn.fit(x, y, washout=10, warm_start=True).partial_fit(x, y)
    online.partial_fit(x, y)
    np.testing.assert_allclose(online.W_out_, network().partial_fit(x, y).partial_fit(x, y).W_out_, rtol=1e-12)
    layer(torch.from_numpy(x))[0].sum().backward()


def test_inside_a_transform() -> None:
    """Numbers from outside are numbers; what the transform follows is an error."""
    x, y = data(100)
    esn = network().fit(x, y, washout=10)
    constant = torch.from_numpy(x)
    got = torch.func.vmap(lambda a: a * esn.predict(constant))(torch.ones(3, 1))
    assert np.array_equal(got[1], esn.predict(x))
    for transformed in (torch.func.vmap(esn.predict), torch.func.grad(lambda x: esn.predict(x).sum())):
        with pytest.raises(ValueError, match=r"x: .*module"):
            transformed(torch.stack([constant, constant]))


# ------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("feedback", [0.0, 0.3])
def test_lists(feedback: float, kind: Callable) -> None:
    """As a call for each, in kind."""
    pairs = [tuple(map(kind, data(T, seed=T))) for T in (60, 45, 1)]
    xs, ys = ([pair[i] for pair in pairs] for i in (0, 1))
    esn = network(feedback=feedback).fit(xs[:2], ys[:2], ridge=1e-2, washout=10)
    starts = np.random.default_rng(1).normal(size=(3, 20))
    fed_back = ys if feedback else None
    for listed, each in [
        (esn.predict(xs), [esn.predict(x) for x in xs]),
        (esn.predict(tuple(xs), state=list(starts)), [esn.predict(xs[k], state=starts[k]) for k in range(3)]),
        (esn.predict(xs, state=starts), [esn.predict(xs[k], state=starts[k]) for k in range(3)]),
        (esn.predict(xs, state=starts[0]), [esn.predict(x, state=starts[0]) for x in xs]),
        (esn.states(xs, fed_back), [esn.states(x, y if feedback else None) for x, y in pairs]),
    ]:
        assert isinstance(listed, list) and len(listed) == 3
        for a, b in zip(listed, each, strict=True):
            assert type(a) is type(b) and np.array_equal(a, b)
    esn.predict(xs[0])
    state = esn.state_
    esn.predict([xs[1], xs[0]])
    assert np.array_equal(esn.state_, state)  # of the last one
    residual = np.concatenate([(ys[i] - esn.predict(xs[i]))[5:] for i in (0, 1)])
    targets = np.concatenate([ys[i][5:] for i in (0, 1)])
    total = ((targets - targets.mean(0)) ** 2).sum(0)
    assert esn.score(xs[:2], ys[:2], washout=5) == pytest.approx((1 - (residual**2).sum(0) / total).mean())


def test_lists_in_closed_loop() -> None:
    x, y = data(80)
    esn = network(feedback=0.3).fit(x, y, ridge=1e-1, washout=10)
    state, output = esn.state_, esn.output_
    starts, before = np.stack([state, -state]), np.stack([output, 2 * output])
    listed = esn.generate(5, [x[:5], x[5:10]], state=starts, output=list(before))
    assert isinstance(listed, list)
    for k in (0, 1):
        assert np.array_equal(listed[k], esn.generate(5, x[5 * k : 5 * k + 5], state=starts[k], output=before[k]))
    esn.states(x, y)
    for got, part in zip(esn.generate(5, [x[:5], x[5:10]]), (x[:5], x[5:10]), strict=True):  # each from where it ended
        assert np.array_equal(got, esn.generate(5, part, state=state, output=output))
    alone = EchoState(0, 20, 2, density=0.4, feedback=0.5).fit(None, [y, y[:50]], ridge=1e-2, washout=10)
    assert [len(h) for h in alone.states(None, [y[:20], y[:5]])] == [20, 5]


def test_many_with_lists() -> None:
    pairs = [data(T, seed=T) for T in (60, 45)]
    xs, ys = ([pair[i] for pair in pairs] for i in (0, 1))
    networks = fit_many([network(leak=a) for a in (0.3, 0.6)], xs, ys, washout=10)
    for esn, listed in zip(networks, predict_many(networks, xs), strict=True):
        assert isinstance(listed, list)
        for x, got in zip(xs, listed, strict=True):
            np.testing.assert_allclose(got, esn.predict(x), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------ nothing, and odd things


def test_no_steps_and_no_sequences() -> None:
    """Empty results; a network that has learned nothing and is where it was."""
    x, y = data(80)
    for esn in (network(), network(feedback=0.3)):
        esn.fit(x, y, ridge=1e-2, washout=10)
        before = esn.state_, esn.output_, esn.W_out_.copy()
        assert esn.predict(x[:0]).shape == (0, 2) and esn.states(x[:0], y[:0]).shape == (0, 20)
        assert esn.predict(np.zeros((3, 0, 2))).shape == (3, 0, 2)
        esn.partial_fit(x[:0], y[:0])
        for a, b in zip((esn.state_, esn.output_), before[:2], strict=True):
            assert np.array_equal(a, b)
        np.testing.assert_allclose(esn.W_out_, before[2], rtol=1e-8, atol=1e-10)
        none = np.zeros((0, 7, 2))
        assert esn.predict(none).shape == (0, 7, 2) and esn.states(none, none).shape == (0, 7, 20)
        assert esn.generate(4, none[:, :4] if esn.feedback else None, state=np.zeros((0, 20))).shape == (0, 4, 2)
    networks = fit_many([network(leak=a) for a in (0.3, 0.6)], x, y, washout=10)
    assert [r.shape for r in predict_many(networks, none)] == [(0, 7, 2)] * 2
    assert [r.shape for r in predict_many(networks, x[:0])] == [(0, 2)] * 2
    assert not network().partial_fit(x[:0], y[:0]).predict(x).any()


X = data(150)[0]
MASKED = np.ma.array(X, mask=np.arange(300).reshape(150, 2) == 7)
ODD: dict[str, tuple[Any, str]] = {
    "complex": (X + 0j, "real numbers.*complex128"),
    "complex tensor": (torch.from_numpy(X) + 0j, "real numbers.*complex128"),
    "strings": (X.astype(str), "real numbers.*dtype <U"),
    "strings in objects": (X.astype(str).astype(object), "real numbers.*dtype object"),
    "None in objects": (np.where(X > 2, None, X), "real numbers.*dtype object"),
    "dates": (np.zeros((150, 2), "datetime64[s]"), "real numbers.*datetime64"),
    "dictionary": ({"a": 1}, "real numbers.*'a'"),
    "number": (3.0, r"\(T,2\).*\(\)"),
    "one dimension": (X[:, 0], r"\(T,2\).*\(150,\)"),
    "four dimensions": (X[None, None], r"\(T,2\).*\(1, 1, 150, 2\)"),
    "width": (X[:, :1], r"\(T,2\).*\(150, 1\)"),
    "masked": (MASKED, "finite.*nan.*step 3, column 1"),
    "nan": (np.where(X > 2, np.nan, X), "finite.*nan"),
    "sparse": (torch.from_numpy(X).to_sparse(), "dense.*sparse_coo"),
    "meta": (torch.empty(150, 2, device="meta"), "numbers.*meta"),
    "in a list": ([X, X[:, :1]], r"\[1\].*\(T,2\).*\(150, 1\)"),
    "nan in a list": ([X, X * np.nan], r"\[1\].*finite.*nan"),
    "list of lists": (X.tolist(), r"\[0\].*\(T,2\).*\(2,\)"),
    "uneven rows": ([[[1.0, 2.0], [3.0]]], r"\[0\].*real numbers"),
    "empty list": ([], "at least one sequence"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_arrays(name: str) -> None:
    """In every place that takes sequences."""
    odd, message = ODD[name]
    x, y = data(150)
    other = [y] * max(1, len(odd)) if isinstance(odd, list) and len(odd) != 150 else y
    other = [y[:1]] * 150 if name == "list of lists" else other
    other = [] if name == "empty list" else other
    esn, looped = network().fit(x, y), network(feedback=0.3).fit(x, y, ridge=1e-2)
    before = esn.W_out_.copy(), esn.state_
    calls: list[tuple[str, Callable]] = [
        ("x", lambda: esn.predict(odd)),
        ("x", lambda: esn.states(odd)),
        ("x", lambda: esn.fit(odd, other)),
        ("x", lambda: esn.partial_fit(odd, other)),
        ("x", lambda: esn.score(odd, other)),
        ("x", lambda: looped.generate(150, odd)),
        ("x", lambda: predict_many([esn], odd)),
        ("x", lambda: fit_many([esn], odd, other)),
    ]
    if name != "empty list":
        calls += [
            ("y", lambda: esn.fit(other if isinstance(odd, list) else x, odd)),
            ("y", lambda: esn.partial_fit(other if isinstance(odd, list) else x, odd)),
            ("y", lambda: looped.states(other if isinstance(odd, list) else x, odd)),
        ]
    for argument, call in calls:
        with pytest.raises(ValueError, match=f"^{argument}.*{message}"):
            call()
    assert np.array_equal(esn.W_out_, before[0]) and np.array_equal(esn.state_, before[1])


def test_numbers_of_any_kind() -> None:
    """Integers, bools, low precision and objects that are numbers are taken as what they mean."""
    x, y = data(80)
    esn = network().fit(x, y, washout=10)
    whole = np.round(x)
    for other in (whole.astype(int), whole.astype(object), torch.from_numpy(whole).half(), whole.astype(np.float16)):
        assert np.array_equal(esn.predict(other), esn.predict(whole))
    for other in (x > 0, torch.from_numpy(x) > 0):
        assert np.array_equal(esn.predict(other), esn.predict((x > 0).astype(float)))
    for other in (np.asfortranarray(x), np.repeat(x, 2, 0)[::2], x[::-1][::-1], np.ma.array(x)):
        assert np.array_equal(esn.predict(other), esn.predict(x))


def test_odd_states_and_settings() -> None:
    x, y = data(80)
    esn, looped = network().fit(x, y, washout=10), network(feedback=0.3).fit(x, y, ridge=1e-2, washout=10)
    batch = network().fit(np.stack([x, x]), np.stack([y, y]), washout=10)
    nothing = np.zeros((0, 8, 2))
    for call, message in [
        (lambda: esn.predict(x, state=np.zeros(20) + 1j), "state.*real numbers.*complex128"),
        (lambda: esn.predict(x, state=np.full(20, np.nan)), "state.*finite.*nan"),
        (lambda: esn.predict([x, x], state=[np.zeros(20)]), "state.*2 sequences, got 1"),
        (lambda: esn.generate(5, state=[[1.0], [1.0, 2.0]]), "state.*real numbers"),
        (lambda: looped.generate(5, x[:5], output=np.zeros(3)), r"output.*\(2,\).*\(3,\)"),
        (lambda: esn.generate(2.5), "steps.*2.5"),
        (lambda: esn.fit(x, y, washout=1.5), "washout.*1.5"),
        (lambda: esn.score(x, y, washout=-3), "washout.*-3"),
        (lambda: esn.partial_fit(x, y, washout=-3), "washout.*-3"),
        (lambda: esn.partial_fit(x, y, forgetting="a"), "forgetting.*'a'"),
        (lambda: network().partial_fit(x, y, ridge=None), "ridge.*None"),
        (lambda: esn.fit(x, y, ridge="a"), "ridge.*'a'"),
        (lambda: esn.fit(x, y, ridge=[1, 2], washout=9, validation=x), r"validation.*\(x, y\).*ndarray"),
        (lambda: network(leak="a"), "leak.*'a'"),
        (lambda: network(input_scale="a"), "input_scale.*'a'"),
        (lambda: esn.fit(nothing, nothing), r"at least one sequence.*\(0, 8, 2\)"),
        (lambda: esn.fit(x[:0], y[:0], washout=0), "more steps.*washout of 0.*T=0"),
        (lambda: esn.fit([x, x[:9]], [y, y[:9]], washout=10), r"x\[1\].*more steps.*T=9"),
        (lambda: esn.score(x[:0], y[:0]), "more than one step.*got 0"),
        (lambda: esn.partial_fit(nothing, nothing), "one sequence.*got 0"),
        (lambda: batch.partial_fit(x, y), r"one sequence.*ended with 2.*\[x\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: fit_many(esn, x, y), lambda: fit_many(["a"], x, y), lambda: predict_many(esn, x)):
        with pytest.raises(TypeError, match="networks: expected a list of EchoState"):
            call()


# ------------------------------------------------------------------------------------------ forked processes

FORK = """
    import os
    import numpy as np
    import torch
    from rnnfast.reservoir import EchoState, fit_many

    torch.set_num_threads(2)
    x = np.random.default_rng(0).normal(size=(900, 2))
    y = np.roll(x, 1, 0)

    def run():
        esn = EchoState(2, 120, 2).fit(x, y, ridge=[1e-3, 1e-1])
        looped = EchoState(2, 120, 2, feedback=0.1).partial_fit(x, y, ridge=1e-2)
        results = [esn.predict(x), esn.states(x), esn.generate(9), looped.predict(x), looped.W_out_]
        results.append(fit_many([EchoState(2, 120, 2, leak=a) for a in (0.3, 0.9)], x, y)[1].W_out_)
        with torch.no_grad():
            results += [t.numpy() for t in esn.module()(torch.from_numpy(x))]
        return results + [esn.score(x, y), esn.partial_fit(x, y, forgetting=0.99).W_out_]

    want = run()
    child = os.fork()
    if child == 0:
        same = all(np.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(run(), want, strict=True))
        os._exit(0 if same and torch.get_num_threads() == 2 else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.get_num_threads())

    from joblib import parallel_backend
    from sklearn.model_selection import GridSearchCV, TimeSeriesSplit

    search = GridSearchCV(EchoState(2, 120, 2), {"leak": [0.05, 0.9]}, cv=TimeSeriesSplit(2, test_size=100), n_jobs=2)
    with parallel_backend("multiprocessing"):
        search.fit(x, y)
    print(search.best_params_["leak"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_fork(run_python: Callable) -> None:
    """The parent's threads are not there: torch's operators must not wait for them. In a child, and in scikit-learn's
    workers."""
    result = run_python("-c", textwrap.dedent(FORK), timeout=120)
    assert (result.stdout, result.returncode) == ("0 2\n0.9\n", 0), result.stderr


# ------------------------------------------------------------------------------------------ the package


def test_modules_do_not_import_in_circles() -> None:
    folder = Path(inspect.getfile(rnnfast.reservoir)).parent
    graph = {}
    for path in folder.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        imported = (node.module or "" for node in nodes if isinstance(node, ast.ImportFrom))
        graph[path.stem] = {name.split(".")[-1] for name in imported if re.match(r"rnnfast\.reservoir\.\w+$", name)}
    graphlib.TopologicalSorter(graph).prepare()
