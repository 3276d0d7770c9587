"""Speed and memory of the operators, side by side with what one would write without them.

    python -m benchmarks leap_attention --backward        measure, print a table, append benchmarks/results/*.jsonl
    python -m benchmarks plot leap_attention              draw the stored lines
    python -m benchmarks.tangents                         forward mode, beside forward and backward
    python -m benchmarks.kernel_report                    what the compiler makes of the Triton kernels, without a GPU
    python -m benchmarks.mebt_cost                        a training step of MeBT, as videos grow
    python -m benchmarks.pruned_encoder                   one of SViTT's video encoder, dense and sparse

run from the root of the checkout. One process measures all providers on the very same inputs::

    operators/<op>.py   cases and providers                 what is compared
      -> gate.py        error against float64               a provider that is wrong is never timed
      -> measure.py     interleaved rounds, peak memory     beside torch.mm and a large copy
      -> records.py     one JSON line per measurement       what every table and plot is made of
      -> report.py, plots.py

To add an operator, add one file to ``operators/`` with a subclass of :class:`registry.Case` and an
``OPERATOR``; nothing else changes.
"""

import os

# The profiler, which measures memory, reports its starts and stops on stderr below this level, from torch's import on.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
