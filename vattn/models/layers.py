"""Layers that the models share: sequences with names, and the initialization of vision transformers."""

from collections import OrderedDict

from torch import nn


def named(**modules: nn.Module) -> nn.Sequential:
    """A sequence of modules with names, which are those of an official checkpoint."""
    return nn.Sequential(OrderedDict(modules))


def init_linear(module: nn.Module) -> None:
    """The initialization of vision transformers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
