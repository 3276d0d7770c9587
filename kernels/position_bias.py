"""The bias table of relative positions, looked up inside a kernel; see ``vattn.position_bias``.

The offset of two tokens is a difference of two numbers, one per token: with the coordinates (t, h, w) of its position,

    code = (t * (2H-1) + h) * (2W-1) + w          index = code[query] - code[key] + (S-1) / 2

and positions in raster order have codes in the same order, so that codes also tell who comes first. A program owns
queries, or keys, that are all global or none of them; the tile of the others that it reads may have both. Then one
multiply-add finds the index of every pair::

    index = own[:, None] * times[None, :] + plus[None, :]

    own query     other key         own     times   plus
    local         local             code    1       (S-1)/2 - code
    local         global b                  0       S + G + b
    global a      local             a       1       S
    global a      global b                  G       S + 2G + b

    own key       other query
    local         local             -code   1       (S-1)/2 + code
    local         global a                  0       S + a
    global b      local             b       1       S + G
    global b      global a                  1       S + 2G + a * G

Rows that do not exist have code 0, and an index within the table.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language import target_info

from vattn.kernels import launch

TILE, NUM_WARPS = 256, 4  # tokens of a program
FIRST, LAST = tl.constexpr(-1), tl.constexpr(2**31 - 1)  # the place of a global key, and of a global query, in order


@launch.kernel
def code_kernel(position_ptr, code_ptr, count, T, H, W, TILE: tl.constexpr):
    """Grid: tiles of tokens. A program writes the codes of TILE positions, which it clamps to the grid (T, H, W)."""
    offs = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    position = tl.load(position_ptr + offs, mask=offs < count, other=0)
    position = tl.minimum(tl.maximum(position, 0), T * H * W - 1).to(tl.int32)
    row = position // W
    code = (row // H * (2 * H - 1) + row % H) * (2 * W - 1) + position % W
    tl.store(code_ptr + offs, code, mask=offs < count)


def codes(window: Sequence[int], positions: Tensor | None, tokens: int, like: Tensor) -> Tensor:
    """The codes of `tokens` tokens, int32 ``(N,)`` or, like `positions`, ``(B, N)``; without a window their ranks."""
    if positions is None:
        positions = torch.arange(tokens, device=like.device)
    positions = positions.contiguous()
    if len(window) == 0:  # who comes first is all that is asked: any position has a rank of 32 bits
        return torch.searchsorted(positions.sort(-1).values.contiguous(), positions, out_int32=True)
    code = positions.new_empty(positions.shape, dtype=torch.int32)
    if code.numel() > 0:
        programs = launch.cdiv(code.numel(), TILE)
        launch.launch(
            code_kernel, programs, like, positions, code, code.numel(), *window, TILE=TILE, num_warps=NUM_WARPS
        )
    return code


def arguments(
    table: Tensor | None, window: Sequence[int], positions: Tensor | None, tokens: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int]]:  # fmt: skip
    """The arguments of a kernel: the table (H, R), the codes, and ``(code_step, R, S)``.

    Without a table there are codes only if there are positions, which tell who comes first.
    """
    if table is None and positions is None:
        return None, None, (0, 0, 0)
    code = codes(window, positions, tokens, like)
    code_step = code.shape[1] if code.dim() == 2 else 0
    if table is None:
        return None, code, (code_step, 0, 0)
    num_offsets = math.prod(2 * size - 1 for size in window)
    return table.t().contiguous(), code, (code_step, table.shape[0], num_offsets)


@triton.constexpr_function
def assembles_ptx():
    """Whether a kernel may contain PTX."""
    return target_info.is_cuda() and not knobs.runtime.interpret


@triton.jit
def once(x):
    """`x` (rows,) int32, as Triton must not compute it again.

    It would, for every layout that needs it, with all the loads that it takes: for the addition to the table's
    gradient, whose layout is not that of the scores, a list's column and then a code in each tile.
    """
    if assembles_ptx():
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def load_codes(code_ptr, row, mask, G):
    """The codes of rows, of which the first G are global and have none; `mask` is None where all rows exist."""
    has_code = row >= G
    if mask is not None:
        has_code = has_code & mask
    return once(tl.load(code_ptr + row - G, mask=has_code, other=0))


@triton.jit
def own_query(row, code, mask, is_global):
    """`own` of the queries that a program owns."""
    return tl.where(is_global, tl.where(mask, row, 0), code)


@triton.jit
def other_keys(row, code, is_global, S, G):
    """`times` and `plus` of keys, for queries that are global or not."""
    to_global = row < G
    times = tl.where(to_global, tl.where(is_global, G, 0), 1)
    to_local = tl.where(is_global, S, (S >> 1) - code)
    return times, tl.where(to_global, tl.where(is_global, S + 2 * G, S + G) + row, to_local)


@triton.jit
def own_key(row, code, mask, is_global):
    """`own` of the keys that a program owns."""
    return tl.where(is_global, tl.where(mask, row, 0), -code)


@triton.jit
def other_queries(row, code, is_global, S, G):
    """`times` and `plus` of queries, for keys that are global or not."""
    from_global = row < G
    times = tl.where(is_global, 1, tl.where(from_global, 0, 1))
    of_global = tl.where(is_global, S + 2 * G + row * G, S + row)
    return times, tl.where(from_global, of_global, tl.where(is_global, S + G, (S >> 1) + code))


@triton.jit
def place(own, row, code, is_global, S, G, OF_KEYS: tl.constexpr):
    """Where in the table of a head the bias of pairs (own, others) stands."""
    if OF_KEYS:
        times, plus = other_queries(row, code, is_global, S, G)
    else:
        times, plus = other_keys(row, code, is_global, S, G)
    return own[:, None] * times[None, :] + plus[None, :]


@triton.jit
def lookup(table_ptr, place):
    """The bias (own, others) of one head, whose table is at `table_ptr`.

    Triton would load it in a layout of its own and pass it on through shared memory: for a forward of 64 x 64 tiles on
    sm_90, 16 KiB more of it, and 84 bytes spilled where now none are. What an assembler instruction loads stays where
    it is used.
    """
    ptrs = table_ptr + place
    if assembles_ptx():
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptrs.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptrs)
