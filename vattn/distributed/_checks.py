"""Checks that functions over ranks share, besides those of :mod:`vattn._checks`."""

import ctypes
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
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def grad_mode(op: str, grad: object) -> None:
    """`grad` names what gradients of replicated tensors are."""
    if grad not in GRADS:
        raise ValueError(f"{op}: grad must be one of {', '.join(GRADS)}, got grad={grad!r}")


def settings_of(op: str, name: str, x: Tensor, **settings: Any) -> Mapping[str, Any]:
    """What must be the same on all ranks: the dtype and the kind of device of `x`, its first axes and its head dim.

    Raises:
        TypeError: `x` is a DTensor, which the public operators take.
    """
    _checks.dense(op, name, x)
    return {
        "dtype": compute_dtype(x), "device type": x.device.type, "batch": x.shape[0], "heads": x.shape[1],
        "head_dim": x.shape[-1], **settings,
    }  # fmt: skip


def asks(*tensors: Tensor) -> bool:
    """Whether these need gradients: if the backward sends anything, all ranks must take part."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def values_of(x: Tensor | None) -> Any:
    """A checksum of a tensor of integers, where its values can be read without waiting for a device."""
    if x is None:
        return None
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return tuple(x.shape), x.dtype
    return x.tolist() if x.numel() <= MOST_VALUES else (tuple(x.shape), crc(x))


def crc(x: Tensor) -> int:
    """A checksum of a tensor on the CPU."""
    with temporarily_clear_interpreter_stack():
        x = x.detach().contiguous()
        return zlib.crc32((ctypes.c_char * x.nbytes).from_address(x.data_ptr()))  # NumPy may not be installed


def fingerprint(value: Any) -> int:
    """A checksum (int64) of tensors, numbers, strings, and lists and dicts of them."""
    if isinstance(value, Tensor):
        x = torch.view_as_real(value) if value.is_complex() else value
        rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1] if x.dim() else 1).contiguous()
        bits = rows.view(_INTEGERS[x.element_size()])
        sums = [bits.sum(axis) for axis in (0, 1)]  # weighted by their place, so that an order counts, too
        totals = [(x * torch.arange(1, len(x) + 1, device=x.device)).sum().item() for x in sums]
        return zlib.crc32(repr((tuple(value.shape), value.dtype, totals)).encode())
    if isinstance(value, Mapping):
        return zlib.crc32(repr([(name, fingerprint(value[name])) for name in sorted(value, key=str)]).encode())
    if isinstance(value, (list, tuple)):
        return zlib.crc32(repr([fingerprint(item) for item in value]).encode())
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
    return zlib.crc32(repr(value if plain else type(value).__name__).encode())
