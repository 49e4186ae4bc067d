"""The adapters compute what the libraries' own modules compute, on the same rollouts, in one call of a layer."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cases import ULP32, error, float64_failures, scale
from torch import Tensor

import rnnfast
from rnnfast._autograd import op

Results = dict[str, np.ndarray]


def arrays(tensors: dict[str, Tensor]) -> Results:
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of all outputs, each element with a weight of its own; zeros where there is none."""
    weights = torch.Generator().manual_seed(3)
    loss = sum((y * torch.randn(y.shape, generator=weights, dtype=y.dtype)).sum() for y in outputs.values())
    return {
        f"d_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(
            leaves.items(), torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True
        )
    }


# -------------------------------------------------------------------------------------------- packages


@pytest.mark.parametrize(
    ("adapter", "package", "name"), [("sb3", "sb3_contrib", "sb3-contrib"), ("torchrl", "torchrl", "torchrl")]
)
def test_without_the_package(adapter: str, package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == package or m == f"rnnfast.rl.{adapter}"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "torchrl":
        pytest.importorskip("tensordict")
    with pytest.raises(ImportError, match=rf"rnnfast.rl.{adapter} needs {name}: pip install 'rnnfast\[rl\]'"):
        importlib.import_module(f"rnnfast.rl.{adapter}")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rnnfast.rl.nonsense


def test_rnnfast_imports_none_of_them(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    script = "import sys, rnnfast, rnnfast.rl; print({'sb3_contrib', 'torchrl', 'gymnasium'} & set(sys.modules))"
    done = run_python("-c", script)
    assert done.stdout == "set()\n", done.stderr


# ------------------------------------------------------------------------------------------ sb3-contrib


@pytest.fixture(scope="module")
def spaces() -> Any:
    pytest.importorskip("sb3_contrib")
    return pytest.importorskip("gymnasium").spaces


@pytest.fixture(scope="module")
def observations(spaces: Any) -> dict[str, Any]:
    """The observation space of each policy"""
    vector, image = spaces.Box(-3, 3, (4,), np.float32), spaces.Box(0, 255, (36, 36, 1), np.uint8)
    both = spaces.Dict({"image": image, "vector": vector})
    return {"MlpLstmPolicy": vector, "CnnLstmPolicy": image, "MultiInputLstmPolicy": both}


@pytest.fixture(scope="module")
def environment(spaces: Any) -> Callable[..., Any]:
    """Makes environments of random observations, whose episodes of 2 to 9 steps end or are cut off."""
    import gymnasium
    from stable_baselines3.common.env_util import make_vec_env

    class Random(gymnasium.Env):
        def __init__(self, observation_space: Any, action_space: Any) -> None:
            self.observation_space, self.action_space = observation_space, action_space

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            if seed is not None:
                self.observation_space.seed(seed)
            self.left = self.np_random.integers(2, 10)
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.left -= 1
            over, cut = self.left == 0, bool(self.np_random.random() < 0.5)
            return self.observation_space.sample(), float(np.sum(action)), over and not cut, over and cut, {}

    def make(observation_space: Any, action_space: Any = None) -> Any:
        made = {"observation_space": observation_space, "action_space": action_space or spaces.Discrete(3)}
        return make_vec_env(Random, n_envs=3, seed=0, env_kwargs=made)

    return make


def learned(policy: Any, env: Any, algorithm: Any = None, **policy_kwargs: Any) -> Any:
    """A model after a rollout of 3 times 24 steps and an update of two epochs, in batches that cut episodes in two."""
    from sb3_contrib import RecurrentPPO

    algorithm = algorithm or RecurrentPPO
    kwargs = {"optimizer_class": torch.optim.SGD, "lstm_hidden_size": 20} | policy_kwargs
    model = algorithm(
        policy, env, n_steps=24, batch_size=40, n_epochs=2, seed=0, device="cpu", policy_kwargs=kwargs, gae_lambda=0.9
    )
    return model.learn(72)


def batches(buffer: Any) -> list[Any]:
    np.random.seed(1)
    return list(buffer.get(40))


def in_float64(policy: Any) -> Any:
    """In training mode, with an extractor that takes numbers in float64."""

    def cast(_: Any, inputs: tuple[Any]) -> Any:
        (x,) = inputs
        return {key: value.double() for key, value in x.items()} if isinstance(x, dict) else x.double()

    policy.double().features_extractor.register_forward_pre_hook(cast)
    policy.set_training_mode(True)
    return policy


def in_double(states: Any) -> Any:
    h, c = (state.double() for state in states[:2])
    return states._replace(h=h, c=c) if hasattr(states, "_replace") else (h, c)


def evaluated(policy: Any, batch: Any) -> Results:
    """Values, log-probabilities and entropies of a batch, and the gradients of all parameters."""
    states = batch.lstm_states._replace(pi=in_double(batch.lstm_states.pi), vf=in_double(batch.lstm_states.vf))
    actions = batch.actions.double() if policy.action_space.shape else batch.actions.long().flatten()
    values, log_prob, entropy = policy.evaluate_actions(batch.observations, actions, states, batch.episode_starts)
    mask = batch.mask > 0
    outputs = {"values": values.flatten()[mask], "log_prob": log_prob[mask], "entropy": entropy[mask]}
    return arrays(outputs | gradients(outputs, dict(policy.named_parameters())))


CRITICS = {
    "separate": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "feedforward": {"enable_critic_lstm": False},
}


@pytest.mark.parametrize(
    ("name", "critic", "options"),
    [
        ("MlpLstmPolicy", "separate", {}),
        ("MlpLstmPolicy", "shared", {"n_lstm_layers": 2}),
        ("MlpLstmPolicy", "feedforward", {"n_lstm_layers": 3, "lstm_kwargs": {"bias": False}}),
        ("MlpLstmPolicy", "separate", {"n_lstm_layers": 2, "net_arch": {"pi": [7], "vf": []}}),
        ("CnnLstmPolicy", "separate", {}),
        ("MultiInputLstmPolicy", "shared", {}),
    ],
)
@pytest.mark.parametrize("continuous", [False, True])
def test_evaluation(
    name: str,
    critic: str,
    options: dict[str, Any],
    continuous: bool,
    observations: dict[str, Any],
    environment: Any,
    spaces: Any,
) -> None:
    """On a rollout of theirs, in float64: batches of padded sequences, some of which begin with an episode."""
    env = environment(observations[name], spaces.Box(-1, 1, (2,)) if continuous else None)
    options = options | CRITICS[critic]
    model = learned(name, env, **options)
    ours = getattr(rnnfast.rl.sb3, name)(
        model.observation_space, model.action_space, lambda _: 1e-3, **model.policy_kwargs
    )
    assert ours.load_state_dict(model.policy.state_dict(), strict=True)
    theirs, ours = in_float64(model.policy), in_float64(ours)
    lstms = 2 if critic == "separate" else 1
    unpadded = deepcopy(model.rollout_buffer)
    unpadded.__class__ = type(rnnfast.rl.sb3.RecurrentPPO(name, env, n_steps=24, device="cpu").rollout_buffer)
    for batch, few in zip(batches(model.rollout_buffer), batches(unpadded), strict=True):
        assert batch.lstm_states.pi[0].size(1) > 1 and batch.episode_starts.any() and not batch.mask.all()
        truth = evaluated(theirs, batch)
        with mock.patch.object(op, "recurrent", wraps=op.recurrent) as recurrent:
            assert float64_failures(evaluated(ours, batch), truth) == []
        assert recurrent.call_count == lstms
        assert few.mask.all() and len(few.mask) == batch.mask.sum()
        assert float64_failures(evaluated(ours, few), truth) == []
        assert float64_failures(evaluated(rnnfast.revert(ours), few), truth) == []
        rnnfast.convert(ours)


@pytest.mark.parametrize("starts", ["none", "first", "within", "every"])
@pytest.mark.parametrize(("T", "B", "L"), [(1, 3, 1), (7, 1, 2), (9, 4, 1)])
def test_process_sequence(starts: str, T: int, B: int, L: int, spaces: Any) -> None:
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    torch.manual_seed(0)
    lstm = torch.nn.LSTM(5, 6, num_layers=L, dtype=torch.float64)
    leaves = {
        "features": torch.randn(B * T, 5, dtype=torch.float64, requires_grad=True),
        "h": torch.randn(L, B, 6, dtype=torch.float64, requires_grad=True),
        "c": torch.randn(L, B, 6, dtype=torch.float64, requires_grad=True),
    }
    begins = {"none": torch.zeros(B, T), "every": torch.ones(B, T), "within": (torch.rand(B, T) < 0.4).float()}
    begins["first"] = torch.arange(T).expand(B, T).eq(0).float()

    def run(policy: Any, layer: torch.nn.LSTM) -> Results:
        output, (h, c) = policy._process_sequence(
            leaves["features"], (leaves["h"], leaves["c"]), begins[starts].flatten(), layer
        )
        outputs = {"output": output, "h_n": h, "c_n": c}
        return arrays(outputs | gradients(outputs, leaves | dict(layer.named_parameters())))

    truth = run(RecurrentActorCriticPolicy, lstm)
    ours = rnnfast.LSTM(5, 6, num_layers=L, dtype=torch.float64)
    ours.load_state_dict(lstm.state_dict())
    assert float64_failures(run(rnnfast.rl.sb3.MlpLstmPolicy, ours), truth) == []
    assert float64_failures(run(rnnfast.rl.sb3.MlpLstmPolicy, lstm), truth) == []  # as after rnnfast.revert


def after(model: Any) -> Results:
    """The rollout that was collected step by step, and what was learned from it."""
    buffer = model.rollout_buffer
    names = ("actions", "values", "log_probs", "returns", "hidden_states_pi", "cell_states_vf")
    return {name: np.asarray(getattr(buffer, name), dtype=float) for name in names} | arrays(
        dict(model.policy.state_dict())
    )


def test_learning_in_float32(observations: dict[str, Any], environment: Any) -> None:
    """A rollout and an update from one seed end where theirs end, as near as theirs do from weights that are moved by
    one unit of the last place."""
    from sb3_contrib.ppo_recurrent import MlpLstmPolicy

    class Moved(MlpLstmPolicy):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            with torch.no_grad():
                for weight in self.parameters():
                    weight *= 1 + ULP32 * torch.from_numpy(random.choice((-1.0, 1.0), weight.shape))

    def run(policy: Any, algorithm: Any = None) -> Results:
        return after(learned(policy, environment(observations["MlpLstmPolicy"]), algorithm, n_lstm_layers=2))

    truth = run(MlpLstmPolicy)
    moved = dict.fromkeys(truth, 0.0)
    for seed in range(4):
        random = np.random.default_rng(seed)
        near = run(Moved)
        moved = {name: max(moved[name], error(near[name], truth[name])) for name in truth}
    assert moved["actions"] == 0
    allowed = {name: 2 * moved[name] + ULP32 * scale(truth[name]) for name in truth}
    algorithm = rnnfast.rl.sb3.RecurrentPPO
    for ours in run(rnnfast.rl.sb3.MlpLstmPolicy), run("MlpLstmPolicy", algorithm), run(MlpLstmPolicy, algorithm):
        assert [name for name in truth if not error(ours[name], truth[name]) <= allowed[name]] == []


def test_models_are_saved_and_loaded(observations: dict[str, Any], environment: Any, tmp_path: Any) -> None:
    from sb3_contrib import RecurrentPPO

    policy, env = rnnfast.rl.sb3.MlpLstmPolicy, environment(observations["MlpLstmPolicy"])
    x = np.stack([observations["MlpLstmPolicy"].sample() for _ in range(3)])
    theirs, ours = learned("MlpLstmPolicy", env), learned(policy, env)
    for model in (theirs, ours):
        model.save(tmp_path / "model")
        loaded = RecurrentPPO.load(tmp_path / "model", env=env, custom_objects={"policy_class": policy}, device="cpu")
        assert type(loaded.policy) is policy
        assert type(loaded.policy.lstm_actor) is type(loaded.policy.lstm_critic) is rnnfast.LSTM
        same = [a.equal(b) for a, b in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True)]
        assert all(same)
        action, state = loaded.predict(x, deterministic=True)
        action, state = loaded.predict(x, state, np.array([True, False, False]), deterministic=True)
        expected, start = model.predict(x, deterministic=True)
        expected, start = model.predict(x, start, np.array([True, False, False]), deterministic=True)
        assert np.array_equal(action, expected)
        assert np.allclose(state[0], start[0], rtol=0, atol=4 * ULP32)
        loaded.learn(72, reset_num_timesteps=False)  # its optimizer has the parameters of its layers
        assert not any(a.equal(b) for a, b in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True))
    ours.save(tmp_path / "ours")
    assert type(RecurrentPPO.load(tmp_path / "ours", device="cpu").policy) is policy  # by its name
    unpadded = rnnfast.rl.sb3.RecurrentPPO.load(tmp_path / "ours", env=env, device="cpu")
    unpadded.learn(72, reset_num_timesteps=False)
    assert all(batch.mask.all() for batch in unpadded.rollout_buffer.get(40))


def test_own_ways_to_evaluate_a_batch_get_it_padded(observations: dict[str, Any], environment: Any) -> None:
    ours = rnnfast.rl.sb3.MlpLstmPolicy

    class Evaluates(ours):
        def evaluate_actions(self, *arguments: Any) -> Any:
            return super().evaluate_actions(*arguments)

    class Processes(ours):
        _process_sequence = staticmethod(lambda *arguments: ours._process_sequence(*arguments))

    class Neither(ours):
        pass

    env = environment(observations["MlpLstmPolicy"])
    for policy, padded in ((Evaluates, True), (Processes, True), (Neither, False), ("MlpLstmPolicy", False)):
        model = learned(policy, env, rnnfast.rl.sb3.RecurrentPPO)
        assert any(not batch.mask.all() for batch in batches(model.rollout_buffer)) == padded


def test_a_policy_alone_is_saved_and_loaded(observations: dict[str, Any], tmp_path: Any) -> None:
    space = observations["MlpLstmPolicy"]
    from gymnasium.spaces import Discrete

    policy = rnnfast.rl.sb3.MlpLstmPolicy(space, Discrete(2), lambda _: 1e-3)
    policy.save(tmp_path / "policy")
    loaded = rnnfast.rl.sb3.MlpLstmPolicy.load(tmp_path / "policy", device="cpu")
    assert type(loaded.lstm_critic) is rnnfast.LSTM
    assert all(a.equal(b) for a, b in zip(policy.parameters(), loaded.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------- torchrl


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("torchrl.modules")


KEYS = {"in_key": "observation", "out_key": "features"}
STATES = {"LSTMModule": ("recurrent_state_h", "recurrent_state_c"), "GRUModule": ("recurrent_state",)}


def pair(theirs: Any, name: str, layers: int = 1, **options: Any) -> tuple[Any, Any]:
    """torchrl's module and rnnfast's with the same weights, in float64: sizes 3 and 5"""
    torch.manual_seed(0)
    made = [
        getattr(library, name)(3, 5, layers, **(KEYS | options)).double() for library in (theirs, rnnfast.rl.torchrl)
    ]
    assert made[1].load_state_dict(made[0].state_dict(), strict=True)
    return made[0], made[1]


def rollout(name: str, shape: tuple[int, ...], layers: int = 1, proj: int = 0, rate: float = 0.3) -> Any:
    """What a collector records: a state at every step, zero where an episode begins, but not at the first step, which
    a batch may cut out of an episode, or start from a state of its own."""
    from tensordict import TensorDict

    torch.manual_seed(1)
    begins = torch.rand(*shape, 1) < rate
    data = {"observation": torch.randn(*shape, 3, dtype=torch.float64), "is_init": begins}
    for key, size in zip(STATES[name], (proj or 5, 5), strict=False):
        state = torch.randn(*shape, layers, size, dtype=torch.float64)
        state[..., 1:, :, :].masked_fill_(begins[..., 1:, :, None], 0)
        data[key] = state
    return TensorDict(data, batch_size=shape)


def run(module: Any, data: Any) -> Results:
    """In recurrent mode: features, recorded states, gradients of all parameters."""
    from torchrl.modules import set_recurrent_mode

    with set_recurrent_mode(True):
        done = module(data)
    assert done is data
    outputs = {str(key): done[key] for key in module.out_keys}
    return arrays(outputs | gradients(outputs, dict(module.named_parameters())))


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 7), (3, 1)])
@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("LSTMModule", 1, {}),
        ("LSTMModule", 2, {"bias": False}),
        ("LSTMModule", 2, {"proj_size": 2}),
        ("GRUModule", 1, {}),
        ("GRUModule", 3, {"recurrent_backend": "auto"}),
    ],
)
def test_recurrent_mode(name: str, layers: int, options: dict[str, Any], shape: tuple[int, ...], theirs: Any) -> None:
    by_torch, ours = pair(theirs, name, layers, **options)
    for rate in (0.0, 0.3, 1.0):
        data = rollout(name, shape, layers, options.get("proj_size", 0), rate)
        truth = run(by_torch, data.clone())
        with mock.patch.object(op, "unroll", wraps=op.unroll) as unroll:
            assert float64_failures(run(ours, data.clone()), truth) == []
        assert unroll.call_count == (rate > 0 and shape[-1] > 1)


@pytest.mark.parametrize("name", list(STATES))
def test_without_recorded_states(name: str, theirs: Any) -> None:
    by_torch, ours = pair(theirs, name, 2)
    data = rollout(name, (4, 9), 2).exclude(*STATES[name])
    assert float64_failures(run(ours, data.clone()), run(by_torch, data.clone())) == []
    with pytest.raises(KeyError, match="observation"):
        run(ours, data.exclude("observation"))
    if name == "LSTMModule":
        half = data.set("recurrent_state_h", torch.zeros(4, 9, 2, 5, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="hidden1"):
            run(ours, half)


@pytest.mark.parametrize("name", list(STATES))
@pytest.mark.parametrize("learned", [False, True])
def test_episodes_that_begin_in_another_state(name: str, learned: bool, theirs: Any) -> None:
    """They are no resets; neither are zeros that are learned."""
    by_torch, ours = pair(theirs, name)
    data = rollout(name, (4, 9))
    starts = {key: data[key].clone() for key in STATES[name]}
    if learned:
        starts = {key: state.requires_grad_() for key, state in starts.items()}
    else:
        starts[STATES[name][-1]][data["is_init"].squeeze(-1)] = 0.25
    results = []
    for module in (by_torch, ours):
        with theirs.set_recurrent_mode(True):
            features = module(data.clone().update(starts))["features"]
        results.append(arrays({"features": features} | (gradients({"features": features}, starts) if learned else {})))
    assert float64_failures(results[1], results[0]) == []


@pytest.mark.parametrize("name", list(STATES))
def test_a_step_at_a_time(name: str, theirs: Any) -> None:
    by_torch, ours = pair(theirs, name, 2)
    data = rollout(name, (6,), 2)
    expected, got = by_torch(data.clone()), ours(data.clone())
    both = [arrays({str(key): done[key] for key in ours.out_keys}) for done in (got, expected)]
    assert float64_failures(*both) == []


@pytest.mark.parametrize("name", list(STATES))
def test_ways_that_stay_torchrls(name: str, theirs: Any) -> None:
    attribute = "lstm" if name == "LSTMModule" else "gru"
    layer = getattr(torch.nn, attribute.upper())(3, 5, 1, batch_first=True, dtype=torch.float64)
    ours = getattr(rnnfast.rl.torchrl, name)(**KEYS, **{attribute: layer})
    assert getattr(ours, attribute) is layer and type(layer) is getattr(rnnfast, attribute.upper())
    by_torch, _ = pair(theirs, name)
    by_torch.load_state_dict(ours.state_dict())
    data = rollout(name, (4, 9))
    truth = run(by_torch, data.clone())
    assert ours.make_python_based() is ours and not isinstance(getattr(ours, attribute), rnnfast._layer.Layer)
    assert ours.make_cudnn_based() is ours and type(getattr(ours, attribute)) is getattr(rnnfast, attribute.upper())
    assert float64_failures(run(ours, data.clone()), truth) == []

    for options in ({"bidirectional": True}, {"python_based": True}):
        by_torch, ours = pair(theirs, name, **options)
        data = rollout(name, (4, 9), 1 + options.get("bidirectional", False))
        assert float64_failures(run(ours, data.clone()), run(by_torch, data.clone())) == []


@pytest.mark.parametrize("name", list(STATES))
def test_parameters_from_outside(name: str, theirs: Any) -> None:
    """As torchrl's losses call a module."""
    from tensordict import from_module

    by_torch, ours = pair(theirs, name)
    data = rollout(name, (4, 9))
    results = []
    for module in (by_torch, ours):
        twice = (from_module(module) * 2).detach().requires_grad_()
        with twice.to_module(module), theirs.set_recurrent_mode(True):
            features = module(data.clone())["features"]
        leaves = dict(twice.flatten_keys(".").items())
        results.append(arrays({"features": features} | gradients({"features": features}, leaves)))
    assert len(results[0]) == 5
    assert float64_failures(results[1], results[0]) == []


@pytest.mark.parametrize("name", list(STATES))
def test_in_an_environment(name: str, theirs: Any) -> None:
    """Collected step by step with the primer's states, then evaluated at once: the same features."""
    pytest.importorskip("gymnasium")
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.envs import GymEnv, InitTracker, TransformedEnv

    torch.manual_seed(0)
    ours = getattr(rnnfast.rl.torchrl, name)(4, 8, 2, **KEYS)
    head = TensorDictModule(torch.nn.Linear(8, 2), in_keys=["features"], out_keys=["logits"])
    draw = TensorDictModule(
        lambda z: torch.nn.functional.one_hot(torch.distributions.Categorical(logits=z).sample(), 2),
        in_keys=["logits"],
        out_keys=["action"],
    )
    env = TransformedEnv(GymEnv("CartPole-v1"), InitTracker())
    env.append_transform(ours.make_tensordict_primer())
    env.set_seed(0)
    with torch.no_grad():
        data = env.rollout(60, TensorDictSequential(ours, head, draw), break_when_any_done=False)
        assert data["is_init"][1:].any()
        with theirs.set_recurrent_mode(True), mock.patch.object(op, "unroll", wraps=op.unroll) as unroll:
            at_once = ours(data.clone())
    assert unroll.call_count == 1
    moved = 60 * 16 * ULP32  # sums of sixteen products, a step after the other
    assert error(at_once["features"].numpy(), data["features"].numpy()) <= moved


# -------------------------------------------------------------------------------------------- benchmark


def test_benchmark(spaces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("rich")
    from benchmarks import rl

    monkeypatch.setattr(rl, "SIZES", (rl.Size(8, 1, 12),))
    monkeypatch.setattr(rl, "T", 6)
    path = tmp_path / "rl.json"
    arguments = ["--threads", "1", "--seconds", "0", "--json", str(path), "--markdown", str(tmp_path / "rl.md")]
    assert rl.main(arguments) == 0
    data = json.loads(path.read_text())
    assert data["env"]["command"] == shlex.join(["python", "-m", "benchmarks.rl", *arguments])
    assert data["env"]["versions"]["sb3-contrib"] and len(data["results"]) == 2 * 3
    for k, row in enumerate(data["results"]):
        first = data["results"][k // 3 * 3]
        assert row["impl"] == list(rl.ALGORITHMS)[k % 3] and row["check"] == "ok"
        assert row["frames_per_s"] == pytest.approx(6 * 8 / row["median_s"])
        assert row["ratio_vs_sb3-contrib"] == pytest.approx(first["median_s"] / row["median_s"])
    assert "| train | H8 L1 N12 |" in (tmp_path / "rl.md").read_text()

    class Wrong(rnnfast.rl.sb3.MlpLstmPolicy):
        @staticmethod
        def _process_sequence(*arguments: Any) -> Any:
            output, states = rnnfast.rl.sb3.MlpLstmPolicy._process_sequence(*arguments)
            return 1.01 * output, states

    monkeypatch.setitem(rl.ALGORITHMS, "rnnfast policy", (rl.RecurrentPPO, Wrong))
    assert rl.main(arguments) == 1
    assert "WRONG train H8 L1 N12: values: off by" in capsys.readouterr().out
