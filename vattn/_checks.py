"""Checks of what a caller passes: a wrong call is explained before any kernel runs.

Messages read ``"<op>: <what must hold>, got <name>=<value>"``. A wrong type or dtype raises TypeError,
a wrong shape or value ValueError.
"""

import math
import numbers

import torch
from torch import Tensor

from vattn._library import compute_dtype
from vattn._meshes import on_mesh

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256
PLAIN = {"DTensor": "a local tensor, see DTensor.to_local", "MaskedTensor": "a tensor without a mask"}
"""What must be there instead, by the names of subclasses whose numbers are not all there is to them."""


def tensor(op: str, name: str, x: object, meshes: bool = True) -> None:
    """`x` is a floating-point tensor of a dtype that the operators support, and for `meshes` perhaps a DTensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {name}={type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {name}.dtype={x.dtype}")
    dense(op, name, x, meshes)


def dense(op: str, name: str, x: Tensor, meshes: bool = False) -> None:
    """All numbers of `x` are here, in memory with strides: neither nested, sparse, masked nor distributed.

    For `meshes` it may be a DTensor.
    """
    if x.layout is not torch.strided or x.is_nested:
        got = f"{name}=nested tensor" if x.is_nested else f"{name}.layout={x.layout}"
        raise TypeError(f"{op}: {name} must be a dense tensor, got {got}")
    if type(x) is not Tensor and (must := PLAIN.get(type(x).__name__)) and not (meshes and on_mesh(x)):
        raise TypeError(f"{op}: {name} must be {must}, got {name}={type(x).__name__}")


def rank(op: str, name: str, x: Tensor, axes: str) -> None:
    """`x` has the axes that `axes` names, such as "(B, H, T, N, D)"."""
    if x.dim() != axes.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape {axes}, got {name}.shape={tuple(x.shape)}")


def same(op: str, first_name: str, first: Tensor, name: str, x: Tensor, shape: bool = True) -> None:
    """`x` has the dtype, the device and (unless `shape` is off) the shape of `first`."""
    if compute_dtype(x) != compute_dtype(first):
        raise TypeError(f"{op}: {name} must have the dtype of {first_name} ({first.dtype}), got {name}.dtype={x.dtype}")
    if x.device != first.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {first_name} ({first.device}), got {name}.device={x.device}"
        )
    if shape and x.shape != first.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {first_name} {tuple(first.shape)}, got {name}.shape={tuple(x.shape)}"
        )


def alike(op: str, axes: str, **tensors: Tensor) -> None:
    """All are tensors with the axes that `axes` names, "(B, H, *grid, D)" among them, and like the first one."""
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        tensor(op, name, x)
        if "*" not in axes:
            rank(op, name, x, axes)
        elif x.dim() <= axes.count(","):
            raise ValueError(f"{op}: {name} must have shape {axes}, got {name}.shape={tuple(x.shape)}")
        same(op, first_name, first, name, x)


def head_dim(op: str, x: Tensor) -> None:
    """The last axis of `x` is a head dim that the kernels take."""
    if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be between 1 and {MAX_HEAD_DIM}, got head_dim={x.shape[-1]}")


def integer(op: str, name: str, value: object, least: int) -> None:
    """`value` is an int of at least `least` (a bool is not an int here)."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {name}={value!r}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {name}={value}")


def boolean(op: str, name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {name}={value!r}")


def generator(op: str, name: str, value: object) -> None:
    """`value` is a generator of random numbers."""
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{op}: {name} must be a torch.Generator, got {name}={value!r}")


def dropout(op: str, dropout_p: object) -> float:
    """`dropout_p` as a float, which is a probability."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"{op}: dropout_p must be a float, got dropout_p={dropout_p!r}")
    probability = float(dropout_p)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"{op}: dropout_p must be between 0 and 1, got dropout_p={dropout_p}")
    return probability


def scale(op: str, value: object, head_dim: int) -> float:
    """The factor of the scores: `value`, or `head_dim ** -0.5` for None. 0.0 is a value like any other."""
    if value is None:
        return head_dim**-0.5
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{op}: scale must be a float or None, got scale={value!r}")
    # In a trace, float() makes a constant of what is symbolic.
    factor: float = value if isinstance(value, torch.SymFloat) else float(value)  # type: ignore[assignment]
    if not -math.inf < factor < math.inf:  # which compiles, where math.isfinite does not
        raise ValueError(f"{op}: scale must be finite, got scale={value}")
    return factor


def sequence(op: str, name: str, value: object) -> list[Tensor]:
    """`value` is a list or tuple with at least one element."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {name}={type(value).__name__}")
    if not value:
        raise ValueError(f"{op}: {name} must have at least one element, got len({name})=0")
    return list(value)


def lengths(op: str, name: str, value: object, query: Tensor) -> None:
    """`value` is one int per sample; how large they are is for the kernels to see."""
    value = index_tensor(op, name, value, meshes=True)
    if value.device != query.device:
        raise ValueError(
            f"{op}: {name} must be on the device of query ({query.device}), got {name}.device={value.device}"
        )
    if value.shape != query.shape[:1]:
        raise ValueError(f"{op}: {name} must have shape ({query.shape[0]},), got {name}.shape={tuple(value.shape)}")


def index_tensor(op: str, name: str, x: object, meshes: bool = False) -> Tensor:
    """`x` is a tensor of ints that number or count things, and for `meshes` perhaps a DTensor."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        got = f"{name}.dtype={x.dtype}" if isinstance(x, Tensor) else f"{name}={x!r}"
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor, got {got}")
    dense(op, name, x, meshes)
    return x


def positions(op: str, value: object, like: Tensor, batch: int, length: int) -> None:
    """`value` is one int64 per token, ``(N,)`` or ``(B, N)``, on the device of `like`."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = f"positions.dtype={value.dtype}" if isinstance(value, Tensor) else f"positions={value!r}"
        raise TypeError(f"{op}: positions must be an int64 tensor, got {got}")
    dense(op, "positions", value, meshes=True)
    if value.device != like.device:
        raise ValueError(
            f"{op}: positions must be on the device of the tokens ({like.device}), got positions.device={value.device}"
        )
    if value.shape != ((length,) if value.dim() == 1 else (batch, length)):
        raise ValueError(
            f"{op}: positions must have shape ({length},) or ({batch}, {length}), "
            f"got positions.shape={tuple(value.shape)}"
        )


def same_but_tokens(op: str, query: Tensor, name: str, x: Tensor) -> None:
    """`x` has the shape of `query` in all but its axis of tokens."""
    if x.shape[:2] != query.shape[:2] or x.shape[3] != query.shape[3]:
        raise ValueError(
            f"{op}: {name} must have the batch, heads and head_dim of query {tuple(query.shape)}, "
            f"got {name}.shape={tuple(x.shape)}"
        )


def in_range(op: str, name: str, x: Tensor, count: int) -> None:
    """All of `x` number one of `count` things. Waits for the device; what is traced, or meta, holds no values."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or type(x) is not Tensor
    if traced or x.is_meta or x.numel() == 0:
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # such as the samples of vmap: look at all of them
        x = torch._C._functorch.get_unwrapped(x)
    least, most = (int(value) for value in x.aminmax())
    if least < 0 or most >= count:
        raise ValueError(
            f"{op}: {name} must be between 0 and {count - 1}, got values from {name}={least} to {name}={most}"
        )
