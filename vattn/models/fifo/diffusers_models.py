"""Which class of diffusers a model is, without an import of diffusers: whoever has such a model has imported it."""

from collections.abc import Collection
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile``, DistributedDataParallel, FullyShardedDataParallel and PEFT, or `model`."""
    while True:
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        else:
            inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def known_class(model: object, names: Collection[str]) -> str | None:
    """The first of the class of `model` and its bases that is one of diffusers, with a name in `names`."""
    for base in type(model).__mro__:
        if base.__name__ in names and base.__module__.partition(".")[0] == "diffusers":
            return base.__name__
    return None
