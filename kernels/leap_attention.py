"""Leap attention on the GPU: the itinerary of one leap group over the flash core.

A group is the frames ``base + j * leap``, ``j < members``; its tokens are the rows 0 .. members * N. Rows are
gathered where they lie, and a tile may straddle frames, so that 197 tokens do not waste half a tile::

    row     0            N            2N           leap = 2, group_size = 2, T = 4:
    frame   |    base    |  base + 2  |            groups (0, 2) and (1, 3)
    tile    |-------|-------|-------|---

The periodic shift is part of the store of the output and, transposed, of the loads of its gradient. LAPS:
Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022),
on leap attention and on the periodic shift.

In the kernels, ``group = (base, leap, N)`` and ``lanes = (lane // N, lane % N)`` say where rows are, so that a
tile costs one scalar division.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import configs, flash, launch
from vattn.kernels.launch import head, unpack
from vattn.kernels.periodic_shift import load_moved, store_moved, store_zeros


@triton.jit
def own_rows(T, N, leap, group_size, groups, BLOCK: tl.constexpr):
    """What this program owns: batch * H + head, the group, how many rows that has, and its tile's first row.

    A group at the end of the clip may have fewer members than `group_size`; tiles past its end are empty.
    """
    tiles = tl.cdiv(group_size * N, BLOCK)
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    number, bh = pid % groups, pid // groups
    base = number // leap * (leap * group_size) + number % leap
    members = tl.minimum(group_size, tl.cdiv(T - base, leap))
    return bh, (base, leap, N), members * N, tile * BLOCK


@triton.jit
def frame_token(first, lanes, group):
    """Frame and token of the rows that begin at `first`."""
    base, leap, N = group
    frame = first // N
    token = first - frame * N + lanes[1]
    wraps = (token >= N).to(tl.int32)
    return base + (frame + lanes[0] + wraps) * leap, token - wraps * N


@triton.jit
def offsets(frame, token, strides):
    """Offsets of rows within their batch and head."""
    return frame.to(tl.int64) * unpack(strides, 2) + token.to(tl.int64) * unpack(strides, 3)


@triton.jit
def load_rows(ptr, frame, token, mask, strides, T, SHAPE: tl.constexpr, FOLD: tl.constexpr):
    """Rows of one batch and head, (rows, D), with a shift by FOLD channels undone."""
    offs = offsets(frame, token, strides)
    if FOLD == 0:
        return flash.load_rows(ptr, offs, mask, SHAPE)
    else:
        return load_moved(ptr, offs, mask, frame, T, unpack(strides, 2), SHAPE, FOLD)


@triton.jit
def load_keys(kv, first, mask, lanes, group, SHAPE: tl.constexpr):
    """Keys and values of the rows that begin at `first`, (keys, D) each, and their token numbers (keys,)."""
    k_ptr, v_ptr, k_strides, v_strides = kv
    frame, token = frame_token(first, lanes, group)
    k = flash.load_rows(k_ptr, offsets(frame, token, k_strides), mask, SHAPE)
    v = flash.load_rows(v_ptr, offsets(frame, token, v_strides), mask, SHAPE)
    return k, v, frame.to(tl.int64) * group[2] + token


@launch.kernel
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr, q_strides, k_strides, v_strides, out_strides,
    H, T, N, leap, group_size, groups, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, FOLD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x group x query tile. A program owns BLOCK_Q queries of a group: their out and lse.

    With a shift it stores each channel of a row in the frame it moves to, and zeros in the channels of its own
    rows to which no frame moves.
    """
    bh, group, rows, first_q = own_rows(T, N, leap, group_size, groups, BLOCK_Q)
    if first_q >= rows:
        return
    lane = tl.arange(0, BLOCK_Q)
    mask_q = first_q + lane < rows
    frame, token = frame_token(first_q, (lane // N, lane % N), group)
    number = frame.to(tl.int64) * N + token
    dropout = None
    if DROPOUT:
        add, times = flash.dropout_query(seed_ptr, bh, number)
        dropout = (add[:, None], times[:, None], threshold)

    q = load_rows(head(q_ptr, q_strides, bh, H), frame, token, mask_q, q_strides, T, SHAPE, 0)
    kv = (head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides)
    state = flash.forward_start(BLOCK_Q, SHAPE)
    lane_k = tl.arange(0, BLOCK_K)
    lanes_k = (lane_k // N, lane_k % N)
    whole = rows // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        keys = load_keys(kv, first, None, lanes_k, group, SHAPE)
        state = flash.forward_keys(state, q, scale, keys, None, dropout, PRECISION, SIGN)
    if whole < rows:
        mask = whole + lane_k < rows
        keys = load_keys(kv, whole, mask, lanes_k, group, SHAPE)
        state = flash.forward_keys(state, q, scale, keys, mask, dropout, PRECISION, SIGN)

    out, lse = flash.forward_finish(state, scale, keep_scale)
    tl.store(lse_ptr + bh.to(tl.int64) * T * N + number, lse, mask=mask_q)
    out_ptr = head(out_ptr, out_strides, bh, H)
    offs = offsets(frame, token, out_strides)
    if FOLD == 0:
        flash.store_rows(out_ptr, offs, mask_q, out, SHAPE)
    else:
        store_moved(out_ptr, offs, mask_q, out, frame, T, unpack(out_strides, 2), SHAPE, FOLD)
        # Only groups with the first or the last frame of the clip have rows to which nothing moves.
        if (group[0] == 0) | (group[0] + (rows // N - 1) * leap == T - 1):
            store_zeros(out_ptr, offs, mask_q, frame, T, SHAPE, FOLD)


@launch.kernel
def backward_query_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, seed_ptr,
    do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, dq_strides,
    H, T, N, leap, group_size, groups, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, FOLD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x group x query tile. A program owns BLOCK_Q queries of a group: their dq and delta.

        delta = <dout, out> - dlse,   dq = scale * sum_k ds k

    The shift moves out and dout alike, so that delta is the same sum over the moved channels.
    """
    bh, group, rows, first_q = own_rows(T, N, leap, group_size, groups, BLOCK_Q)
    if first_q >= rows:
        return
    lane = tl.arange(0, BLOCK_Q)
    mask_q = first_q + lane < rows
    frame, token = frame_token(first_q, (lane // N, lane % N), group)
    number = frame.to(tl.int64) * N + token
    dropout = None
    if DROPOUT:
        add, times = flash.dropout_query(seed_ptr, bh, number)
        dropout = (add[:, None], times[:, None], threshold)

    do = load_rows(head(do_ptr, do_strides, bh, H), frame, token, mask_q, do_strides, T, SHAPE, FOLD)
    out = load_rows(head(out_ptr, out_strides, bh, H), frame, token, mask_q, out_strides, T, SHAPE, FOLD)
    delta = flash.row_dot(do, out)
    if dlse_ptr is not None:
        dlse_ptrs = head(dlse_ptr, dlse_strides, bh, H) + offsets(frame, token, dlse_strides)
        delta -= tl.load(dlse_ptrs, mask=mask_q, other=0.0)
    rows_before = bh.to(tl.int64) * T * N
    tl.store(delta_ptr + rows_before + number, delta, mask=mask_q)
    lse = flash.load_lse(lse_ptr + rows_before + number, mask_q)
    q = load_rows(head(q_ptr, q_strides, bh, H), frame, token, mask_q, q_strides, T, SHAPE, 0)

    query = (q, do, lse, delta)
    kv = (head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides)
    dq = flash.zero_rows(BLOCK_Q, SHAPE)
    lane_k = tl.arange(0, BLOCK_K)
    lanes_k = (lane_k // N, lane_k % N)
    whole = rows // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        keys = load_keys(kv, first, None, lanes_k, group, SHAPE)
        dq = flash.backward_keys(dq, query, scale, keys, None, dropout, keep_scale, PRECISION)
    if whole < rows:
        mask = whole + lane_k < rows
        keys = load_keys(kv, whole, mask, lanes_k, group, SHAPE)
        dq = flash.backward_keys(dq, query, scale, keys, mask, dropout, keep_scale, PRECISION)

    offs = offsets(frame, token, dq_strides)
    flash.store_rows(head(dq_ptr, dq_strides, bh, H), offs, mask_q, flash.scale_rows(dq, scale), SHAPE)


@launch.kernel
def backward_key_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, seed_ptr,
    do_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
    H, T, N, leap, group_size, groups, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, FOLD: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x group x key tile. A program owns BLOCK_K keys of a group: their dk and dv.

        dv = sum_q p^T dout,   dk = scale * sum_q ds^T q

    Tiles are (keys, queries). Queries past the group's end have lse = +inf, hence p = ds = 0.
    """
    bh, group, rows, first_k = own_rows(T, N, leap, group_size, groups, BLOCK_K)
    if first_k >= rows:
        return
    lane = tl.arange(0, BLOCK_K)
    mask_k = first_k + lane < rows
    lanes_k = (lane // N, lane % N)
    kv = (head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides)
    keys = load_keys(kv, first_k, mask_k, lanes_k, group, SHAPE)

    do_ptr, q_ptr = head(do_ptr, do_strides, bh, H), head(q_ptr, q_strides, bh, H)
    rows_before = bh.to(tl.int64) * T * N
    grads = flash.zero_rows(BLOCK_K, SHAPE), flash.zero_rows(BLOCK_K, SHAPE)
    lane_q = tl.arange(0, BLOCK_Q)
    lanes_q = (lane_q // N, lane_q % N)
    for first in range(0, rows, BLOCK_Q):
        mask_q = first + lane_q < rows
        frame, token = frame_token(first, lanes_q, group)
        number = frame.to(tl.int64) * N + token
        q = load_rows(q_ptr, frame, token, mask_q, q_strides, T, SHAPE, 0)
        do = load_rows(do_ptr, frame, token, mask_q, do_strides, T, SHAPE, FOLD)
        lse = flash.load_lse(lse_ptr + rows_before + number, mask_q)
        delta = tl.load(delta_ptr + rows_before + number, mask=mask_q, other=0.0)
        dropout = None
        if DROPOUT:
            add, times = flash.dropout_query(seed_ptr, bh, number)
            dropout = (add[None, :], times[None, :], threshold)
        query = (q, do, lse, delta)
        grads = flash.backward_queries(grads, keys, scale, query, None, dropout, keep_scale, PRECISION)

    dk, dv = grads
    frame, token = frame_token(first_k, lanes_k, group)
    dk_offs, dv_offs = offsets(frame, token, dk_strides), offsets(frame, token, dv_strides)
    flash.store_rows(head(dk_ptr, dk_strides, bh, H), dk_offs, mask_k, flash.scale_rows(dk, scale), SHAPE)
    flash.store_rows(head(dv_ptr, dv_strides, bh, H), dv_offs, mask_k, flash.scale_rows(dv, keep_scale), SHAPE)


def forward(
    query: Tensor, key: Tensor, value: Tensor, leap: int, group_size: int, fold_div: int,
    dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, T, N, D), in memory as (B, T, N, H, D), and the float32 lse (B, H, T, N)."""
    out = empty_rows(query)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    query, key, value = (launch.with_rows(x) for x in (query, key, value))
    sign, scale = flash.split_scale(scale)
    work = _Work(query, leap, group_size, fold_div, dropout_p, scale, (query, key, value, out))
    work.run(
        forward_kernel, "forward", query, key, value, out, lse, seed,
        *(launch.strides(x) for x in (query, key, value, out)), SIGN=sign,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    leap: int, group_size: int, fold_div: int, dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value; memory beyond them is `delta`, as large as lse."""
    dq, dk, dv = empty_rows(query), empty_rows(query), empty_rows(query)
    if lse.numel() == 0:
        return dq, dk, dv
    grad_out, query, key, value, out = (launch.with_rows(x) for x in (grad_out, query, key, value, out))
    delta = torch.empty_like(lse)
    inputs = (grad_out, query, key, value, out, dq)
    work = _Work(query, leap, group_size, fold_div, dropout_p, scale, inputs)
    do_strides, q_strides, k_strides, v_strides, out_strides, grad_strides = (launch.strides(x) for x in inputs)
    dlse_strides = None if grad_lse is None else launch.strides(grad_lse[..., None])
    work.run(
        backward_query_kernel, "backward_query", grad_out, grad_lse, query, key, value, out, lse, delta, dq, seed,
        do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, grad_strides,
    )  # fmt: skip
    work.run(
        backward_key_kernel, "backward_key", grad_out, query, key, value, lse, delta, dk, dv, seed,
        do_strides, q_strides, k_strides, v_strides, grad_strides, grad_strides,
    )  # fmt: skip
    return dq, dk, dv


class _Work:
    """What the three kernels share: the groups, the settings and the tile shape."""

    def __init__(
        self, query: Tensor, leap: int, group_size: int, fold_div: int, dropout_p: float, scale: float,
        tensors: tuple[Tensor, ...],
    ) -> None:  # fmt: skip
        B, H, T, N, D = query.shape
        leap = min(leap, T)
        group_size = min(group_size, -(-T // leap))  # the members of the largest group
        spans, rest = divmod(T, leap * group_size)
        groups = spans * leap + min(leap, rest)
        self.like = query
        self.rows, self.heads_and_groups = group_size * N, B * H * groups
        self.values = (H, T, N, leap, group_size, groups, scale, *flash.split_dropout(dropout_p))
        self.settings = {
            "SHAPE": flash.shape(D, launch.alignment(*tensors)),
            "FOLD": D // fold_div if fold_div > 0 else 0,
            "DROPOUT": dropout_p > 0,
            "PRECISION": launch.precision(),
        }

    def run(self, kernel: Any, phase: str, *args: Any, **settings: Any) -> None:
        """Launch `kernel`, with a program for every tile of every group."""
        tiles = configs.tiles(phase, self.like, self.settings["DROPOUT"])
        block = tiles["BLOCK_K" if phase == "backward_key" else "BLOCK_Q"]
        programs = triton.cdiv(self.rows, block) * self.heads_and_groups
        launch.launch(kernel, programs, self.like, *args, *self.values, **self.settings, **settings, **tiles)
