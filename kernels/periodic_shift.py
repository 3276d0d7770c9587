"""Periodic shift: per head, some channels of frame t come from frame t+1, as many from t-1.

    channel   0 .. fold     x[t+1]    (0 at the last frame)
           fold .. 2 fold   x[t-1]    (0 at the first frame)
         2 fold .. D        x[t]

LAPS (Zhang et al., "Leap Attention with Periodic Shift for Video Transformers", section 3.3). Seen from the
source, ``x[t]`` goes to up to three frames: its first channels to t-1, the next to t+1, the rest to t::

    frame        t-1        t         t+1
    x[t]       [:fold]   [2fold:]  [fold:2fold]

which is where leap attention stores its output, and from where its backward loads the gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import launch

BLOCK_ROWS, BLOCK_D, NUM_WARPS = 32, 128, 4


@triton.jit
def steps(offs_d, FOLD: tl.constexpr):
    """By how many frames each channel of a row moves: -1, +1 or 0."""
    return tl.where(offs_d < FOLD, -1, tl.where(offs_d < 2 * FOLD, 1, 0))


@triton.jit
def moved(offs_d, frame, num_frames, stride_frame, FOLD: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Where the channels of rows of `frame` are after the shift: offsets (1, channels) and whether (rows, channels)."""
    step = steps(offs_d, FOLD)
    target = frame[:, None] + step[None, :]
    offs = tl.multiple_of(step.to(tl.int64) * stride_frame, ALIGNMENT) + offs_d
    return offs[None, :], (target >= 0) & (target < num_frames)


@triton.jit
def load_moved(
    ptr, offs_row, mask_row, frame, num_frames, stride_frame, SHAPE: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """The rows of a shifted tensor, put together again from where the shift moved their channels."""
    HEAD_DIM: tl.constexpr = SHAPE[0]
    CHUNKS: tl.constexpr = SHAPE[1]
    ALIGNMENT: tl.constexpr = SHAPE[2]
    offs_row = tl.multiple_of(offs_row, ALIGNMENT)
    tiles = ()
    first: tl.constexpr = 0
    for i in tl.static_range(len(CHUNKS)):
        offs_d = first + tl.arange(0, CHUNKS[i])
        offs, mask = moved(offs_d, frame, num_frames, stride_frame, FOLD, ALIGNMENT)
        mask = mask & mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
        tiles = tiles + (tl.load(ptr + offs_row[:, None] + offs, mask=mask, other=0.0),)
        first += CHUNKS[i]
    return tiles


@triton.jit
def store_moved(
    ptr, offs_row, mask_row, tiles, frame, num_frames, stride_frame, SHAPE: tl.constexpr, FOLD: tl.constexpr
):  # fmt: skip
    """Write rows through the shift, and the zeros that it leaves in the first and the last frame."""
    HEAD_DIM: tl.constexpr = SHAPE[0]
    CHUNKS: tl.constexpr = SHAPE[1]
    ALIGNMENT: tl.constexpr = SHAPE[2]
    offs_row = tl.multiple_of(offs_row, ALIGNMENT)
    first: tl.constexpr = 0
    for i in tl.static_range(len(CHUNKS)):
        offs_d = first + tl.arange(0, CHUNKS[i])
        offs, mask = moved(offs_d, frame, num_frames, stride_frame, FOLD, ALIGNMENT)
        inside = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(ptr + offs_row[:, None] + offs, tiles[i].to(ptr.dtype.element_ty), mask=inside & mask)
        # A channel that no frame moves to these rows would come from beyond the clip, against its step.
        source = frame[:, None] - steps(offs_d, FOLD)[None, :]
        orphan = inside & ((source < 0) | (source >= num_frames))
        zeros = tl.zeros((offs_row.shape[0], CHUNKS[i]), ptr.dtype.element_ty)
        tl.store(ptr + offs_row[:, None] + offs_d[None, :], zeros, mask=orphan)
        first += CHUNKS[i]


@launch.kernel
def shift_kernel(
    x_ptr, out_ptr, x_strides, out_strides, H, T, N, rows,
    D: tl.constexpr, FOLD: tl.constexpr, TRANSPOSE: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: row blocks x channel blocks. A program writes BLOCK_ROWS rows, counted in memory order (B, T, N, H)."""
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    row = (pid // COLUMNS).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = pid % COLUMNS * BLOCK_D + tl.arange(0, BLOCK_D)
    h, n = row % H, row // H % N
    t, b = row // H // N % T, row // H // N // T
    step = -steps(offs_d, FOLD)  # against the shift: where the channel comes from
    if TRANSPOSE:
        step = -step
    offs_x = b * x_strides[0] + h * x_strides[1] + t * x_strides[2] + n * x_strides[3]
    offs_out = b * out_strides[0] + h * out_strides[1] + t * out_strides[2] + n * out_strides[3]
    source = tl.multiple_of(step.to(tl.int64) * x_strides[2], ALIGNMENT) + offs_d
    from_frame = t[:, None] + step[None, :]
    mask = (row < rows)[:, None] & (offs_d < D)[None, :]
    exists = mask & (from_frame >= 0) & (from_frame < T)
    x_ptrs = x_ptr + tl.multiple_of(offs_x, ALIGNMENT)[:, None] + source[None, :]  # (rows, channels)
    x = tl.load(x_ptrs, mask=exists, other=0.0)
    tl.store(out_ptr + tl.multiple_of(offs_out, ALIGNMENT)[:, None] + offs_d[None, :], x, mask=mask)


def forward(x: Tensor, fold_div: int, transpose: bool) -> Tensor:
    """The shift of `x` (B, H, T, N, D), or its transpose, in memory as (B, T, N, H, D)."""
    out = empty_rows(x)
    if x.numel() == 0:
        return out
    x = launch.with_rows(x)
    B, H, T, N, D = x.shape
    rows = B * T * N * H
    programs = triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(D, BLOCK_D)
    launch.launch(
        shift_kernel, programs, x, x, out, launch.strides(x, 4), launch.strides(out, 4), H, T, N, rows,
        D=D, FOLD=D // fold_div, TRANSPOSE=transpose, ALIGNMENT=launch.alignment(x, out),
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
