"""Packages that use torch's recurrent layers, run with torch's and with rnnfast's: `python -m tests.clients`.

One small file for each package. Its docstring says what is run, and

    run(swap)

builds the package's own model from a seed, calls swap(model) where its user would call rnnfast.convert(model), and
returns a function of no arguments: the steps that are timed, which return tensors by name: outputs, losses, gradients,
parameters after training. What these are compared with, and how, is in `compare`.
"""

PACKAGES = {  # the name that pip knows each by
    "captum_attribution": "captum",
    "darts_block": "darts",
    "darts_rnn": "darts",
    "lightning_trainer": "lightning",
    "neuralforecast_lstm": "neuralforecast",
    "pytorch_forecasting_deepar": "pytorch-forecasting",
    "pytorch_forecasting_recurrent": "pytorch-forecasting",
    "sb3_recurrent_ppo": "sb3-contrib",
    "skorch_classifier": "skorch",
    "torchrl_lstm": "torchrl",
}
