"""What the models share: sequences with names, initialization, batch norms, and losses of nothing."""

from collections import OrderedDict

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
    """PyTorch's, but its statistics do not move where a batch is empty, nor where checkpointing runs it again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _moves(self, x) else _batch_norm(self, x)


class BatchNorm3d(nn.BatchNorm3d):
    """PyTorch's, but its statistics do not move where a batch is empty, nor where checkpointing runs it again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _moves(self, x) else _batch_norm(self, x)


def _moves(norm: nn.Module, x: Tensor) -> bool:
    """Whether the forward of a batch norm is PyTorch's own."""
    return not norm.training or (x.numel() > 0 and (torch.compiler.is_compiling() or not in_backward()))


def _batch_norm(norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    """By the statistics of `x`, which move copies only, as many tensors being saved; of nothing they would be NaN."""
    if x.numel() > 0:
        with unseen():
            copies = [None if buffer is None else buffer.clone() for buffer in (norm.running_mean, norm.running_var)]
        return F.batch_norm(x, *copies, norm.weight, norm.bias, True, 0.0, norm.eps)
    wide = (-1, *[1] * (x.dim() - 2))
    return x * norm.weight.view(wide) + norm.bias.view(wide)
