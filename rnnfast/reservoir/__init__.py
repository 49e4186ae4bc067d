"""Echo state networks on the compiled reservoir kernels.

weights.py    the random weights, and spectral radii
bank.py       the kernels: any number of reservoirs of the same size at once
readout.py    ridge regression and recursive least squares
data.py       what users hand in, as tensors
ensemble.py   networks of the same sizes, run and fitted at once
estimator.py  EchoState
"""

from rnnfast.reservoir.ensemble import fit_many, predict_many
from rnnfast.reservoir.estimator import EchoState
from rnnfast.reservoir.layer import EchoStateLayer
from rnnfast.reservoir.weights import spectral_radius

__all__ = ["EchoState", "EchoStateLayer", "fit_many", "predict_many", "spectral_radius"]
