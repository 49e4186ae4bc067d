"""Speed of rnnfast against torch.nn and ONNX Runtime: `python -m benchmarks --help`.

    grid.py        what is measured: shapes, passes, presets, and how many FLOPs each is
    contenders.py  who is measured: torch.nn, rnnfast, ONNX Runtime (onnx_model.py), all with the same weights
    derivatives.py second derivatives, forward mode, vmap, torch.compile: the same, beside rnnfast's own plain pass
    timing.py      how: one process, contenders in turns, medians
    memory.py      peak memory of a training step, each in a process of its own
    run.py         a job from its check of results to its rows
    env.py         the machine and the versions
    report.py      tables (terminal, Markdown), JSON;  bars.py, gpu_goals.py  the project's goals;  plot.py  the PNG

Dims: T steps, B batch, I input size, H hidden size, G gates (1 Elman, 4 LSTM), P proj_size (0: none), R size of h_t
(P if projected, else H), L layers, D directions, N rows (T*B padded, the sum of the lengths packed).
"""
