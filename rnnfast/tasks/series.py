"""Series for prediction and memory: Mackey-Glass, Lorenz-63, NARMA-10, a delay line. float64 NumPy arrays (T,I)."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def mackey_glass(
    steps: int,
    tau: float = 17.0,
    *,
    dt: float = 1.0,
    substeps: int = 10,
    initial: float = 1.2,
    washout: int = 1000,
) -> Array:
    """The delay equation of Mackey & Glass (1977), Oscillation and chaos in physiological control systems.

        dx/dt = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x(t)        x(t) = initial for t <= 0

    Chaotic for tau = 17 (mildly, a common benchmark) and 30. Integration: the classical Runge-Kutta method of order 4
    with step dt / substeps; the delayed value in the middle of a step is Hermite's cubic through the two values and
    slopes around it, so the whole is of order 4. tau has to be a whole number of integration steps, so that the kinks
    of the solution, at multiples of tau, fall between them.

    A usual measure is NRMSE_84: the error 84 steps after the end of the data, in standard deviations of the series.

    Args:
        steps: how many samples.
        tau: the delay, default 17.
        dt: time between samples, default 1.
        substeps: integration steps between samples, default 10.
        initial: the value up to t = 0, default 1.2; another one gives another piece of the attractor.
        washout: samples left out at the beginning, default 1000.

    Returns:
        (steps,1)

    Raises:
        ValueError: steps or substeps below 1, washout negative, dt or tau not positive, tau no multiple of the step.
    """
    _check_steps(steps, washout)
    if substeps < 1 or not (0 < dt < np.inf and 0 < tau < np.inf):
        raise ValueError(f"dt, tau and substeps should be positive, got {dt}, {tau} and {substeps}")
    h = dt / substeps
    lag = round(tau / h)
    if lag < 1 or abs(lag * h - tau) > 1e-9 * tau:
        raise ValueError(f"tau={tau} should be a whole number of integration steps dt/substeps={h}")

    def slope(x: float, delayed: float) -> float:
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

    count = (steps + washout) * substeps
    values, slopes = [initial], [slope(initial, initial)]
    for i in range(count):
        k = i - lag  # the delayed step is from k to k + 1
        before = middle = after = initial
        if k >= 0:
            before, after = values[k], values[k + 1]
            middle = (before + after) / 2 + h / 8 * (slopes[k] - slopes[k + 1])
        x, k1 = values[i], slopes[i]
        k2 = slope(x + h / 2 * k1, middle)
        k3 = slope(x + h / 2 * k2, middle)
        k4 = slope(x + h * k3, after)
        values.append(x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
        slopes.append(slope(values[-1], after))
    samples = np.array(values[substeps::substeps])
    return samples[washout:, None]


def lorenz(
    steps: int,
    dt: float = 0.02,
    *,
    initial: tuple[float, float, float] = (1.0, 1.0, 1.0),
    washout: int = 1000,
    rtol: float = 1e-10,
    atol: float = 1e-10,
) -> Array:
    """The system of Lorenz (1963), Deterministic nonperiodic flow, with its usual parameters.

        x' = 10 (y - x)        y' = x (28 - z) - y        z' = x y - 8/3 z

    Integration: scipy.integrate.solve_ivp, DOP853. Errors grow as exp(0.906 t): after some 25 time units two solvers of
    these tolerances disagree, and a forecast beyond that says nothing.

    Args:
        steps: how many samples.
        dt: time between samples, default 0.02.
        initial: x, y, z at t = 0, default (1, 1, 1).
        washout: samples left out at the beginning, default 1000.
        rtol, atol: tolerances of the integration, default 1e-10.

    Returns:
        (steps,3)

    Raises:
        ValueError: steps below 1, washout negative, dt not positive.
        ImportError: no scipy.
        RuntimeError: the integration failed.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("rnnfast.tasks.lorenz needs scipy: pip install 'rnnfast[learn]'") from error
    _check_steps(steps, washout)
    if not 0 < dt < np.inf:
        raise ValueError(f"dt should be positive, got {dt}")

    def motion(t: float, state: Array) -> list[float]:
        x, y, z = state
        return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]

    times = dt * np.arange(1, washout + steps + 1)
    solution = solve_ivp(motion, (0, times[-1]), initial, method="DOP853", t_eval=times, rtol=rtol, atol=atol)
    if not solution.success or not np.isfinite(solution.y).all():
        raise RuntimeError(f"integration from {initial} failed: {solution.message}")
    return solution.y.T[washout:].copy()


def narma10(steps: int, seed: int | None = None, *, washout: int = 200) -> tuple[Array, Array]:
    """The tenth-order nonlinear moving average of Atiya & Parlos (2000), New results on recurrent network training.

        y(t+1) = 0.3 y(t) + 0.05 y(t) (y(t) + ... + y(t-9)) + 1.5 u(t-9) u(t) + 0.1        u(t) ~ U(0, 0.5)

    Some inputs drive y to infinity; where y exceeds 1, a new input is drawn.

    Args:
        steps: how many samples.
        seed: of NumPy's default generator.
        washout: samples left out at the beginning, default 200.

    Returns:
        u (steps,1) and the target (steps,1): row t holds u(t) and y(t+1), so all that the target needs has been read.

    Raises:
        ValueError: steps below 1, washout negative.
        RuntimeError: y grew beyond 1 for each of 100 inputs, as it will for very long series.
    """
    _check_steps(steps, washout)
    random, count = np.random.default_rng(seed), washout + steps
    for _ in range(100):
        u = random.uniform(0, 0.5, count + 9)  # nine before the first
        y = np.zeros(count + 10)  # y(t+1) is y[t + 10]
        for t in range(count):
            last = y[t + 9]
            y[t + 10] = 0.3 * last + 0.05 * last * y[t : t + 10].sum() + 1.5 * u[t] * u[t + 9] + 0.1
            if y[t + 10] > 1:
                break
        else:
            return u[9 + washout :, None], y[10 + washout :, None]
    raise RuntimeError(f"NARMA-10 diverged for each of 100 inputs of {count} steps; ask for a shorter series")


def delay_line(steps: int, delays: int, seed: int | None = None) -> tuple[Array, Array]:
    """White noise and its past, to measure memory with (Jaeger 2001, Short term memory in echo state networks).

    Args:
        steps: how many samples.
        delays: K, the longest delay.
        seed: of NumPy's default generator.

    Returns:
        u (steps,1) from U(-0.5, 0.5), and targets (steps,K): in column k - 1 stands u(t-k). `memory_capacity` scores
        their prediction.

    Raises:
        ValueError: steps or delays below 1.
    """
    _check_steps(steps)
    if delays < 1:
        raise ValueError(f"delays should be at least 1, got {delays}")
    u = np.random.default_rng(seed).uniform(-0.5, 0.5, steps + delays)
    past = np.lib.stride_tricks.sliding_window_view(u[:-1], delays)  # (steps,K), oldest first
    return u[delays:, None], past[:, ::-1].copy()


def memory_capacity(predicted: Array, target: Array) -> float:
    """The sum over delays of the squared correlation between prediction and target; at most the number of units.

    Args:
        predicted, target: (T,K), a column for each delay; a column without variation counts 0.

    Raises:
        ValueError: the shapes differ or hold fewer than two rows, or something is not finite.
    """
    predicted, target = np.asarray(predicted, dtype=float), np.asarray(target, dtype=float)
    if predicted.shape != target.shape or predicted.ndim != 2 or len(predicted) < 2:
        raise ValueError(
            f"predicted and target should both be (T,K) with T >= 2, got {predicted.shape} and {target.shape}"
        )
    if not (np.isfinite(predicted).all() and np.isfinite(target).all()):
        raise ValueError("predicted and target should be finite, got inf or NaN")
    a, b = (values - values.mean(axis=0) for values in (predicted, target))
    variances = (a**2).sum(axis=0) * (b**2).sum(axis=0)  # (K)
    squared = (a * b).sum(axis=0) ** 2
    return float(np.divide(squared, variances, out=np.zeros_like(squared), where=variances > 0).sum())


def _check_steps(steps: int, washout: int = 0) -> None:
    if steps < 1:
        raise ValueError(f"steps should be at least 1, got {steps}")
    if washout < 0:
        raise ValueError(f"washout should not be negative, got {washout}")
