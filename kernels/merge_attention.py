"""Attention over a union of key sets, from attention over its parts.

    lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

With w_i = exp(lse_i - lse) and gradients g of out and g_lse of lse, the backward is

    d out_i = w_i g,   d lse_i = w_i (<g, out_i - out> + g_lse)

and the tangents, from those of the parts,

    dlse = sum_i w_i dlse_i,   dout = sum_i w_i (dout_i + dlse_i out_i) - dlse out

A part with an lse of -inf has no keys: whatever else it holds, it has no weight and no gradient. Of an lse that is NaN,
so is the weight. Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3: this is the
online softmax with whole parts for keys::

    part      0           1           2
    lse_i   ---+-----------+-----------+--> weights w_i, sum 1
    out_i   ---+-----------+-----------+--> out

The parts are a tuple of pointers, one compiled kernel for each length of it, and nothing is stacked. Those that lie in
one tensor, because splits wrote them there, are one pointer and a step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import flash, launch
from vattn.kernels.launch import unpack

MAX_PARTS = 16  # of one kernel, whose loops over the parts are unrolled; more are merged in rounds
TILE, NUM_WARPS = 2048, 4  # elements of a program


@triton.jit
def row_offsets(row, sizes, strides):
    """Offsets of rows that are numbered in the order of `sizes`."""
    offs = row * 0
    for i in tl.static_range(len(sizes) - 1, -1, -1):
        offs += row % unpack(sizes, i) * unpack(strides, i)
        row = row // unpack(sizes, i)
    return offs


@triton.jit
def part(ptrs, step, I: tl.constexpr):
    """Where part I begins: one of several tensors, or `step` elements after the part before it."""
    if step is None:
        return ptrs[I]
    else:
        return ptrs + I * step.to(tl.int64)


@launch.kernel
def forward_kernel(
    out_ptrs, lse_ptrs, out_step, lse_step, out_ptr, lse_ptr, sizes, strides, out_strides, rows,
    PARTS: tl.constexpr, SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows. A program writes BLOCK rows of out and lse."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):
        m = tl.maximum(m, tl.load(part(lse_ptrs, lse_step, i) + row, mask=mask, other=float("-inf")))
    m_finite = tl.where(m == float("-inf"), 0.0, m)
    offs = row_offsets(row, sizes, strides)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = flash.zero_rows(BLOCK, SHAPE)
    for i in tl.static_range(PARTS):
        lse = tl.load(part(lse_ptrs, lse_step, i) + row, mask=mask, other=float("-inf"))
        weight = tl.exp(lse - m_finite)
        total += weight
        rows_part = flash.load_rows(part(out_ptrs, out_step, i), offs, mask & (lse != float("-inf")), SHAPE)
        acc = flash.add_rows(acc, rows_part, weight[:, None])
    none = total == 0  # but not if it is NaN
    some = tl.where(none, 1.0, total)
    tl.store(lse_ptr + row, tl.where(none, m, m_finite + tl.log(some)), mask=mask)
    offs_out = row_offsets(row, sizes, out_strides)
    flash.store_rows(out_ptr, offs_out, mask, flash.scale_rows(acc, (1 / some)[:, None]), SHAPE)


@launch.kernel
def backward_kernel(
    g_ptr, g_lse_ptr, out_ptrs, lse_ptrs, out_ptr, lse_ptr, grad_out_ptrs, grad_lse_ptrs,
    sizes, g_strides, strides, out_strides, grad_strides, rows, SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows. A program writes BLOCK rows of the gradients of every part."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    g = flash.load_rows(g_ptr, row_offsets(row, sizes, g_strides), mask, SHAPE)
    out = flash.load_rows(out_ptr, row_offsets(row, sizes, out_strides), mask, SHAPE)
    shared = -flash.row_dot(g, out)
    if g_lse_ptr is not None:
        shared += tl.load(g_lse_ptr + row, mask=mask, other=0.0)
    lse = flash.load_lse(lse_ptr + row, mask)  # of +inf no part has a weight
    offs = row_offsets(row, sizes, strides)
    offs_grad = row_offsets(row, sizes, grad_strides)
    for i in tl.static_range(len(lse_ptrs)):
        lse_part = tl.load(lse_ptrs[i] + row, mask=mask, other=float("-inf"))
        read = lse_part != float("-inf")
        weight = tl.exp(lse_part - lse)
        rows_part = flash.load_rows(out_ptrs[i], offs, mask, SHAPE)
        grad_lse = tl.where(read, weight * (flash.row_dot(g, rows_part) + shared), 0.0)
        tl.store(grad_lse_ptrs[i] + row, grad_lse, mask=mask)
        grad = flash.rows_or_zero(read, flash.scale_rows(g, weight[:, None]))
        flash.store_rows(grad_out_ptrs[i], offs_grad, mask, grad, SHAPE)


@launch.kernel
def jvp_kernel(
    dout_ptrs, dlse_ptrs, out_ptrs, lse_ptrs, out_ptr, lse_ptr, dout_ptr, dlse_ptr,
    sizes, dout_strides, strides, out_strides, result_strides, rows, SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows. A program writes what its parts add to BLOCK rows of the tangents of out and lse."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    lse = flash.load_lse(lse_ptr + row, mask)  # of +inf no part has a weight
    offs, offs_dout = row_offsets(row, sizes, strides), row_offsets(row, sizes, dout_strides)
    dlse = tl.zeros((BLOCK,), tl.float32)
    acc = flash.zero_rows(BLOCK, SHAPE)
    for i in tl.static_range(len(lse_ptrs)):
        lse_part = tl.load(lse_ptrs[i] + row, mask=mask, other=float("-inf"))
        read = mask & (lse_part != float("-inf"))
        weight = tl.where(read, tl.exp(lse_part - lse), 0.0)
        dlse_part = weight * tl.load(dlse_ptrs[i] + row, mask=read, other=0.0)
        dlse += dlse_part
        acc = flash.add_rows(acc, flash.load_rows(dout_ptrs[i], offs_dout, read, SHAPE), weight[:, None])
        acc = flash.add_rows(acc, flash.load_rows(out_ptrs[i], offs, read, SHAPE), dlse_part[:, None])
    out = flash.load_rows(out_ptr, row_offsets(row, sizes, out_strides), mask, SHAPE)
    dout = flash.add_rows(acc, out, -dlse[:, None])
    tl.store(dlse_ptr + row, dlse, mask=mask)
    flash.store_rows(dout_ptr, row_offsets(row, sizes, result_strides), mask, dout, SHAPE)


def forward(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """out, laid out like the first part, and the contiguous lse."""
    return merge(outs, lses, outs[0].dtype)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of the outs, each laid out like its part, and of the lses."""
    grad_outs = [torch.empty_like(x) for x in outs]
    grad_lses = [x.new_empty(x.shape) for x in lses]
    if lse.numel() == 0:
        return grad_outs, grad_lses
    grad_out, out = launch.with_rows(grad_out), launch.with_rows(out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    parts, lses, stores = _alike(outs), [_aligned(x.contiguous()) for x in lses], _alike(grad_outs)
    sizes, shape = _sizes(out), _shape(grad_out, out, *parts, *stores)
    block = _block(shape)
    settings = {"SHAPE": shape, "BLOCK": block, "num_warps": NUM_WARPS}
    layouts = [_strides(x) for x in (grad_out, parts[0], out, stores[0])]
    for i in range(0, len(parts), MAX_PARTS):
        some = slice(i, i + MAX_PARTS)
        launch.launch(
            backward_kernel, launch.cdiv(lse.numel(), block), out, grad_out, grad_lse,
            tuple(parts[some]), tuple(lses[some]), out, lse, tuple(stores[some]), tuple(grad_lses[some]),
            sizes, *layouts, lse.numel(), **settings,
        )  # fmt: skip
    for grad, stored in zip(grad_outs, stores, strict=True):
        if stored is not grad:
            grad.copy_(stored)
    return grad_outs, grad_lses


def jvp(
    out_tangents: list[Tensor], lse_tangents: list[Tensor], outs: list[Tensor], lses: list[Tensor], out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tangents of out and lse: of more parts than one kernel takes, sums of partial ones."""
    dout = torch.empty_like(out)
    if lse.numel() == 0:
        return dout, torch.empty_like(lse)
    douts, parts, out = _alike(out_tangents), _alike(outs), launch.with_rows(out)
    dlses, lses = ([_aligned(x.contiguous()) for x in some] for some in (lse_tangents, lses))
    results = []
    for i in range(0, len(parts), MAX_PARTS):
        some = slice(i, i + MAX_PARTS)
        dtype = out.dtype if len(parts) <= MAX_PARTS else torch.float32
        result = torch.empty_like(out, dtype=dtype, memory_format=torch.contiguous_format), torch.empty_like(lse)
        layouts = [_strides(x) for x in (douts[0], parts[0], out, result[0])]
        shape = _shape(*douts, *parts, out, result[0])
        block = _block(shape)
        launch.launch(
            jvp_kernel, launch.cdiv(lse.numel(), block), out, tuple(douts[some]), tuple(dlses[some]),
            tuple(parts[some]), tuple(lses[some]), out, lse, *result, _sizes(out), *layouts, lse.numel(),
            SHAPE=shape, BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
        results.append(result)
    partial_outs, partial_lses = zip(*results, strict=True)
    dout.copy_(partial_outs[0] if len(results) == 1 else torch.stack(partial_outs).sum(0))
    return dout, partial_lses[0] if len(results) == 1 else torch.stack(partial_lses).sum(0)


def merge(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`forward`, with out in `dtype`."""
    if len(outs) > MAX_PARTS:
        rounds = range(0, len(outs), MAX_PARTS)
        merged = [merge(outs[i : i + MAX_PARTS], lses[i : i + MAX_PARTS], torch.float32) for i in rounds]
        return merge([out for out, _ in merged], [lse for _, lse in merged], dtype)
    out = torch.empty_like(outs[0], dtype=dtype)
    lse = lses[0].new_empty(lses[0].shape)
    if lse.numel() == 0:
        return out, lse
    parts, stored = _alike(outs), launch.with_rows(out)
    contiguous = tuple(_aligned(x.contiguous()) for x in lses)
    _merge(tuple(parts), contiguous, None, None, stored, lse, len(parts), _shape(stored, *parts), _strides(parts[0]))
    return (out if stored is out else out.copy_(stored)), lse


def merge_splits(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`merge` of :func:`launch.partial` results (splits, B, H, tokens, D), and of lses (splits, B, H, tokens)."""
    out, lse = torch.empty_like(outs[0], dtype=dtype), lses.new_empty(lses.shape[1:])
    if lse.numel() > 0:
        steps = outs.stride(0), lses.stride(0)
        _merge(outs, lses, *steps, out, lse, len(outs), _shape(out, outs), _strides(outs[0]))
    return out, lse


def _merge(
    outs: Any, lses: Any, out_step: int | None, lse_step: int | None, out: Tensor, lse: Tensor, parts: int,
    shape: flash.Shape, steps: tuple[int, ...],
) -> None:  # fmt: skip
    block = _block(shape)
    launch.launch(
        forward_kernel, launch.cdiv(lse.numel(), block), out, outs, lses, out_step, lse_step, out, lse,
        _sizes(out), steps, _strides(out), lse.numel(), PARTS=parts, SHAPE=shape, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """`tensors` if they have the same layout, row by row, as the kernels read them; else contiguous copies."""
    alike = len({_strides(x) for x in tensors}) == 1 and all(launch.with_rows(_aligned(x)) is x for x in tensors)
    return tensors if alike else [_aligned(x.contiguous()) for x in tensors]


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied if it starts between vectors: Triton specialises addresses in a tuple on multiples of 16."""
    return x if x.data_ptr() % launch.VECTOR_BYTES == 0 else x.clone()


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The sizes of all axes but the last, packed."""
    return launch.pack(x.shape[:-1] or (1,))


def _block(shape: flash.Shape) -> int:
    """How many rows a program has."""
    return max(1, TILE // flash.next_power_of_2(shape.width))


def _strides(x: Tensor) -> tuple[int, ...]:
    return launch.strides(x) or launch.pack((0,))


def _shape(*tensors: Tensor) -> flash.Shape:
    # Merging in rounds mixes dtypes: each pointer is aligned by its own, and a vector is the narrowest one's.
    return flash.shape(tensors[0].shape[-1], min(launch.alignment(x) for x in tensors))
