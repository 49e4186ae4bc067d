"""Echo state networks on the compiled reservoir kernels.

guard.py      what the functions run under: traced graphs, autocast, forked processes
matrix.py     the recurrent matrix, its runs of connections
weights.py    the random weights
bank.py       the kernels: any number of reservoirs of the same size at once
readout.py    ridge regression and recursive least squares
data.py       what users hand in, as tensors
network.py    a network: arguments, weights, what was fitted
ensemble.py   networks of the same sizes, run and fitted at once
layer.py      a network that autograd goes through
estimator.py  EchoState
"""

from rnnfast.reservoir.ensemble import fit_many, predict_many
from rnnfast.reservoir.estimator import EchoState
from rnnfast.reservoir.layer import EchoStateLayer

__all__ = ["EchoState", "EchoStateLayer", "fit_many", "predict_many"]
