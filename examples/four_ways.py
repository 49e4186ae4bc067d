"""Four effective ways to learn a recurrent network, and plain gradient descent, on one task with a long lag.

    sgd        the baseline: an Elman network and gradient descent
    lstm       gates: an LSTM, Adam, clipped gradients                           (Hochreiter & Schmidhuber 1997)
    hf         curvature: Hessian-free optimisation with structural damping      (Martens & Sutskever 2011)
    esn        no learning in the loop: an echo state network                    (Jaeger 2001)
    momentum   a good start: echo-state weights, and Nesterov's momentum         (Sutskever et al. 2013)

All draw their sequences from one seed and are tested on the same others. docs/four_ways.md explains each.

    python -m examples.four_ways                                                     # all of the four learn
    python -m examples.four_ways --task addition --T 80 --budget 120 --ways sgd lstm
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import rnnfast
from rnnfast import init, optim, tasks

H, B = 100, 100  # hidden units, sequences in a batch
LARGE_B = 1000  # sequences in an update of hf and of esn, which make few
CURVATURE_B = 200  # those of them that hf takes the curvature from
RESERVOIR = 500  # units of the echo state network
TEST = 1000  # sequences

MARKED, MEMORY = ("addition", "multiplication", "xor"), ("memorisation_5bit", "memorisation_20bit")  # tasks


@dataclass(frozen=True)
class Limits:
    """When the training of a way ends, at the latest, and how often it is tested on the way there."""

    seconds: float = float("inf")  # of training; tests do not count
    updates: float = float("inf")
    until_solved: bool = True
    looks: int = 40


QUICK = Limits(seconds=7, looks=12)
FULL = Limits(updates=50_000, until_solved=False)  # as in the paper of 2013


def make_task(name, T, cue, recall_only):
    """The task of this name; the marked numbers have a cue, the memory tasks may have their targets at the recall."""
    options = {"cue": cue} if name in MARKED else {"recall_only": recall_only} if name in MEMORY else {}
    return tasks.make(name, T, **options)


@dataclass(frozen=True)
class Recipe:
    """Of momentum. The paper of 2013 has its mu, rates by decades, and the fall at the end (of its autoencoders); it
    bounds no gradient, and has hidden biases that start at 0. A learned initial state in their place is from the code
    that two of its authors released in 2011."""

    mu: float = 0.995  # the momentum after the first 1000 updates
    rate: float = 1e-3  # of the mean loss
    first_clip: float = 0.5  # bound on the gradient's norm until the loss is `FOUND` times that of a guess
    clip: float = 0.5  # and from then on
    biases: bool = False  # of the hidden units
    state: bool = True  # is the initial state learned?
    input_scale: float = 0.1  # of the input weights; 0.1 is the paper's for memory tasks, 0.001 for marked numbers
    updates: int | None = None  # momentum falls to 0.9 for the last 1000 of them; None: never


FOUND = 0.5  # of a guess's loss: until then a large step loses what was found of the lag, after that it is rare
AVERAGED = 200  # updates that the loss is averaged over, roughly
NUMBERS = Recipe(first_clip=0.25, clip=1.0, input_scale=0.001)
RECIPES = {"addition": NUMBERS, "multiplication": NUMBERS}


def recipe_for(task, **changes):
    """The recipe for the task of this name, changed where a change is not None. With another rate the bounds keep the
    length of a step; a bound that is given alone holds from the first update."""
    own = RECIPES.get(task, Recipe())
    given = {name: value for name, value in changes.items() if value is not None}
    shrink = own.rate / (given.get("rate") or own.rate)
    clip = given.get("clip", own.clip * shrink)
    first_clip = given.get("first_clip", given.get("clip", own.first_clip * shrink))
    return replace(own, **given | {"first_clip": first_clip, "clip": clip})


class Network(nn.Module):
    """Sequences x (T',B,I) -> outputs (N,O) at the N places of mask (T',B), from centred inputs."""

    def __init__(self, task, rnn, sample):
        super().__init__()
        x, y, mask = sample
        self.center, self.rnn, self.readout = init.Center(x), rnn, nn.Linear(H, task.output_size)
        self.state = None
        init.output_bias_(self.readout, y[mask].bool() if task.name == "xor" else y[mask])

    def forward(self, x, mask):
        state = None if self.state is None else self.state(x.size(1))
        return self.readout(self.rnn(self.center(x), state)[0][mask])


class Gradients:
    """Back-propagation through time and an optimizer of torch: what sgd, lstm and momentum have in common."""

    clip = 1.0

    def __init__(self, task, generator):
        self.task, self.generator = task, generator
        self.network = Network(task, self.make_rnn(), task.sample(1000, generator))
        self.optimizer = self.make_optimizer()

    def update(self):
        x, y, mask = self.task.sample(B, self.generator)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.network(x, mask), y[mask])
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def outputs(self, x, mask):
        return self.network(x, mask)


class Descent(Gradients):
    title = "SGD"

    def make_rnn(self):
        return rnnfast.RNN(self.task.input_size, H)

    def make_optimizer(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


class LongShortTermMemory(Gradients):
    title = "LSTM, Adam"

    def make_rnn(self):
        return init.chrono_(rnnfast.LSTM(self.task.input_size, H), self.task.T, self.generator)

    def make_optimizer(self):
        return torch.optim.Adam(self.network.parameters(), lr=3e-3)


class Momentum(Gradients):
    title = "echo-state init, momentum"

    def __init__(self, task, generator, recipe=None):
        self.recipe = recipe or recipe_for(task.name)
        self.clip = self.recipe.first_clip
        super().__init__(task, generator)
        batch = task.sample(1000, torch.Generator().manual_seed(0))
        wanted = batch.y[batch.mask]
        guess = self.network.readout.bias.detach().expand(len(wanted), -1)
        self.loss = self.guess = task.loss(guess, wanted).item()

    def make_rnn(self):
        rnn = rnnfast.RNN(self.task.input_size, H, bias=self.recipe.biases)
        return init.echo_state_(rnn, 1.1, 15, self.recipe.input_scale, self.generator)

    def make_optimizer(self):
        if self.recipe.state:
            self.network.state = init.InitialState(self.network.rnn)
        nn.init.normal_(self.network.readout.weight, std=0.1, generator=self.generator)
        optimizer = torch.optim.SGD(self.network.parameters(), lr=self.recipe.rate, momentum=0.9, nesterov=True)
        self.schedule = optim.MomentumSchedule(optimizer, self.recipe.mu, updates=self.recipe.updates)
        return optimizer

    def update(self):
        self.loss += (super().update() - self.loss) / AVERAGED
        self.schedule.step()
        if self.loss < FOUND * self.guess:
            self.clip = self.recipe.clip

    def outputs(self, x, mask):
        with self.schedule.at_theta():
            return self.outputs_ahead(x, mask)

    def outputs_ahead(self, x, mask):
        """Where the next gradient is taken."""
        return super().outputs(x, mask)


class HessianFree(Gradients):
    title = "Hessian-free"

    def make_rnn(self):
        return init.echo_state_(rnnfast.RNN(self.task.input_size, H), 1.1, 15, 0.25, self.generator)

    def make_optimizer(self):
        return optim.HessianFree(self.network.parameters(), cg_steps=100, weight_decay=2e-5)

    def update(self):
        batch = self.task.sample(LARGE_B, self.generator)
        few = tasks.Batch(*[tensor[:, :CURVATURE_B] for tensor in batch])
        self.optimizer.step(*self.problem(batch), curvature=self.problem(few))

    def problem(self, batch):
        x, y, mask = batch
        return lambda: self.network(x, mask), lambda outputs: self.task.loss(outputs, y[mask])


class EchoState:
    """Each update adds sequences to the sums that the readout is solved from. The leak sets the units' pace, some T/2
    steps: with faster ones the network forgets the marked numbers, and no readout brings them back."""

    title = "echo state network"

    def __init__(self, task, generator):
        self.task, self.generator, self.fitted = task, generator, False
        options = {"spectral_radius": 0.95, "leak": min(1.0, 2.4 / task.T), "input_scale": 1.0, "bias_scale": 0.3}
        self.network = rnnfast.EchoState(task.input_size, RESERVOIR, task.output_size, **options)

    def update(self):
        x, y, mask = self.task.sample(LARGE_B, self.generator, torch.float64)
        targets = F.one_hot(y[mask], self.task.output_size).double() if y.dtype == torch.int64 else y[mask]  # (N,O)
        inputs, sequence, step = flush_right(x, mask)
        wanted = torch.zeros(*inputs.shape[:2], self.task.output_size, dtype=torch.float64)  # (B,T',O)
        wanted[sequence, step] = targets
        self.network.fit(inputs, wanted, ridge=1e-6, washout=int(step.min()), warm_start=self.fitted)
        self.fitted = True

    def outputs(self, x, mask):
        if not self.fitted:
            return torch.zeros(int(mask.sum()), self.task.output_size)
        inputs, sequence, step = flush_right(x.double(), mask)
        outputs = torch.as_tensor(self.network.predict(inputs))[sequence, step]
        return outputs - 0.5 if self.task.name == "xor" else outputs  # fitted to 0 and 1, judged as a logit


def flush_right(x, mask):
    """Moves sequences x (T',B,I) so that all end at step T', and turns them to (B,T',I): a washout is the same for all.
    -> that, and where the N targets are then: sequence (N), step (N)"""
    shift = mask.flip(0).int().argmax(dim=0)  # (B), steps after the last target
    source = torch.arange(x.size(0)) - shift[:, None]  # (B,T')
    moved = x.transpose(0, 1).gather(1, source.clamp(min=0).unsqueeze(-1).expand(-1, -1, x.size(2)))
    step, sequence = mask.nonzero(as_tuple=True)
    return moved * (source >= 0).unsqueeze(-1), sequence, step + shift[sequence]


WAYS = {
    "sgd": Descent,
    "lstm": LongShortTermMemory,
    "hf": HessianFree,
    "esn": EchoState,
    "momentum": Momentum,
}


@dataclass
class Course:
    """What became of a way: its test error after some seconds and updates, and why it ended."""

    way: str
    title: str
    seconds: list[float] = field(default_factory=list)  # of training; looking at the test sequences does not count
    updates: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # share of test sequences that are wrong
    wrong: list[float] = field(default_factory=list)  # wrong outputs in a sequence, the mean
    ended: str = ""  # 'solved', 'limit' or 'diverged'


def train(name, task, test, seed, limits):
    """Train one way on its own sequences and watch its error on those of `test`. -> Course"""
    torch.manual_seed(seed)
    way = WAYS[name](task, torch.Generator().manual_seed(seed))
    course = Course(name, way.title)
    seconds, updates = 0.0, 0
    form = "{desc:26} {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
    with tqdm(total=limits.looks, desc=way.title, bar_format=form) as progress:
        while True:
            done = min(1.0, max(seconds / limits.seconds, updates / limits.updates))
            if done == 1 or done * limits.looks >= len(course.errors):
                finite = look(course, way, task, test, seconds, updates)
                progress.set_postfix(error=f"{course.errors[-1]:.3f}", updates=updates, refresh=False)
                progress.update(int(done * limits.looks) - progress.n)
                if not finite:
                    course.ended = "diverged"
                elif limits.until_solved and course.errors[-1] < tasks.SOLVED:
                    course.ended = "solved"
                elif done == 1:
                    course.ended = "limit"
                if course.ended:
                    return course
            start = time.perf_counter()
            way.update()
            seconds += time.perf_counter() - start
            updates += 1


def look(course, way, task, test, seconds, updates):
    """Adds the errors on the test sequences to the course. -> are the outputs finite?"""
    x, y, mask = test
    outputs = way.outputs(x, mask)
    wrong = task.wrong(outputs, y, mask)
    course.seconds.append(seconds)
    course.updates.append(updates)
    course.errors.append((wrong > 0).double().mean().item())
    course.wrong.append(wrong.double().mean().item())
    return bool(outputs.isfinite().all())


def table(courses, task):
    columns = "way", "wrong", "outputs wrong in each", "updates", "seconds", "ended"
    result = Table(*columns, title=f"{task.name}, T={task.T}: share of {TEST} test sequences wrong")
    result.columns[0].no_wrap = True
    for course in courses:
        errors = f"{course.errors[-1]:.3f}", f"{course.wrong[-1]:.3f}"
        result.add_row(course.title, *errors, str(course.updates[-1]), f"{course.seconds[-1]:.1f}", course.ended)
    return result


def plot(path, courses, task):
    """Learning curves: the test error over seconds and over updates."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    least = 0.5 / TEST  # where no error would be, on an axis that has no 0
    for course in courses:
        color = f"C{list(WAYS).index(course.way)}"
        errors = [max(error, least) for error in course.errors]
        for axis, along in zip(axes, (course.seconds, course.updates), strict=True):
            axis.plot(along, errors, f"{color}.-", lw=1.5, ms=4, label=course.title)
    for axis, label in zip(axes, ("seconds of training", "updates"), strict=True):
        axis.axhline(tasks.SOLVED, color="0.6", lw=1, ls="--")
        axis.set(xlabel=label, yscale="log", ylim=(least / 1.5, 1.5))
    axes[1].set_xscale("symlog", linthresh=10)
    axes[1].set_xlim(left=0)
    axes[0].set(ylabel="share of wrong test sequences", title=f"{task.name}, T={task.T} (dashed: solved)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(courses), fontsize=8)
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="temporal_order", choices=tasks.TASKS, help="default temporal_order")
    parser.add_argument("--T", type=int, default=40, help="length, default 40")
    parser.add_argument("--cue", type=int, default=0, help="steps from the last mark to the target, default 0")
    parser.add_argument("--recall-only", action="store_true", help="targets of memory tasks at the recall alone")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="default: all")
    parser.add_argument("--budget", type=float, default=60, help="seconds of training for each way, default 60")
    parser.add_argument("--quick", action="store_true", help=f"a budget of {QUICK.seconds} seconds")
    parser.add_argument("--full", action="store_true", help=f"no limit of time: {FULL.updates} updates for each way")
    parser.add_argument("--momentum", type=float, default=Recipe.mu, help="mu_0 of momentum, default 0.995")
    parser.add_argument("--rate", type=float, help=f"learning rate of momentum, default {Recipe.rate}")
    parser.add_argument("--clip", type=float, help="bound on momentum's gradient norm, default the task's recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="four_ways.png", metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="write the curves, with all that is needed to repeat them")
    args = parser.parse_args()
    updates = FULL.updates if args.full else None
    recipe = recipe_for(args.task, mu=args.momentum, rate=args.rate, clip=args.clip, updates=updates)
    WAYS["momentum"] = partial(Momentum, recipe=recipe)
    try:
        task = make_task(args.task, args.T, args.cue, args.recall_only)
    except ValueError as error:
        parser.error(str(error))

    test = task.sample(TEST, torch.Generator().manual_seed(args.seed + 1_000_000))
    limits = QUICK if args.quick else FULL if args.full else Limits(args.budget)
    courses = [train(name, task, test, args.seed, limits) for name in args.ways]

    console = Console()
    console.print(table(courses, task))
    plot(args.plot, courses, task)
    console.print(f"saved {args.plot}")
    if args.json:
        about = {"arguments": vars(args), "torch": torch.__version__, "machine": platform.processor()} | rnnfast.info()
        with open(args.json, "w") as file:
            json.dump({"about": about, "courses": [asdict(course) for course in courses]}, file, indent=1)
        console.print(f"saved {args.json}")


if __name__ == "__main__":
    main()
