"""Long lags with a plain tanh network: Hessian-free optimisation, and SGD and Adam for the same processor time.

100 tanh units have to carry what they see early in a sequence to its end, T/2 to T steps later. Gradients that small
drown for first-order methods; a Newton step divides them by curvatures as small as they are.

    python examples/hessian_free.py
    python examples/hessian_free.py --epochs 3 --plot x.png     # epochs: steps of Hessian-free optimisation
    python examples/hessian_free.py --task temporal_order --seeds 10 --budget 400
"""

import argparse
import time
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import rnnfast
from rnnfast import init, optim, tasks

H = 100  # hidden units
TEST = 1000  # sequences that none is trained on
B = 100  # sequences in an update of SGD and Adam
LOOKS = 50  # at the test sequences, of SGD and Adam


@dataclass(frozen=True)
class Setting:
    """Of Hessian-free optimisation: sequences for loss and gradient, and for curvature; products in a step."""

    gradient: int = 1000
    curvature: int = 200
    cg_steps: int = 100
    weight_decay: float = 2e-5


SETTINGS = {
    "addition": Setting(curvature=100, cg_steps=60, weight_decay=2e-6),
    "temporal_order": Setting(curvature=100, cg_steps=60, weight_decay=2e-6),
    "memorisation_5bit": Setting(cg_steps=150),
}


@dataclass
class Course:
    """The share of wrong test sequences after some seconds of training, and the training loss."""

    way: str
    seed: int
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def solved(self):
        return self.errors[-1] < tasks.SOLVED


class Network(nn.Module):
    """Sequences x (T',B,I) -> outputs (N,O) at the N places of mask (T',B). All ways start from these weights."""

    def __init__(self, task, generator):
        super().__init__()
        x, y, mask = task.sample(1000, generator)
        self.center = init.Center(x)
        self.rnn = init.echo_state_(rnnfast.RNN(task.input_size, H), 1.1, 15, 0.25, generator)
        self.readout = nn.Linear(H, task.output_size)
        nn.init.normal_(self.readout.weight, std=0.1, generator=generator)
        init.output_bias_(self.readout, y[mask])

    def forward(self, x, mask):
        return self.readout(self.rnn(self.center(x))[0][mask])


def draw(task, count, generator):
    """`count` sequences, without repetitions: of the 32 of memorisation_5bit each one."""
    x, y, mask = task.sample(count, generator)
    which = torch.unique(x, dim=1, return_inverse=True)[1]  # (count)
    order = which.argsort(stable=True)
    kept = order[torch.cat([torch.tensor([True]), which[order].diff() > 0])].sort().values
    return x[:, kept], y[:, kept], mask[:, kept]


def newton(network, task, generator, setting):
    """-> the loss before each step"""

    def problem(x, y, mask):
        return lambda: network(x, mask), lambda outputs: task.loss(outputs, y[mask])

    options = {"cg_steps": setting.cg_steps, "weight_decay": setting.weight_decay}
    optimizer = optim.HessianFree(network.parameters(), **options)
    while True:
        batch = draw(task, setting.gradient, generator)
        few = [tensor[:, : setting.curvature] for tensor in batch]
        yield optimizer.step(*problem(*batch), curvature=problem(*few)).loss


def first_order(network, task, generator, optimizer):
    """-> the loss before each update"""
    while True:
        x, y, mask = task.sample(B, generator)
        optimizer.zero_grad()
        loss = task.loss(network(x, mask), y[mask])
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def train(way, task, seed, budget, steps=None):
    """Train until the test sequences are solved, for at most `budget` seconds of processor time. -> Course"""
    generator = torch.Generator().manual_seed(seed)
    network = Network(task, generator)
    test = task.sample(TEST, torch.Generator().manual_seed(seed + 1_000_000))
    if way == "HF":
        updates = newton(network, task, generator, SETTINGS[task.name])
    elif way == "SGD":
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        updates = first_order(network, task, generator, optimizer)
    else:
        updates = first_order(network, task, generator, torch.optim.Adam(network.parameters(), lr=1e-3))
    course, spent = Course(way, seed), 0.0
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}"
    with tqdm(total=LOOKS, desc=f"{way:4} seed {seed}", bar_format=form) as progress:
        while True:
            start = time.process_time()
            course.losses.append(next(updates))
            spent += time.process_time() - start
            done = max(min(1.0, spent / budget), len(course.losses) / steps if steps else 0.0)
            if way == "HF" or done == 1 or done * LOOKS >= len(course.seconds) + 1:
                course.seconds.append(spent)
                course.errors.append(test_error(network, task, test))
                progress.set_postfix(error=f"{course.errors[-1]:.3f}", updates=len(course.losses), refresh=False)
                progress.update(int(done * LOOKS) - progress.n)
                if done == 1 or course.solved:
                    return course


@torch.no_grad()
def test_error(network, task, test):
    x, y, mask = test
    return task.error(network(x, mask), y, mask)


def plot(path, courses, task):
    """The errors on the test sequences over seconds, a line for each run."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    least = 0.5 / TEST  # where no error would be, on an axis that has no 0
    for k, way in enumerate(dict.fromkeys(course.way for course in courses)):
        for n, course in enumerate(course for course in courses if course.way == way):
            errors = [max(error, least) for error in course.errors]
            axis.plot(course.seconds, errors, f"C{k}.-", lw=1.2, ms=3, alpha=0.8, label=None if n else way)
    axis.axhline(tasks.SOLVED, color="0.6", lw=1, ls="--")
    axis.set(xlabel="seconds of processor time", ylabel="share of wrong test sequences", yscale="log")
    axis.set(title=f"{task.name}, T={task.T} (dashed: solved)")
    figure.legend(loc="outside right upper")
    plt.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="memorisation_5bit", choices=SETTINGS)
    parser.add_argument("--T", type=int, default=100, help="length, default 100")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way, default 1")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED")
    parser.add_argument("--ways", nargs="+", default=["HF", "SGD", "Adam"], choices=["HF", "SGD", "Adam"])
    parser.add_argument("--budget", type=float, default=50, help="seconds of processor time for each run, default 50")
    parser.add_argument("--epochs", type=int, help="at most so many steps of HF; SGD and Adam get its seconds then")
    parser.add_argument("--plot", default="hessian_free.png", metavar="FILE")
    args = parser.parse_args()

    task, courses = tasks.make(args.task, args.T), []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        budget = args.budget
        for way in args.ways:
            course = train(way, task, seed, budget, args.epochs if way == "HF" else None)
            if way == "HF" and args.epochs and len(course.losses) == args.epochs:
                budget = course.seconds[-1]
            courses.append(course)

    table = Table("way", "seed", "wrong of the test sequences", "updates", "seconds", title=f"{task.name}, T={task.T}")
    for course in courses:
        last = f"{course.errors[-1]:.3f}" + (", solved" if course.solved else "")
        table.add_row(course.way, str(course.seed), last, str(len(course.losses)), f"{course.seconds[-1]:.1f}")
    console = Console()
    losses = courses[0].losses
    console.print(f"training loss {losses[0]:.5f} in the first step of {args.ways[0]}, {losses[-1]:.5f} in the last")
    console.print(table)
    for way in args.ways:
        mine = [course for course in courses if course.way == way]
        console.print(f"{way}: solved for {sum(course.solved for course in mine)} of {len(mine)} seeds")
    plot(args.plot, courses, task)
    console.print(f"saved {args.plot}")


if __name__ == "__main__":
    main()
