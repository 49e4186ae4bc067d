"""What autograd and torch.compile make of a layer: second derivatives, forward mode, vmap, a compiled model.

Beside torch, where it can do the job, stands "plain": rnnfast's own pass without the transform, which tells what the
transform costs. The loss is Σ y². Results are compared with those of the first contender of a job: torch's,
a compiled model's with the eager one's, and forward mode's with differences in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.func import functional_call, grad, jvp, vmap

from benchmarks.contenders import LIBRARIES, Contender, Data, as_contender, load_module, make_data
from benchmarks.grid import Job, Shape
from benchmarks.timing import Run, Timing, first_call

Named = dict[str, Tensor]
Function = Callable[[Named], Named]

STEP = 1e-6  # of differences in float64: their error is STEP² and 1e-16 / STEP, both far below float32's


def make_contenders(job: Job, device: str) -> list[Contender]:
    """All who can do the job; the first has the results that the others must have."""
    return MAKERS[job.kind](job, make_data(job.shape, device), device)


def torch_can(job: Job) -> bool:
    """Forward mode over torch.nn.LSTM is not implemented, vmap over torch.nn.RNN fails in an in-place addition."""
    if job.kind == "per_sample":
        return job.shape.cell == "lstm"
    return job.kind == "double_backward" or job.shape.cell != "lstm"


def _names(job: Job) -> list[str]:
    return [name for name in LIBRARIES if name != "torch" or torch_can(job)]


def _loss(module: torch.nn.Module, weights: Named, x: Tensor) -> Tensor:
    return functional_call(module, weights, (x,))[0].square().sum()


def _constants(module: torch.nn.Module) -> Named:
    return {key: weight.detach() for key, weight in module.named_parameters()}


def _prefixed(prefix: str, tensors: Named) -> Named:
    return {prefix + key: a.detach().cpu() for key, a in tensors.items()}


def _plain_gradient(module: torch.nn.Module, x: Tensor) -> Callable[[], Named]:
    """Forward and backward; the gradients come back."""
    weights = dict(module.named_parameters())

    def run() -> Named:
        grads = torch.autograd.grad(module(x)[0].square().sum(), tuple(weights.values()))
        return dict(zip(weights, grads, strict=True))

    return run


# ------------------------------------------------------------------------------------------ reverse mode


def _double_backward(job: Job, data: Data, device: str) -> list[Contender]:
    """The gradient of |dloss/dweights|²."""

    def contender(name: str) -> Contender:
        module = load_module(LIBRARIES[name], job.shape, data, device)
        weights = dict(module.named_parameters())

        def run() -> Named:
            loss = module(data.x)[0].square().sum()
            grads = torch.autograd.grad(loss, tuple(weights.values()), create_graph=True)
            seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), tuple(weights.values()))
            return dict(zip(weights, seconds, strict=True))

        return Contender(name, run, lambda: _prefixed("dd_", run()))

    return [contender(name) for name in _names(job)]


def _per_sample(job: Job, data: Data, device: str) -> list[Contender]:
    """vmap of grad over the batch. The samples' gradients add up to that of the batch."""

    def contender(name: str) -> Contender:
        module = load_module(LIBRARIES[name], job.shape, data, device)
        weights = _constants(module)
        of_sample = vmap(grad(lambda weights, x: _loss(module, weights, x.unsqueeze(1))), in_dims=(None, 1))  # x (T,I)

        def run() -> Named:
            return of_sample(weights, data.x)

        def results() -> Named:
            grads = run()
            return _prefixed("each_d_", grads) | _prefixed("d_", {key: g.sum(0) for key, g in grads.items()})

        return Contender(name, run, results)

    run = _plain_gradient(load_module(LIBRARIES["rnnfast"], job.shape, data, device), data.x)
    plain = Contender("plain", run, lambda: _prefixed("d_", run()))
    others = [contender(name) for name in _names(job)]
    return [*others, plain] if torch_can(job) else [_with_samples(plain, job, data, device), *others]


def _with_samples(plain: Contender, job: Job, data: Data, device: str) -> Contender:
    """`plain` with each sample's gradient from a backward pass of its own, where torch's vmap does not give them."""

    def results() -> Named:
        module = load_module(LIBRARIES["torch"], job.shape, data, device)
        each = [_plain_gradient(module, x)() for x in data.x.split(1, dim=1)]
        return plain.results() | _prefixed("each_d_", {key: torch.stack([g[key] for g in each]) for key in each[0]})

    return Contender(plain.name, plain.run, results)


# ------------------------------------------------------------------------------------------ forward mode


def _jvp_input(job: Job, data: Data, device: str) -> list[Contender]:
    """The tangent of y for one of x, beside y alone; neither records a graph."""
    direction = torch.randn_like(data.x)

    def contender(name: str) -> Contender:
        module = load_module(LIBRARIES[name], job.shape, data, device)

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            return jvp(lambda x: module(x)[0], (data.x,), (direction,))

        return Contender(name, run, lambda: _prefixed("", {"y_dot": run()[1]}))

    def truth() -> Named:
        module = _double(job.shape, data, device)
        with torch.no_grad():
            return _difference(lambda at: {"y_dot": module(at["x"])[0]}, {"x": data.x}, {"x": direction})

    forward = torch.no_grad()(load_module(LIBRARIES["rnnfast"], job.shape, data, device))
    return [Contender("plain", partial(forward, data.x), truth), *map(contender, _names(job))]


def _jvp_weights(job: Job, data: Data, device: str) -> list[Contender]:
    """The tangent of y for one of all weights."""

    def y_of(module: torch.nn.Module, x: Tensor, weights: Named) -> Named:
        return {"y_dot": functional_call(module, weights, (x,))[0]}

    return _along_weights(job, data, device, y_of, partial)


def _hessian_vector(job: Job, data: Data, device: str) -> list[Contender]:
    """Forward over reverse: the derivative of the gradient along a direction of the weights."""

    def gradient_of(module: torch.nn.Module, x: Tensor, weights: Named) -> Named:
        return grad(partial(_loss, module))(weights, x)

    return _along_weights(job, data, device, gradient_of, _plain_gradient)


def _along_weights(
    job: Job,
    data: Data,
    device: str,
    function: Callable[[torch.nn.Module, Tensor, Named], Named],
    plain: Callable[[torch.nn.Module, Tensor], Run],
) -> list[Contender]:
    """jvp of function(module, x, ·) in the weights; plain(module, x) is what it is measured by."""
    modules = {name: load_module(library, job.shape, data, device) for name, library in LIBRARIES.items()}
    weights = _constants(modules["rnnfast"])
    direction = {key: torch.randn_like(weight) for key, weight in weights.items()}

    def contender(name: str) -> Contender:
        def run() -> tuple[Named, Named]:
            return jvp(partial(function, modules[name], data.x), (weights,), (direction,))

        return Contender(name, run, lambda: _prefixed("", run()[1]))

    def truth() -> Named:
        return _difference(partial(function, _double(job.shape, data, device), data.x.double()), weights, direction)

    return [Contender("plain", plain(modules["rnnfast"], data.x), truth), *map(contender, _names(job))]


def _double(shape: Shape, data: Data, device: str) -> torch.nn.Module:
    return load_module(torch.nn, shape, data, device).double()


def _difference(function: Function, at: Named, direction: Named) -> Named:
    """Central difference of `function` along a direction, in float64."""

    def moved(step: float) -> Named:
        return function({key: a.double() + step * direction[key].double() for key, a in at.items()})

    up, down = moved(STEP), moved(-STEP)
    return _prefixed("", {key: (up[key] - down[key]) / (2 * STEP) for key in up})


# ---------------------------------------------------------------------------------------- torch.compile


def _compiled(job: Job, data: Data, device: str) -> list[Contender]:
    """The eager layer, and the same one compiled."""
    kind, layers = job.kind.removeprefix("compiled_"), _with_compiled(job, data, device)
    return [as_contender(name, layer.train(job.trains), kind, data) for name, layer in layers.items()]


def _with_compiled(
    job: Job, data: Data, device: str, make: Callable[[torch.nn.Module], torch.nn.Module] = lambda layer: layer
) -> dict[str, torch.nn.Module]:
    """What `make` makes of the layer, as it is and compiled."""
    torch._dynamo.reset()  # else another shape than the last compiled one is compiled for any shape
    eager, compiled = (make(load_module(LIBRARIES["rnnfast"], job.shape, data, device)) for _ in range(2))
    compiled.compile(fullgraph=True)
    return {"plain": eager, "rnnfast": compiled}


class _Regression(torch.nn.Module):
    """A layer with what usually stands around it: its loss for a target (T,B) at every step."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = layer.hidden_size
        self.layer, self.norm = layer, torch.nn.LayerNorm(width)
        self.head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, 1))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.head(self.norm(self.layer(x)[0]))  # (T,B,1)
        return torch.nn.functional.smooth_l1_loss(y.squeeze(-1), target)


def _compiled_model(job: Job, data: Data, device: str) -> list[Contender]:
    """A training step of `_Regression`, eager and compiled."""
    target = data.dy[..., 0]

    def contender(name: str, model: torch.nn.Module) -> Contender:
        def run() -> Tensor:
            model.zero_grad(set_to_none=True)
            loss = model(data.x, target)
            loss.backward()
            return loss

        def results() -> Named:
            loss = run()
            return {"loss": loss.detach().cpu()} | {f"d_{key}": w.grad.cpu() for key, w in model.named_parameters()}

        return Contender(name, run, results)

    models = _with_compiled(job, data, device, lambda layer: _Regression(layer).to(device))
    return [contender(name, model) for name, model in models.items()]


def time_compilation(job: Job, device: str) -> tuple[Timing, list[Contender]]:
    """One training step of a model not compiled before, with no cache to take it from; the compiler itself has been
    loaded by a smaller one. The contenders are left for a check of results."""
    with fresh_cache():
        for shape in (Shape(job.shape.cell, 2, 1, 4, 4), job.shape):
            fresh = Job(shape, "compiled_train", job.name)
            contenders = make_contenders(fresh, device)
            taken = first_call(contenders[-1].run)
    return Timing(taken, 0.0, samples=1, calls=1), contenders


MAKERS: dict[str, Callable[[Job, Data, str], list[Contender]]] = {
    "double_backward": _double_backward,
    "per_sample": _per_sample,
    "jvp_input": _jvp_input,
    "jvp_weights": _jvp_weights,
    "hessian_vector": _hessian_vector,
    "compiled_inference": _compiled,
    "compiled_train": _compiled,
    "compiled_model": _compiled_model,
}
