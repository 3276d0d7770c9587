"""Batch norms whose statistics move once for each batch, and stay where there is none.

    mean = (1 - m) mean + m mean(x),    var = (1 - m) var + m var(x)        in training, for a momentum m

PyTorch's make NaN of statistics of nothing, and move them twice where activation checkpointing runs a forward again.
Weights may have another dtype than statistics, as wrappers for mixed precision leave them.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from vattn.models.recomputation import in_backward, unseen


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's with its defaults; see above."""

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(self, x)


class BatchNorm3d(nn.BatchNorm3d):
    """PyTorch's with its defaults; see above."""

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(self, x)


def _batch_norm(norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    """The forward of both."""
    mean, var, steps = (cast(Tensor, x) for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked))
    momentum = norm.momentum
    weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)
    if norm.training and x.numel() == 0:
        wide = (-1, *[1] * (x.dim() - 2))
        return (x * weight.view(wide) + bias.view(wide)).to(x.dtype)
    if norm.training:
        with unseen():
            if in_backward():
                mean, var = mean.clone(), var.clone()
            else:
                steps.add_(1)
        if momentum is None:  # the mean of all batches so far
            momentum = 1 / max(float(steps), 1)
    return F.batch_norm(x, mean, var, weight, bias, norm.training, momentum or 0.0, norm.eps)
