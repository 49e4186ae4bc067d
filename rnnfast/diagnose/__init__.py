"""Where gradients vanish or explode: what back-propagation through time carries, step by step.

The gradient of a loss with respect to h_t is a sum of two parts,

    dL/dh_t  =  injected_t  +  carried_t

*injected* comes from the loss (or the layer above) at step t itself, *carried* through time from step t+1. Only what
is carried can teach a recurrent network about the past, and losses at every step hide its decay, so the two are kept
apart; likewise for the cells of an LSTM, where carried_t = f_{t+1} * dL/dc_{t+1}. All of it stands in one backward
sweep of the kernel, without a hook for each step.

    flow = rnnfast.diagnose.gradient_flow(model.rnn, lambda: loss(model(x), y))
    print(flow)
    flow.plot()
"""

from rnnfast.diagnose.flow import GradientFlow, gradient_flow
from rnnfast.diagnose.lyapunov import lyapunov

__all__ = ["GradientFlow", "gradient_flow", "lyapunov"]
