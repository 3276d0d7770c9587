"""Checks that functions over ranks share, besides those of :mod:`vattn._checks`."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from vattn import _checks
from vattn._library import compute_dtype

GRADS = ("full", "partial")
MOST_VALUES = 64
"""Integers that an error message shows, rather than a checksum of them."""


def grad_mode(op: str, grad: object) -> None:
    """`grad` names what gradients of replicated tensors are."""
    if grad not in GRADS:
        raise ValueError(f"{op}: grad must be one of {', '.join(GRADS)}, got grad={grad!r}")


def settings_of(op: str, name: str, x: Tensor, **settings: Any) -> Mapping[str, Any]:
    """What all ranks must have alike: the dtype and the kind of device of `x`, its first axes and its head dim.

    Raises:
        TypeError: `x` is a DTensor, which the public operators take.
    """
    _checks.dense(op, name, x)
    return {
        "dtype": compute_dtype(x), "device type": x.device.type, "batch": x.shape[0], "heads": x.shape[1],
        "head_dim": x.shape[-1], **settings,
    }  # fmt: skip


def asks(*tensors: Tensor) -> bool:
    """Whether a backward through these will come: if it sends anything, all ranks must take part."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def values_of(x: Tensor | None) -> Any:
    """What tells the values of a tensor of integers, where they can be looked at without waiting for a device."""
    if x is None:
        return None
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return tuple(x.shape), x.dtype
    return x.tolist() if x.numel() <= MOST_VALUES else (tuple(x.shape), crc(x))


def crc(x: Tensor) -> int:
    """A number that other values of a tensor of integers on the CPU would hardly have."""
    with temporarily_clear_interpreter_stack():
        return zlib.crc32(x.contiguous().numpy().data)
