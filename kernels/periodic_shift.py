"""Periodic shift: per head, some channels of frame t come from frame t+1, as many from t-1.

    channel   0 .. fold     x[t+1]    (0 at the last frame)
           fold .. 2 fold   x[t-1]    (0 at the first frame)
         2 fold .. D        x[t]

LAPS (Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on
the periodic shift).
Seen from the source, ``x[t]`` goes to up to three frames: its first channels to t-1, the next to t+1, the rest to
t::

    frame        t-1        t         t+1
    x[t]       [:fold]   [2fold:]  [fold:2fold]

which is where leap attention stores its output, and from where its backward loads the gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import flash, launch
from vattn.kernels.launch import unpack

TILE, NUM_WARPS = 4096, 4  # elements of a program


@triton.jit
def steps(offs_d, FOLD: tl.constexpr):
    """By how many frames each channel of a row moves: -1, +1 or 0."""
    return tl.where(offs_d < FOLD, -1, tl.where(offs_d < 2 * FOLD, 1, 0))


@triton.jit
def moved(offs_d, frame, num_frames, stride_frame, SHAPE: tl.constexpr, FOLD: tl.constexpr):
    """Where the shift moves channels (1, D) of rows of `frame`: offsets (1, D), and whether in the clip (rows, D)."""
    step = steps(offs_d, FOLD)
    target = frame[:, None] + step
    ALIGNMENT: tl.constexpr = SHAPE.alignment  # Triton 3.6 takes no attribute here
    move = tl.multiple_of(step.to(tl.int64) * stride_frame, (1, ALIGNMENT))
    return move + offs_d, (target >= 0) & (target < num_frames)


@triton.jit
def load_moved(
    ptr, offs_row, mask_row, frame, num_frames, stride_frame, SHAPE: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """The rows of a shifted tensor, put together again from where the shift moved their channels."""
    ptrs = flash.aligned(ptr, offs_row, SHAPE)
    tiles = ()
    for i in tl.static_range(len(SHAPE.chunks)):
        offs_d = flash.columns(SHAPE, i)[None, :]
        offs, mask = moved(offs_d, frame, num_frames, stride_frame, SHAPE, FOLD)
        mask = mask & (offs_d < SHAPE.head_dim)
        if mask_row is not None:
            mask = mask & mask_row[:, None]
        tiles = tiles + (tl.load(ptrs + offs, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_moved(
    ptr, offs_row, mask_row, tiles, frame, num_frames, stride_frame, SHAPE: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """Write rows of `frame` to where the shift moves their channels.

    One store for each direction: with offsets that differ by channel a thread would own few channels of very
    many rows, and spill their addresses.
    """
    for step in tl.static_range(-1, 2):
        target = frame + step
        inside = mask_row & (target >= 0) & (target < num_frames)
        ptrs = flash.aligned(ptr + step * stride_frame.to(tl.int64), offs_row, SHAPE)
        for i in tl.static_range(len(SHAPE.chunks)):
            offs_d = flash.columns(SHAPE, i)[None, :]
            mask = inside[:, None] & (steps(offs_d, FOLD) == step) & (offs_d < SHAPE.head_dim)
            tl.store(ptrs + offs_d, tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_zeros(ptr, offs_row, mask_row, frame, num_frames, SHAPE: tl.constexpr, FOLD: tl.constexpr):
    """Write zeros to the channels of rows of `frame` to which the shift moves none: they would come from outside."""
    ptrs = flash.aligned(ptr, offs_row, SHAPE)
    for i in tl.static_range(len(SHAPE.chunks)):
        offs_d = flash.columns(SHAPE, i)[None, :]
        source = frame[:, None] - steps(offs_d, FOLD)
        mask = mask_row[:, None] & (offs_d < SHAPE.head_dim) & ((source < 0) | (source >= num_frames))
        tl.store(ptrs + offs_d, tl.zeros(mask.shape, ptr.dtype.element_ty), mask=mask)


@launch.kernel
def shift_kernel(
    x_ptr, out_ptr, x_strides, out_strides, H, T, N, rows, SHAPE: tl.constexpr, FOLD: tl.constexpr,
    TRANSPOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows. A program moves BLOCK rows of x, counted in the output's memory order (B, T, N, H).

    The shift stores each channel where it moves to; its transpose loads each from there.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_row = row < rows
    h, n = row % H, row // H % N
    t, b = row // H // N % T, row // H // N // T
    offs_x, offs_out = row * 0, row * 0
    index = (b, h, t, n)
    for i in tl.static_range(4):
        offs_x += index[i] * unpack(x_strides, i)
        offs_out += index[i] * unpack(out_strides, i)
    if TRANSPOSE:
        x = load_moved(x_ptr, offs_x, mask_row, t, T, unpack(x_strides, 2), SHAPE, FOLD)
        flash.store_rows(out_ptr, offs_out, mask_row, x, SHAPE)
    else:
        x = flash.load_rows(x_ptr, offs_x, mask_row, SHAPE)
        store_moved(out_ptr, offs_out, mask_row, x, t, T, unpack(out_strides, 2), SHAPE, FOLD)
        store_zeros(out_ptr, offs_out, mask_row, t, T, SHAPE, FOLD)


def forward(x: Tensor, fold_div: int, transpose: bool) -> Tensor:
    """The shift of `x` (B, H, T, N, D), or its transpose, in memory as (B, T, N, H, D)."""
    out = empty_rows(x)
    if x.numel() == 0:
        return out
    x = launch.with_rows(x)
    B, H, T, N, D = x.shape
    rows = B * H * T * N
    shape = flash.shape(D, launch.alignment(x, out))
    block = max(1, TILE // flash.next_power_of_2(shape.width))
    launch.launch(
        shift_kernel, launch.cdiv(rows, block), x, x, out, launch.strides(x), launch.strides(out),
        H, T, N, rows, SHAPE=shape, FOLD=D // fold_div, TRANSPOSE=transpose,
        BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
