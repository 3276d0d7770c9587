"""What the models share: sequences with names, initialization, batch norms, and losses of nothing."""

import contextlib
from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn.models.recomputation import in_backward, unseen


def named(**modules: nn.Module) -> nn.Sequential:
    """A sequence of modules with names, which are those of an official checkpoint."""
    return nn.Sequential(OrderedDict(modules))


def init_linear(module: nn.Module) -> None:
    """The initialization of vision transformers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def reduction(x: Tensor) -> str:
    """Of losses of the elements of `x`: their mean; the sum of none, whose mean is NaN: 0, with gradients of 0."""
    return "mean" if x.numel() > 0 else "sum"


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's with its defaults, but see :func:`_batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(self, x)


class BatchNorm3d(nn.BatchNorm3d):
    """PyTorch's with its defaults, but see :func:`_batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return _batch_norm(self, x)


def _batch_norm(norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    """Batch norm, whose statistics do not move where a batch is empty, nor where checkpointing runs it again.

    Statistics of nothing would be NaN, and those of a second run would move twice. Weights may have another dtype than
    statistics, as wrappers for mixed precision leave them.
    """
    mean, var, steps = (cast(Tensor, x) for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked))
    momentum = norm.momentum
    weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)
    if norm.training and x.numel() == 0:
        wide = (-1, *[1] * (x.dim() - 2))
        return (x * weight.view(wide) + bias.view(wide)).to(x.dtype)
    if norm.training:
        compiling = torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiling else unseen():  # which Dynamo cannot trace
            if not compiling and in_backward():
                mean, var = mean.clone(), var.clone()
            else:
                steps.add_(1)
        if momentum is None:  # the mean of all batches so far
            momentum = 1 / max(float(steps), 1)
    return F.batch_norm(x, mean, var, weight, bias, norm.training, momentum or 0.0, norm.eps)
