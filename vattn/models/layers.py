"""What the models share: sequences with names, initialization, and losses of nothing."""

from collections import OrderedDict

from torch import Tensor, nn


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
