"""Axial attention on the GPU: the itinerary of the lines of a grid.

The axes before that of the lines are one, `outer`, and those behind it, `inner`; lines are numbered through both. Of a
line that is longer than a tile, a program owns a part and reads the others. Of short ones it owns as many whole lines
as its tile has room for, and a token reads the lanes of its own line::

    inner = 3, lines of 2 tokens, tiles of 8 rows
    row     0   1 | 2   3 | 4   5 |              line and token are row // 2 and row % 2
    line    0   0 | 1   1 | 2   2 |              line 3 begins in the next tile

So lines of 4 tokens do not cost a tile each, and nothing is permuted. Ho et al., "Axial Attention in Multidimensional
Transformers" (2019).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import attention, configs, flash, launch
from vattn.kernels.itinerary import Itinerary
from vattn.kernels.launch import head, unpack
from vattn.kernels.launchers import Launchers


@triton.jit
def own(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A tile of a group of lines, ``(first line, L, inner, rows)``."""
    outer, L, inner, lines, tiles, _, _, _ = where[1]
    groups = tl.cdiv(outer * inner, lines)
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    line = pid % groups * lines
    rows = tl.minimum(lines, outer * inner - line) * L
    return pid // groups, 0, (line, L, inner, rows), tile * BLOCK, rows


@triton.jit
def span(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """The line."""
    rows = group[3]
    return 0, rows - rows % BLOCK, rows


@triton.jit
def lanes(group, BLOCK: tl.constexpr):
    """The lanes of a tile."""
    return tl.arange(0, BLOCK)


@triton.jit
def locate(start, lane, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """Tokens of one line, (outer, token, inner)."""
    line, _, inner, _ = group
    return line // inner, start + lane, line % inner


@triton.jit
def offsets(row, strides, SHAPE: tl.constexpr):
    """Offsets of rows within their batch and head."""
    offs = flash.index(row[0], SHAPE) * unpack(strides, 2) + flash.index(row[2], SHAPE) * unpack(strides, 4)
    return offs + flash.index(row[1], SHAPE) * unpack(strides, 3)


@triton.jit
def number(row, group):
    """Token numbers in the grid."""
    return (row[0] * group[1] + row[1]) * group[2] + row[2]


PARTS = Itinerary(own, span, lanes, locate, offsets, number)


@triton.jit
def span_tile(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """The lines of the group, which are one tile."""
    return 0, 0, group[3]


@triton.jit
def locate_lines(start, lane, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """Tokens of several lines, (outer, token, inner, line of the tile)."""
    first, L, inner, _ = group
    row = start + lane
    line = first + row // L
    return line // inner, row % L, line % inner, row // L


@triton.jit
def own_line(where, row, mask, group, OF_KEYS: tl.constexpr):
    """The line of the rows owned."""
    return (row[3],)


@triton.jit
def same_line(where, pair, row, mask, group, OF_KEYS: tl.constexpr):
    """Which row of a tile reads which: (queries, keys)."""
    allowed = pair[0][:, None] == row[3][None, :]
    if mask is not None:
        allowed = allowed & mask[None, :]
    return allowed


LINES = dataclasses.replace(PARTS, span=span_tile, locate=locate_lines, pair=own_line, allowed=same_line)


@launch.kernel
def backward_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, seed,
    n0, n1, n2, n3, n4, do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, grad_strides,
    lse_rows, H, heads, scale, threshold, keep_scale,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x whole lines. A program owns the rows of its lines: their dq, dk and dv.

        delta = <dout, out> - dlse,   dq = scale * ds k,   dv = p^T dout,   dk = scale * ds^T q

    A driver of its own, because it loads every row once, where one pass for queries and one for keys load all twice.
    """
    bh, _, group, _, rows = OP.own(((), (n0, n1, n2, n3, n4, 0, 0, 0)), H, heads, BLOCK_Q, BLOCK_K)
    lane = tl.arange(0, BLOCK_Q)
    row, mask = OP.locate(0, lane, rows, group, 0, False), lane < rows
    offs_row = bh.to(tl.int64) * lse_rows + number(row, group)
    do = flash.load_rows(head(do_ptr, do_strides, bh, H), offsets(row, do_strides, SHAPE), mask, SHAPE)
    out = flash.load_rows(head(out_ptr, out_strides, bh, H), offsets(row, out_strides, SHAPE), mask, SHAPE)
    delta = flash.row_dot(do, out)
    if dlse_ptr is not None:
        dlse_ptrs = head(dlse_ptr, dlse_strides, bh, H) + offsets(row, dlse_strides, SHAPE)
        delta -= tl.load(dlse_ptrs, mask=mask, other=0.0)
    lse = flash.load_lse(lse_ptr + offs_row, mask)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(row, q_strides, SHAPE), mask, SHAPE)
    k = flash.load_rows(head(k_ptr, k_strides, bh, H), offsets(row, k_strides, SHAPE), mask, SHAPE)
    v = flash.load_rows(head(v_ptr, v_strides, bh, H), offsets(row, v_strides, SHAPE), mask, SHAPE)

    keep = None
    if len(seed) > 0:
        add, times, _ = attention.dropout_of(seed, bh, number(row, group), mask, threshold)
        keep = flash.dropout_keep(add, times, threshold, flash.key_number(seed, number(row, group), mask)[None, :])
    s, dp = flash.scores(q, k, PRECISION), flash.scores(do, v, PRECISION)  # (queries, keys)
    allowed = (row[3][:, None] == row[3][None, :]) & mask[None, :]
    p, ds = flash.backward_step(s, scale, lse[:, None], dp, delta[:, None], allowed, keep, keep_scale)
    offs = offsets(row, grad_strides, SHAPE)
    zero = flash.zero_rows(BLOCK_Q, SHAPE)
    dv = flash.accumulate(zero, tl.trans(p), do, PRECISION)
    flash.store_rows(head(dv_ptr, grad_strides, bh, H), offs, mask, flash.scale_rows(dv, keep_scale), SHAPE)
    dk = flash.accumulate(zero, tl.trans(ds), q, PRECISION)
    flash.store_rows(head(dk_ptr, grad_strides, bh, H), offs, mask, flash.scale_rows(dk, scale), SHAPE)
    dq = flash.accumulate(zero, ds, k, PRECISION)
    flash.store_rows(head(dq_ptr, grad_strides, bh, H), offs, mask, flash.scale_rows(dq, scale), SHAPE)


def _part(call: attention.Call, phase: str) -> attention.Part:
    """A program for every tile of whole lines, if a tile has room for a line, or else of a part of one."""
    outer, L, inner = call.query.shape[2:-1]
    tiles = _lines(call, phase)
    if tiles is not None:
        op, count, parts = LINES, tiles["BLOCK_Q"] // L, 1
    else:
        tiles = configs.tiles(phase, call.query, call.extras, "group")
        op, count, parts = PARTS, 1, launch.cdiv(L, configs.own_and_other(phase, tiles)[0])
    programs = call.heads * launch.cdiv(outer * inner, count) * parts
    return attention.Part(op, tiles, programs, (outer, L, inner, count, parts))


def _lines(call: attention.Call, phase: str) -> dict[str, int] | None:
    """Tiles of whole lines, if one has room for a line; all gradients have one kernel then."""
    phase = "backward" if phase.startswith("backward") else phase
    return configs.line_tiles(phase, call.query, call.extras, call.query.shape[3])


_launchers = Launchers(_part)


def _as_lines(dim: int, rows: Sequence[Tensor], numbers: Sequence[Tensor] = ()) -> list[Tensor]:
    """Grids (B, H, *grid, D), and `numbers` (B, H, *grid), as (B, H, outer, line, inner, ...), copied if need be."""
    B, H, *grid, D = rows[0].shape
    shape = B, H, math.prod(grid[:dim]), grid[dim], math.prod(grid[dim + 1 :])
    return [*(x.reshape(*shape, D) for x in rows), *(x.reshape(shape) for x in numbers)]


def forward(query: Tensor, key: Tensor, value: Tensor, dim: int, *settings: Any) -> tuple[Tensor, Tensor]:
    """As :class:`Launchers`, of a grid."""
    out, lse = _launchers.forward(*_as_lines(dim, (query, key, value)), *settings)
    return out.view(query.shape), lse.view(query.shape[:-1])


def jvp(
    query_tangent: Tensor, key_tangent: Tensor, value_tangent: Tensor, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, dim: int, *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :class:`Launchers`, of a grid."""
    rows = query_tangent, key_tangent, value_tangent, query, key, value, out
    dout, dlse = _launchers.jvp(*_as_lines(dim, rows, [lse]), *settings)
    return dout.view(query.shape), dlse.view(query.shape[:-1])


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    dim: int, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of query, key and value; memory beyond them is `delta`, as large as lse, where lines are long."""
    rows, numbers = (grad_out, query, key, value, out), [lse] if grad_lse is None else [lse, grad_lse]
    do, q, k, v, o, lse, *grad = _as_lines(dim, rows, numbers)
    grads = _backward(do, grad[0] if grad else None, q, k, v, o, lse, *settings)
    return tuple(x.view(query.shape) for x in grads)


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = attention.Call(query, [key], [value], *settings)
    if lse.numel() == 0 or _lines(call, "backward") is None:
        return _launchers.backward(grad_out, grad_lse, query, key, value, out, lse, *settings)
    grads = empty_rows(query), empty_rows(query), empty_rows(query)
    _backward_lines(call, _part(call, "backward"), grad_out, grad_lse, out, lse, grads)
    return grads


def _backward_lines(
    call: attention.Call, part: attention.Part, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """All gradients in one pass."""
    grad_out, out, lse = launch.with_rows(grad_out), launch.with_rows(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    inputs = grad_out, call.query, call.keys[0], call.values[0], out, grads[0]
    first, *others = (launch.strides(x) for x in inputs)
    dlse_strides = None if grad_lse is None else launch.strides(grad_lse[..., None])
    launch.launch(
        backward_kernel, part.programs, call.query, grad_out, grad_lse, *inputs[1:5], lse, *grads, call.seed,
        *part.numbers, first, dlse_strides, *others, lse[0, 0].numel(), call.query.shape[1], call.heads, call.scale,
        call.threshold, call.keep_scale, OP=part.op, SHAPE=launch.shape(*inputs), PRECISION=launch.precision(),
        **part.tiles,
    )  # fmt: skip
