"""The host's side of a kernel: what a launcher passes to it, the same for all operators.

A kernel is compiled once for its dtypes, head dim, flags and tile sizes, and never again for a length or a stride:
:func:`kernel` turns off Triton's specialisation on argument values. What a value used to tell the compiler, that rows
may be loaded 16 bytes at a time, is one compile-time number, the alignment of a shape. Addresses in a tuple Triton
still specialises, on multiples of 16, which those of rows are as a rule.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn._replay import note_launch
from vattn.kernels import flash

VECTOR_BYTES = 16  # the widest load of every GPU here
# Said aloud because Triton's default changes with its version: ``exp2(s * factor - m)`` wants one rounding.
OPTIONS = {"enable_fp_fusion": True}
MOST_LAUNCHED = 4096
# Compiled kernels and their constants, by what they were launched with.
_launched: dict[Any, tuple[Any, list[Any]]] = {}


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit``, compiled anew only for other dtypes and other constexpr arguments."""
    values = [name for name, p in inspect.signature(function).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=values)


def launch(function: Any, programs: int, like: Tensor, *args: Any, **settings: Any) -> None:
    """Run `programs` programs of a kernel, in a one-dimensional grid, on the device of `like`."""
    device = like.get_device() if like.is_cuda else None
    with _on(device):
        # Triton finds a compiled kernel by what it makes of each argument, which takes longer than the launch.
        seen = id(function), device, *map(_known, args), *settings.values()
        if seen in _launched:
            compiled, constants = _launched[seen]
            run = compiled[(programs, 1, 1)]
            run(*args, *constants)
        else:
            compiled = launch_first(function, programs, *args, **settings)
            if compiled is None:  # by the interpreter
                note_launch(None, args)
                return
            if len(_launched) >= MOST_LAUNCHED:
                _launched.clear()
            constants = [settings[name] for name in function.arg_names[len(args) :]]
            _launched[seen] = compiled, constants
            run = compiled[(programs, 1, 1)]
    note_launch(functools.partial(_run_on, device, run), [*args, *constants])


def launch_first(function: Any, programs: int, *args: Any, **settings: Any) -> Any:
    """Run a kernel as :func:`launch` does. Returns it compiled, or None if it is interpreted."""
    return function[(programs,)](*args, **settings, **OPTIONS)


def _on(device: int | None) -> contextlib.AbstractContextManager[object]:
    """Where the kernels of a device are launched."""
    if device is None or device == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _run_on(device: int | None, run: Callable[..., None], *args: Any) -> None:
    if device is None or device == torch.cuda.current_device():
        run(*args)
    else:
        with torch.cuda.device(device):
            run(*args)


def _known(x: Any) -> Any:
    """What a compiled kernel may depend on: of a tensor its dtype and alignment, of a number more than it does."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % VECTOR_BYTES == 0
    if isinstance(x, tuple) and x and type(x[0]) is not int:  # unlike what `pack` makes
        return tuple(map(_known, x))
    return x


def cdiv(x: int, y: int) -> int:
    """``x / y``, rounded up. ``triton.cdiv``, made for kernels, takes microseconds on the host."""
    return -(-x // y)


def with_rows(x: Tensor) -> Tensor:
    """`x`, copied if its last axis is not contiguous: a row must be one piece of memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def pack(values: Iterable[int]) -> tuple[int, ...]:
    """Integers for a kernel's tuple argument, which reads them with :func:`unpack`.

    Triton specialises the integers in a tuple whatever it is told: on being 1, and on being a multiple of 16.
    ``4 * value + 2`` is neither, for any value.
    """
    return tuple(4 * value + 2 for value in values)


@triton.jit
def unpack(packed, I: tl.constexpr):
    """Element I of a tuple that :func:`pack` made."""
    return packed[I] >> 2


def reciprocal(divisor: int) -> int:
    """What :func:`quotient` multiplies with to divide by `divisor`, from 1 to below 2**31: a factor and a shift."""
    shift = 31 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor) << 6 | shift


@triton.jit
def quotient(x, reciprocal):
    """``x // divisor`` of an integer from 0 to below 2**31, exactly, and without the dozens of steps of a division."""
    return ((x * (reciprocal >> 6)) >> (reciprocal & 63)).to(tl.int32)


@triton.jit
def head(ptr, strides, bh, H):
    """Where a batch and head begin."""
    return ptr + (bh // H).to(tl.int64) * unpack(strides, 0) + (bh % H).to(tl.int64) * unpack(strides, 1)


class Layout(NamedTuple):
    """How the rows of a tensor lie, whatever its address."""

    strides: tuple[int, ...]  # of all axes but the last, packed; 0 where there is nothing to step over
    step: int  # what all of them are multiples of, in elements
    reach: int  # from the first to the last row of a batch and head, in elements


@functools.lru_cache(4096)  # a call of a few microseconds has time to look up what it has seen, not to work it out
def _layout(sizes: tuple[int, ...], steps: tuple[int, ...]) -> Layout:
    steps = tuple(step if size > 1 else 0 for size, step in zip(sizes[:-1], steps[:-1], strict=True))
    reach = sum((size - 1) * abs(step) for size, step in zip(sizes[2:-1], steps[2:], strict=True))
    return Layout(pack(steps), math.gcd(*steps), reach)


def layout(x: Tensor) -> Layout:
    """How the rows of `x` lie."""
    return _layout(x.shape, x.stride())


def strides(x: Tensor) -> tuple[int, ...]:
    """The strides of all axes but the last, packed."""
    return layout(x).strides


def alignment(*tensors: Tensor) -> int:
    """How many elements each row of `tensors` starts a multiple of: those of a vector load, or 1."""
    vector = VECTOR_BYTES // tensors[0].element_size()
    aligned = all(x.data_ptr() % VECTOR_BYTES == 0 and layout(x).step % vector == 0 for x in tensors)
    return vector if aligned else 1


def shape(*tensors: Tensor) -> flash.Shape:
    """How the rows of `tensors`, which have one head dim, are cut and aligned, and how far apart they may be."""
    far = any(layout(x).reach >= 2**31 for x in tensors)
    return flash.shape(tensors[0].shape[-1], alignment(*tensors), far)


def partial(like: Tensor, splits: int) -> Tensor:
    """Results (splits, B, H, tokens, D), each in memory as :func:`empty_rows`; in float32 where there are several."""
    if splits == 1:
        return empty_rows(like)[None]
    B, H, L, D = like.shape
    return like.new_empty((splits, B, L, H, D), dtype=torch.float32).transpose(2, 3)


def sums(like: Tensor, splits: int) -> Tensor:
    """A number for each row and split, (splits, B, H, tokens) float32."""
    return like.new_empty((splits, *like.shape[:-1]), dtype=torch.float32)


def total(parts: Tensor, like: Tensor) -> Tensor:
    """The sum of partial results, always in the same order."""
    return parts[0] if parts.shape[0] == 1 else empty_rows(like).copy_(parts.sum(0))


def precision() -> str:
    """How float32 matrices are multiplied: as ``torch.backends.cuda.matmul.fp32_precision`` says.

    It follows ``torch.set_float32_matmul_precision``, which must not be asked once the other has been set. On NVIDIA no
    matrix instruction takes float32: unless tf32 is allowed, each factor is split into two tf32 numbers, and three
    products of them are added. What is lost is of the size of float32's own rounding.
    """
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if torch.version.hip is not None else "tf32x3"
