"""Echo state networks on the compiled reservoir kernels.

weights.py    the random weights
bank.py       the kernels: any number of reservoirs of the same size at once
readout.py    ridge regression and recursive least squares
data.py       what users hand in, as tensors
ensemble.py   networks of the same sizes, run and fitted at once
estimator.py  EchoState
layer.py      a network that autograd goes through
"""

from rnnfast.reservoir.ensemble import fit_many, predict_many
from rnnfast.reservoir.estimator import EchoState
from rnnfast.reservoir.layer import EchoStateLayer

__all__ = ["EchoState", "EchoStateLayer", "fit_many", "predict_many"]
