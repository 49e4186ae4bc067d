"""Echo state networks on the four tasks that they are measured by; only the readout is fitted, by ridge regression.

mackey_glass   84 steps of a chaotic delay equation, from 50 starts, in closed loop          (Jaeger 2001)
narma10        a moving average of the tenth order, driven by noise                          (Atiya & Parlos 2000)
lorenz         a chaotic flow, until the forecast is wrong, from 20 starts, in closed loop   (Lorenz 1963)
memory         how many of the last inputs linear units can give back                        (Jaeger 2001)

python examples/echo_state.py
python examples/echo_state.py --tasks lorenz --seeds 5
"""

import argparse
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import rnnfast
from rnnfast import tasks

LYAPUNOV = 0.9056  # largest exponent of Lorenz-63, per unit of time
DT = 0.02  # of Lorenz-63, between two steps
WRONG = 0.4  # error of a forecast, in standard deviations, from which on it counts as wrong
LONGEST = 1000  # steps of a Lorenz forecast: beyond 20 units of time two solvers disagree by themselves


def mackey_glass(seed, units, axes):
    """Root mean square error after 84 steps of closed loop, in standard deviations of the series."""
    trained = _mackey_glass(4000, 0)
    tests = np.stack([_mackey_glass(1084, 100 + k) for k in range(50)])  # (50,1084,1)
    esn = rnnfast.EchoState(0, units, 1, spectral_radius=1.0, leak=0.5, feedback=1.0, bias_scale=0.2, seed=seed)
    esn.fit(None, _squash(trained), ridge=1e-11, washout=1000)
    esn.states(None, _squash(tests[:, :1000]))
    outputs = _stretch(esn.generate(84))  # (50,84,1)
    if axes is not None:
        _draw(axes, outputs[:5, :, 0].T, tests[:5, 1000:, 0].T, 1.0, "step", "Mackey-Glass, tau = 17")
    return float(np.sqrt(np.mean((outputs[:, -1] - tests[:, -1]) ** 2) / trained.var()))


def _mackey_glass(steps, seed):
    start = np.random.default_rng(seed).uniform(0.5, 1.4)
    return tasks.mackey_glass(steps, 17, initial=float(start), washout=1000)


def _squash(series):
    """To where tanh units are at ease, as Jaeger did."""
    return np.tanh(series - 1)


def _stretch(outputs):
    return np.arctanh(np.clip(outputs, -1 + 1e-6, 1 - 1e-6)) + 1


def narma10(seed, units, axes):
    """Root mean square error, in standard deviations of the target."""
    u, y = tasks.narma10(12_000, seed=seed)
    u = u - 0.25  # its mean
    esn = rnnfast.EchoState(1, units, 1, spectral_radius=1.1, input_scale=0.3, bias_scale=1.0, seed=seed)
    esn.fit(u[:8000], y[:8000], ridge=1e-8, washout=200)
    predicted = esn.predict(u)[8000:]
    if axes is not None:
        _draw(axes, predicted[:150, :1], y[8000:8150, :1], 1.0, "step", "NARMA-10")
    return float(np.sqrt(np.mean((predicted - y[8000:]) ** 2) / y[8000:].var()))


def lorenz(seed, units, axes):
    """How long forecasts stay right, in Lyapunov times: the median over 20 starts on the attractor."""
    series = tasks.lorenz(20_000, DT, rtol=1e-12, atol=1e-12)
    starts = np.random.default_rng(1).normal((0, 0, 25), 5, (20, 3))
    tests = np.stack([tasks.lorenz(200 + LONGEST, DT, initial=tuple(s), rtol=1e-12, atol=1e-12) for s in starts])
    mean, deviation = series.mean(0), series.std(0)
    series, tests = (series - mean) / deviation, (tests - mean) / deviation
    esn = rnnfast.EchoState(3, units, 3, spectral_radius=0.1, input_scale=0.5, bias_scale=2.0, seed=seed)
    esn.fit(series[:-1], series[1:], ridge=1e-9, washout=200)
    esn.states(tests[:, :200])
    outputs, wanted = esn.generate(LONGEST), tests[:, 200:]
    if axes is not None:
        _draw(axes, outputs[:1, :, 0].T, wanted[:1, :, 0].T, DT * LYAPUNOV, "Lyapunov times", "Lorenz-63, x")
    wrong = np.sqrt(((outputs - wanted) ** 2).mean(-1)) > WRONG  # (20,LONGEST)
    valid = np.where(wrong.any(1), wrong.argmax(1), LONGEST)
    return float(np.median(valid) * DT * LYAPUNOV)


def memory(seed, units, axes):
    """Memory capacity over the number of units: the squared correlations with all past inputs, added up."""
    u, past = tasks.delay_line(6000, 2 * units + 50, seed=seed)
    options = {"unit": "identity", "topology": "cycle", "spectral_radius": 0.98}
    esn = rnnfast.EchoState(1, units, past.shape[1], seed=seed, **options)
    esn.fit(u[:4000], past[:4000], ridge=1e-9, washout=500)
    predicted = esn.predict(u)[4000:]
    if axes is not None:
        each = [tasks.memory_capacity(predicted[:, k : k + 1], past[4000:, k : k + 1]) for k in range(past.shape[1])]
        axes.plot(range(1, len(each) + 1), each, "C0")
        axes.set(xlabel="delay", ylabel="squared correlation", title=f"Memory of {units} linear units in a cycle")
    return tasks.memory_capacity(predicted, past[4000:]) / units


def _draw(axes, outputs, wanted, scale, label, title):
    """Outputs and what was wanted, (T,n) each, over time."""
    along = scale * np.arange(1, len(wanted) + 1)
    axes.plot(along, wanted, "0.6", lw=2.5)
    axes.plot(along, outputs, "C0", lw=1)
    axes.set(xlabel=label, title=f"{title} (grey: the truth)")


TASKS = {  # task: what is measured, units, the goal
    "mackey_glass": (mackey_glass, "NRMSE after 84 steps", 1000, "<= 1e-4"),
    "narma10": (narma10, "NRMSE", 500, "< 0.33"),
    "lorenz": (lorenz, "valid Lyapunov times, median of 20", 1000, ">= 8"),
    "memory": (memory, "capacity / units", 100, ">= 0.9"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="networks for each task, default 3")
    parser.add_argument("--units", type=int, help="default 1000, 500, 1000 and 100")
    parser.add_argument("--plot", default="echo_state.png", metavar="FILE")
    args = parser.parse_args()

    table = Table("task", "units", "measure", "median", "lowest", "highest", "goal", "seconds each")
    figure, axes = plt.subplots(len(args.tasks), 1, figsize=(10, 2.6 * len(args.tasks)), layout="constrained")
    with tqdm(total=len(args.tasks) * args.seeds) as progress:
        for name, ax in zip(args.tasks, np.atleast_1d(axes), strict=True):
            task, measure, units, goal = TASKS[name]
            units, start, values = args.units or units, time.perf_counter(), []
            for seed in range(args.seeds):
                progress.set_description(f"{name}, seed {seed}")
                values.append(task(seed, units, ax if seed == 0 else None))
                progress.update()
            each = (time.perf_counter() - start) / args.seeds
            found = [f"{value:.3g}" for value in (np.median(values), min(values), max(values))]
            table.add_row(name, str(units), measure, *found, goal, f"{each:.1f}")
    figure.savefig(args.plot, dpi=110)
    console = Console()
    console.print(table)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
