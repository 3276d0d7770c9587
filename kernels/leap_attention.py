"""Leap attention on the GPU: the itinerary of one leap group.

A group is the frames ``base + j * leap``, ``j < members``; its tokens are the rows 0 .. members * N. Rows are
gathered where they lie, and a tile may straddle frames, so that 197 tokens do not waste half a tile::

    row     0            N            2N           leap = 2, group_size = 2, T = 4:
    frame   |    base    |  base + 2  |            groups (0, 2) and (1, 3)
    tile    |-------|-------|-------|---

The periodic shift is part of the store of the output and, transposed, of the loads of its gradient. LAPS:
Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022),
on leap attention and on the periodic shift.
"""

import dataclasses
import functools

import triton
import triton.language as tl

from vattn.kernels import attention, configs, flash, launch
from vattn.kernels.itinerary import Itinerary
from vattn.kernels.launch import quotient, unpack
from vattn.kernels.launchers import Launchers
from vattn.kernels.periodic_shift import load_moved, store_moved, store_zeros


@triton.jit
def own(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A tile of a group, ``(T, N, leap, base, rows, 1 / N)``.

    A group at the end of the clip may have fewer members than `group_size`; tiles past its end are empty.
    """
    T, N, leap, group_size, groups, inverse, _, _ = where[1]
    tiles = tl.cdiv(group_size * N, BLOCK)
    pid = tl.program_id(0)
    first, pid = pid % tiles * BLOCK, pid // tiles
    number, bh = pid % groups, pid // groups
    base = number // leap * (leap * group_size) + number % leap
    rows = tl.minimum(group_size, tl.cdiv(T - base, leap)) * N
    return bh, 0, (T, N, leap, base, rows, inverse), first, rows


@triton.jit
def span(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """All rows of the group."""
    rows = group[4]
    return 0, rows - rows % BLOCK, rows


@triton.jit
def lanes(group, BLOCK: tl.constexpr):
    """By how many frames and tokens lanes are behind the first one."""
    lane, N = tl.arange(0, BLOCK), group[1]
    return lane // N, lane % N


@triton.jit
def locate(start, lanes, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """Frame and token of the rows from `start` on."""
    _, N, leap, base, _, inverse = group
    frame = quotient(start, inverse)
    token = start - frame * N + lanes[1]
    wraps = (token >= N).to(tl.int32)
    return base + (frame + lanes[0] + wraps) * leap, token - wraps * N


@triton.jit
def offsets(row, strides, SHAPE: tl.constexpr):
    """Offsets of rows within their batch and head."""
    frame, token = row
    return flash.index(frame, SHAPE) * unpack(strides, 2) + flash.index(token, SHAPE) * unpack(strides, 3)


@triton.jit
def number(row, group):
    """Token numbers in the clip."""
    return row[0] * group[1] + row[1]


@triton.jit
def load_shifted(ptr, row, mask, strides, group, SHAPE: tl.constexpr, OP: tl.constexpr):
    """Rows with a shift by ``OP.constants`` channels undone."""
    offs = offsets(row, strides, SHAPE)
    return load_moved(ptr, offs, mask, row[0], group[0], unpack(strides, 2), SHAPE, OP.constants)


@triton.jit
def store_shifted(ptr, row, mask, rows, strides, group, SHAPE: tl.constexpr, OP: tl.constexpr):
    """Each channel to the frame it moves to, and zeros to the channels of own rows to which no frame moves."""
    T, N, leap, base, count, _ = group
    offs = offsets(row, strides, SHAPE)
    store_moved(ptr, offs, mask, rows, row[0], T, unpack(strides, 2), SHAPE, OP.constants)
    # Only groups with the first or the last frame of the clip have rows to which nothing moves.
    if (base == 0) | (base + (count // N - 1) * leap == T - 1):
        store_zeros(ptr, offs, mask, row[0], T, SHAPE, OP.constants)


PLAIN = Itinerary(own, span, lanes, locate, offsets, number)


@functools.cache
def itinerary(fold: int) -> Itinerary:
    """With a shift by `fold` channels."""
    if fold == 0:
        return PLAIN
    return dataclasses.replace(PLAIN, load=load_shifted, store=store_shifted, constants=fold)


def _part(call: attention.Call, phase: str, leap: int, group_size: int, fold_div: int) -> attention.Part:
    """A program for every tile of every group."""
    B, H, T, N, D = call.query.shape
    leap = min(leap, T)
    group_size = min(group_size, -(-T // leap))  # the members of the largest group
    spans, rest = divmod(T, leap * group_size)
    groups = spans * leap + min(leap, rest)
    tiles = configs.tiles(phase, call.query, call.extras, "group")
    own, _ = configs.own_and_other(phase, tiles)
    programs = launch.cdiv(group_size * N, own) * B * H * groups
    op = itinerary(D // fold_div if fold_div > 0 else 0)
    return attention.Part(op, tiles, programs, (T, N, leap, group_size, groups, launch.reciprocal(N)))


_launchers = Launchers(_part)
forward, backward, jvp = _launchers.forward, _launchers.backward, _launchers.jvp
