"""Remembers which calls were checked: calls with the same shapes, dtypes, devices and settings are checked once.

A call of a few microseconds has time to look up what was found before, not to work it out. A look has the shapes,
dtypes and devices of tensors, and numbers with their types: True and 1.0 are not 1. Arguments of other kinds say how
they look with an attribute `_look`. A subclass of tensors, a trace, whose sizes may be symbols, and a
transform of ``torch.func`` have no look, and are checked every time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vattn._library import AUTOCAST_DEVICES

MOST_LOOKS = 1024  # of one function, remembered
_NUMBERS = frozenset((int, float, bool, type(None)))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_Check = TypeVar("_Check", bound=Callable[..., Any])


def look_of(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """How `args` look; None if one of them has no look."""
    looks: list[Any] = []
    for x in args:
        kind = type(x)
        if kind in _TENSORS:
            if x.is_nested:
                return None
            looks += (x.shape, x.dtype, x.device, x.layout)
        elif kind in _NUMBERS:
            looks += (kind, x)
        else:
            # Of the class: a wrapper may have the attributes of what it wraps.
            plain = kind is list or kind is tuple
            inner = look_of(x) if plain else x._look if hasattr(kind, "_look") else None
            if inner is None:
                return None
            looks += (kind, inner)
    return tuple(looks)


def once(check: _Check) -> _Check:
    """`check`, which does not run again for arguments that look like those of a call that passed.

    It raises, or returns a tuple, which follows from how its arguments look and from autocast alone.
    """
    found: dict[Any, Any] = {}

    @functools.wraps(check)
    def checked(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return check(*args)
        look: Any = look_of(args)
        if look is None:
            return check(*args)
        if torch._C._is_any_autocast_enabled():
            look += tuple(torch.is_autocast_enabled(x) and torch.get_autocast_dtype(x) for x in AUTOCAST_DEVICES)
        result = found.get(look)
        if result is None:
            result = check(*args)
            if len(found) >= MOST_LOOKS:
                found.clear()
            found[look] = result
        return result

    return checked  # type: ignore[return-value]
