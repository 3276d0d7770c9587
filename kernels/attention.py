"""Attention over an itinerary: the only loops over the flash core.

An operator is an :class:`Itinerary <vattn.kernels.itinerary.Itinerary>` of hooks; the four kernels here do the rest:
forward, the gradients of queries and of keys, and the tangent. They take it as a compile-time value: every hook is
inlined, and an operator's kernels are as if they had been written out::

    kernel     program                      own rows        reads           step of the walk
    forward    of queries                   q               k, v            forward_step: out, lse
    backward   of queries                   q, dout, out    k, v            query_step: dq, delta
               of keys                      k, v            q, dout         key_step: dk, dv
    jvp        of queries                   q, dq           k, v, dk, dv    tangent_step: dout, dlse
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import flash, launch
from vattn.kernels.itinerary import NUMBERS, Itinerary
from vattn.kernels.launch import head


@triton.jit
def own_rows(first, last, group, OP: tl.constexpr, BLOCK: tl.constexpr):
    """The rows that a program owns."""
    if OP.mine is not None:
        return OP.mine(first, last, group, BLOCK)
    else:
        return OP.locate(first, OP.lanes(group, BLOCK), last, group, 0, False)


@triton.jit
def dropout_of(seed, bh, number, mask, threshold):
    """The part of the dropout hash of the queries owned (queries, 1), or ()."""
    if len(seed) > 0:
        add, times = flash.dropout_query(seed, bh, number, mask)
        return add[:, None], times[:, None], threshold
    else:
        return ()


@triton.jit
def pair_of(where, row, mask, group, OP: tl.constexpr, OF_KEYS: tl.constexpr):
    """What the own rows tell of the pairs they are in, or ()."""
    if OP.pair is not None:
        return OP.pair(where, row, mask, group, OF_KEYS)
    else:
        return ()


@triton.jit
def own_queries(where, bh, first, last, group, seed, threshold, OP: tl.constexpr, BLOCK: tl.constexpr):
    """The queries that a program owns: rows, which exist, numbers, and what dropout and pairs need of them."""
    row, mask = own_rows(first, last, group, OP, BLOCK), first + tl.arange(0, BLOCK) < last
    number = OP.number(row, group)
    dropout = dropout_of(seed, bh, number, mask, threshold)
    return row, mask, number, dropout, pair_of(where, row, mask, group, OP, False)


@triton.jit
def load_out(ptr, strides, bh, H, row, mask, group, OP: tl.constexpr, SHAPE: tl.constexpr):
    """Rows of the output, or of its gradient."""
    ptr = head(ptr, strides, bh, H)
    if OP.load is not None:
        return OP.load(ptr, row, mask, strides, group, SHAPE, OP)
    else:
        return flash.load_rows(ptr, OP.offsets(row, strides, SHAPE), mask, SHAPE)


@triton.jit
def store_out(ptr, strides, bh, H, row, mask, rows, group, OP: tl.constexpr, SHAPE: tl.constexpr):
    """Rows of the output, or of its tangent."""
    ptr = head(ptr, strides, bh, H)
    if OP.store is not None:
        OP.store(ptr, row, mask, rows, strides, group, SHAPE, OP)
    else:
        flash.store_rows(ptr, OP.offsets(row, strides, SHAPE), mask, rows, SHAPE)


@triton.jit
def load_two(pair, row, mask, OP: tl.constexpr, SHAPE: tl.constexpr):
    """Rows of two tensors, ``(rows, D)`` each: keys and values, or their tangents."""
    k_ptr, v_ptr, k_strides, v_strides = pair
    k = flash.load_rows(k_ptr, OP.offsets(row, k_strides, SHAPE), mask, SHAPE)
    return k, flash.load_rows(v_ptr, OP.offsets(row, v_strides, SHAPE), mask, SHAPE)


@triton.jit
def heads_of(k_ptrs, v_ptrs, k_strides, v_strides, bh, H):
    """What :func:`load_two` reads, for each segment: where a batch and head begin, and strides."""
    segments = ()
    for i in tl.static_range(len(k_ptrs)):
        k_ptr, v_ptr = head(k_ptrs[i], k_strides[i], bh, H), head(v_ptrs[i], v_strides[i], bh, H)
        segments = segments + ((k_ptr, v_ptr, k_strides[i], v_strides[i]),)
    return segments


@triton.jit
def walk(
    state, own, others, program, OP: tl.constexpr, STEP: tl.constexpr, OF_KEYS: tl.constexpr, SHAPE: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state after `STEP` has seen all tiles that a program ``(where, group, pair)`` reads: the only loops.

    Tiles without a mask come first. Of others there is one at most, unless the itinerary says otherwise.
    """
    group = program[1]
    lanes = OP.lanes(group, BLOCK)
    for i in tl.static_range(len(others)):
        first, whole, last = OP.span(group, BLOCK, i)
        if OF_KEYS and SHAPE.head_dim > 96:
            # Two accumulators of so many columns leave no registers for a second copy of the step.
            for start in range(first, last, BLOCK):
                state = visit(
                    state, own, others[i], program, start, lanes, last, OP, STEP, OF_KEYS, SHAPE, PRECISION, SIGN,
                    BLOCK, i, False,
                )  # fmt: skip
        else:
            for start in range(first, whole, BLOCK):
                state = visit(
                    state, own, others[i], program, start, lanes, last, OP, STEP, OF_KEYS, SHAPE, PRECISION, SIGN,
                    BLOCK, i, True,
                )  # fmt: skip
            if OP.exists is None:
                if whole < last:
                    state = visit(
                        state, own, others[i], program, whole, lanes, last, OP, STEP, OF_KEYS, SHAPE, PRECISION, SIGN,
                        BLOCK, i, False,
                    )  # fmt: skip
            else:
                # Staged, ptxas would serialise the wgmma of this loop and of the other (C7515), with most itineraries.
                for start in tl.range(whole, last, BLOCK, num_stages=1):
                    state = visit(
                        state, own, others[i], program, start, lanes, last, OP, STEP, OF_KEYS, SHAPE, PRECISION, SIGN,
                        BLOCK, i, False,
                    )  # fmt: skip
    return state


@triton.jit
def visit(
    state, own, other, program, start, lanes, last, OP: tl.constexpr, STEP: tl.constexpr, OF_KEYS: tl.constexpr,
    SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr, I: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The state after the tile of rows at the places from `start` on.

    The step is told which of them exist (None: all), the bias (own, others) and its place in the table, and which pairs
    are allowed. They are arguments and no tuple, because Triton takes no tuple that holds None.
    """
    where, group, pair = program
    row = OP.locate(start, lanes, last, group, I, WHOLE)
    mask, bias, place = None, None, None
    if not WHOLE:
        if OP.exists is None:
            mask = start + tl.arange(0, BLOCK) < last
        else:
            mask = OP.exists(row)
    allowed = None
    if not OF_KEYS:
        allowed = mask
    if OP.bias is not None:
        bias, place = OP.bias(where, pair, row, mask, group, OF_KEYS, WHOLE)
    if OP.allowed is not None:
        allowed = OP.allowed(where, pair, row, mask, group, OF_KEYS)
    return STEP(
        state, own, other, row, mask, bias, place, allowed, program, OP, SHAPE, PRECISION, SIGN, WHOLE
    )  # fmt: skip


@triton.jit
def forward_step(
    state, own, kv, row, mask, bias, place, allowed, program,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    where, group, _ = program
    q, scale, own_row, dropout, seed = own
    k, v = load_two(kv, row, mask, OP, SHAPE)
    s = flash.key_scores(q, k, scale, bias, allowed, PRECISION, SIGN)
    factor = flash.scale_left(scale, bias)
    if OP.tap is not None:
        OP.tap(where, s * factor, own_row, row, mask, group)
    number = flash.key_number(seed, OP.number(row, group), mask)
    return flash.forward_scores(state, s, factor, v, number, dropout, PRECISION)


@launch.kernel
def forward_kernel(
    q_ptr, k_ptrs, v_ptrs, out_ptr, lse_ptr, seed, pointers, n0, n1, n2, n3, n4, n5, n6, n7,
    q_strides, k_strides, v_strides, out_strides, split_stride, lse_rows, H, heads, scale, threshold, keep_scale,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_Q queries: their out and lse, of its split."""
    where = (pointers, (n0, n1, n2, n3, n4, n5, n6, n7))
    bh, split, group, first, last = OP.own(where, H, heads, BLOCK_Q, BLOCK_K)
    if first >= last:
        return
    row, mask, number, dropout, pair = own_queries(where, bh, first, last, group, seed, threshold, OP, BLOCK_Q)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), OP.offsets(row, q_strides, SHAPE), mask, SHAPE)

    kv = heads_of(k_ptrs, v_ptrs, k_strides, v_strides, bh, H)
    state = walk(
        flash.forward_start(BLOCK_Q, SHAPE), (q, scale, row, dropout, seed), kv, (where, group, pair), OP,
        forward_step, False, SHAPE, PRECISION, SIGN, BLOCK_K,
    )  # fmt: skip

    if OP.bias is not None:
        scale = 1.0
    out, lse = flash.forward_finish(state, scale, keep_scale)
    tl.store(lse_ptr + (split * heads + bh).to(tl.int64) * lse_rows + number, lse, mask=mask)
    out_ptr += split * split_stride.to(tl.int64)
    store_out(out_ptr, out_strides, bh, H, row, mask, out, group, OP, SHAPE)


@triton.jit
def query_step(
    grads, own, kv, row, mask, bias, place, allowed, program,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    where, group, pair = program
    dq, more = grads
    query, scale, own_mask, dropout, seed, keep_scale = own
    k, v = load_two(kv, row, mask, OP, SHAPE)
    keys = (k, v, flash.key_number(seed, OP.number(row, group), mask))
    ds = flash.backward_keys(query, scale, keys, bias, allowed, dropout, keep_scale, PRECISION)
    if OP.grad_step is not None:
        more = OP.grad_step(where, more, ds, place, pair, row, mask, own_mask, group, WHOLE)
    return flash.accumulate(dq, ds, k, PRECISION), more


@launch.kernel
def backward_query_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptrs, v_ptrs, out_ptr, lse_ptr, delta_ptr, dq_ptr, seed,
    pointers, n0, n1, n2, n3, n4, n5, n6, n7,
    do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, split_stride, lse_rows,
    H, heads, scale, threshold, keep_scale,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_Q queries: their dq, of its split, and delta, which the first split writes.

        delta = <dout, out> - dlse,   dq = scale * sum_k ds k

    A shift moves out and dout the same way, so that delta is the same sum over the moved channels.
    """
    where = (pointers, (n0, n1, n2, n3, n4, n5, n6, n7))
    bh, split, group, first, last = OP.own(where, H, heads, BLOCK_Q, BLOCK_K)
    if first >= last:
        return
    row, mask, number, dropout, pair = own_queries(where, bh, first, last, group, seed, threshold, OP, BLOCK_Q)

    do = load_out(do_ptr, do_strides, bh, H, row, mask, group, OP, SHAPE)
    delta = flash.row_dot(do, load_out(out_ptr, out_strides, bh, H, row, mask, group, OP, SHAPE))
    if dlse_ptr is not None:
        dlse_ptrs = head(dlse_ptr, dlse_strides, bh, H) + OP.offsets(row, dlse_strides, SHAPE)
        delta -= tl.load(dlse_ptrs, mask=mask, other=0.0)
    offs_row = bh.to(tl.int64) * lse_rows + number
    if split == 0:
        tl.store(delta_ptr + offs_row, delta, mask=mask)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), OP.offsets(row, q_strides, SHAPE), mask, SHAPE)
    query = (q, do, flash.load_lse(lse_ptr + offs_row, mask), delta)

    more = ()
    if OP.grad_start is not None:
        more = OP.grad_start(BLOCK_Q)
    kv = heads_of(k_ptrs, v_ptrs, k_strides, v_strides, bh, H)
    dq, more = walk(
        (flash.zero_rows(BLOCK_Q, SHAPE), more), (query, scale, mask, dropout, seed, keep_scale), kv,
        (where, group, pair), OP, query_step, False, SHAPE, PRECISION, 1, BLOCK_K,
    )  # fmt: skip

    if OP.grad_finish is not None:
        OP.grad_finish(where, more, row, mask, pair, group)
    dq_ptr = head(dq_ptr + split * split_stride.to(tl.int64), dq_strides, bh, H)
    flash.store_rows(dq_ptr, OP.offsets(row, dq_strides, SHAPE), mask, flash.scale_rows(dq, scale), SHAPE)


@triton.jit
def key_step(
    grads, own, other, row, mask, bias, place, allowed, program,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    where, group, pair = program
    grads, more = grads
    keys, scale, own_mask, seed, bh, H, threshold, keep_scale = own
    q_ptr, do_ptr, q_strides, do_strides, lse_ptr, delta_ptr = other
    number = OP.number(row, group)
    q = flash.load_rows(q_ptr, OP.offsets(row, q_strides, SHAPE), mask, SHAPE)
    do = load_out(do_ptr, do_strides, bh, H, row, mask, group, OP, SHAPE)
    lse = flash.load_lse(lse_ptr + number, mask)
    delta = flash.load_numbers(delta_ptr + number, mask, 0.0)
    dropout = ()
    if len(seed) > 0:
        add, times = flash.dropout_query(seed, bh, number, mask)
        dropout = (add[None, :], times[None, :], threshold)
    if OP.reads is not None:
        if OP.allowed is None:
            allowed = own_mask
        else:
            allowed = allowed & own_mask[:, None]
    query = (q, do, lse, delta)
    grads, ds = flash.backward_queries(grads, keys, scale, query, bias, allowed, dropout, keep_scale, PRECISION)
    if OP.grad_step is not None:
        more = OP.grad_step(where, more, ds, place, pair, row, mask, own_mask, group, WHOLE)
    return grads, more


@launch.kernel
def backward_key_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, seed,
    pointers, n0, n1, n2, n3, n4, n5, n6, n7,
    do_strides, q_strides, k_strides, v_strides, grad_strides, split_stride, lse_rows,
    H, heads, scale, threshold, keep_scale,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_K keys: their dk and dv, of its split.

        dv = sum_q p^T dout,   dk = scale * sum_q ds^T q

    Tiles are (keys, queries). Places without a query have lse = +inf, hence p = ds = 0.
    """
    where = (pointers, (n0, n1, n2, n3, n4, n5, n6, n7))
    bh, split, group, first, last = OP.own(where, H, heads, BLOCK_K, BLOCK_Q)
    if first >= last:
        return
    row, mask = own_rows(first, last, group, OP, BLOCK_K), first + tl.arange(0, BLOCK_K) < last
    read = mask
    if OP.reads is not None:
        read = OP.reads(row, group)
    pair = pair_of(where, row, mask, group, OP, True)
    kv = (head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides)
    k, v = load_two(kv, row, read, OP, SHAPE)
    number = flash.key_number(seed, OP.number(row, group), mask)
    own = ((k, v, number), scale, read, seed, bh, H, threshold, keep_scale)

    before = bh.to(tl.int64) * lse_rows
    others = ((head(q_ptr, q_strides, bh, H), do_ptr, q_strides, do_strides, lse_ptr + before, delta_ptr + before),)
    more = ()
    if OP.grad_start is not None:
        more = OP.grad_start(BLOCK_K)
    grads = flash.zero_rows(BLOCK_K, SHAPE), flash.zero_rows(BLOCK_K, SHAPE)
    grads, more = walk(
        (grads, more), own, others, (where, group, pair), OP, key_step, True, SHAPE, PRECISION, 1, BLOCK_Q
    )

    if OP.grad_finish is not None:
        OP.grad_finish(where, more, row, mask, pair, group)
    dk, dv = flash.scale_rows(grads[0], scale), flash.scale_rows(grads[1], keep_scale)
    if OP.times is not None:
        times = OP.times(where, row, mask, group)[:, None]
        dk, dv = flash.scale_rows(dk, times), flash.scale_rows(dv, times)
    if OP.grad_offsets is not None:
        offs = OP.grad_offsets(row, grad_strides, SHAPE)
    else:
        offs = OP.offsets(row, grad_strides, SHAPE)
    if OP.reads is not None:
        dk, dv = flash.rows_or_zero(read, dk), flash.rows_or_zero(read, dv)
    offs_split = split * split_stride.to(tl.int64)
    flash.store_rows(head(dk_ptr + offs_split, grad_strides, bh, H), offs, mask, dk, SHAPE)
    flash.store_rows(head(dv_ptr + offs_split, grad_strides, bh, H), offs, mask, dv, SHAPE)


@triton.jit
def tangent_step(
    sums, own, other, row, mask, bias, place, allowed, program,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    where, group, pair = program
    query, scale, dropout, seed = own
    kv, tangents = other
    k, v = load_two(kv, row, mask, OP, SHAPE)
    tangents = load_two(tangents, row, mask, OP, SHAPE)
    dbias = None
    if OP.bias_tangent is not None:
        dbias = OP.bias_tangent(where, pair, place)
    keys = (k, v, flash.key_number(seed, OP.number(row, group), mask))
    return flash.tangent_keys(sums, query, scale, keys, tangents, bias, dbias, allowed, dropout, PRECISION)


@launch.kernel
def jvp_kernel(
    q_ptr, k_ptrs, v_ptrs, dq_ptr, dk_ptrs, dv_ptrs, out_ptr, lse_ptr, dout_ptr, dlse_ptr, seed,
    pointers, n0, n1, n2, n3, n4, n5, n6, n7,
    q_strides, k_strides, v_strides, dq_strides, dk_strides, dv_strides, out_strides, dout_strides,
    split_stride, lse_rows, H, heads, scale, threshold, keep_scale,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_Q queries: the tangents of their out and lse, of its split; those of splits add up.

    ds = scale * (dq k^T + q dk^T),   dlse = sum_k p ds,   dout = sum_k p dv + (p ds) v - dlse * out
    """
    where = (pointers, (n0, n1, n2, n3, n4, n5, n6, n7))
    bh, split, group, first, last = OP.own(where, H, heads, BLOCK_Q, BLOCK_K)
    if first >= last:
        return
    row, mask, number, dropout, pair = own_queries(where, bh, first, last, group, seed, threshold, OP, BLOCK_Q)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), OP.offsets(row, q_strides, SHAPE), mask, SHAPE)
    dq = flash.load_rows(head(dq_ptr, dq_strides, bh, H), OP.offsets(row, dq_strides, SHAPE), mask, SHAPE)
    lse = flash.load_lse(lse_ptr + bh.to(tl.int64) * lse_rows + number, mask)

    kv = heads_of(k_ptrs, v_ptrs, k_strides, v_strides, bh, H)
    tangents = heads_of(dk_ptrs, dv_ptrs, dk_strides, dv_strides, bh, H)
    others = ()
    for i in tl.static_range(len(kv)):
        others = others + ((kv[i], tangents[i]),)
    acc, dlse = walk(
        (flash.zero_rows(BLOCK_Q, SHAPE), tl.zeros((BLOCK_Q,), tl.float32)), ((q, dq, lse), scale, dropout, seed),
        others, (where, group, pair), OP, tangent_step, False, SHAPE, PRECISION, 1, BLOCK_K,
    )  # fmt: skip

    tl.store(dlse_ptr + (split * heads + bh).to(tl.int64) * lse_rows + number, dlse, mask=mask)
    out = load_out(out_ptr, out_strides, bh, H, row, mask, group, OP, SHAPE)
    dout = flash.add_rows(flash.scale_rows(acc, keep_scale), out, -dlse[:, None])
    dout_ptr += split * split_stride.to(tl.int64)
    store_out(dout_ptr, dout_strides, bh, H, row, mask, dout, group, OP, SHAPE)


class Part(NamedTuple):
    """One launch of a pass."""

    op: Itinerary
    tiles: dict[str, int]
    programs: int  # of all batches and heads
    numbers: tuple[int, ...]  # of `where`
    pointers: tuple[Any, ...] = ()  # likewise


class Call:
    """The tensors of one call, as the kernels read them, and its settings.

    Results have a leading axis of the splits among which what a program reads is shared out.
    """

    def __init__(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], dropout_p: float, seed: Tensor | None,
        scale: float,
    ) -> None:  # fmt: skip
        self.query = launch.with_rows(query)
        self.keys, self.values = _with_rows(keys), _with_rows(values)
        self.seed = _seed(seed if dropout_p > 0 else None, query)
        self.threshold, self.keep_scale = flash.split_dropout(dropout_p)
        self.scale = scale
        self.heads = query.shape[0] * query.shape[1]

    @property
    def extras(self) -> int:
        """What :func:`configs.tiles` counts beside rows."""
        return int(len(self.seed) > 0)

    def forward(self, part: Part, outs: Tensor, lses: Tensor) -> None:
        """Write the output and lse."""
        sign, scale = flash.split_scale(self.scale)
        reads = self.query, self.keys, self.values
        steps = *map(strides, reads), launch.strides(outs[0]), outs.stride(0)
        self._launch(
            forward_kernel, part, (*reads, outs), lses, scale, (*reads, outs, lses, self.seed), steps, SIGN=sign
        )

    def backward_query(
        self, part: Part, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, delta: Tensor,
        dqs: Tensor,
    ) -> None:  # fmt: skip
        """Write the gradient of the queries, and delta."""
        grad_out, out, lse = launch.with_rows(grad_out), launch.with_rows(out), lse.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()  # 32 bits then reach all its rows
        reads = self.query, self.keys, self.values
        dlse_strides = None if grad_lse is None else launch.strides(grad_lse[..., None])
        steps = (
            launch.strides(grad_out), dlse_strides, *map(strides, reads), launch.strides(out), launch.strides(dqs[0]),
            dqs.stride(0),
        )  # fmt: skip
        tensors = grad_out, grad_lse, *reads, out, lse, delta, dqs, self.seed
        rows = grad_out, *reads, out, dqs
        self._launch(backward_query_kernel, part, rows, lse[None], self.scale, tensors, steps)

    def backward_key(
        self, part: Part, grad_out: Tensor, lse: Tensor, delta: Tensor, dks: Tensor, dvs: Tensor, segment: int = 0
    ) -> None:  # fmt: skip
        """Write the gradients of the keys and values of a segment, which have the same layout."""
        lse = lse.contiguous()
        grad_out, key, value = launch.with_rows(grad_out), self.keys[segment], self.values[segment]
        reads = grad_out, self.query, key, value
        steps = *map(strides, reads), launch.strides(dks[0]), dks.stride(0)
        tensors = *reads, lse, delta, dks, dvs, self.seed
        self._launch(backward_key_kernel, part, (*reads, dks, dvs), lse[None], self.scale, tensors, steps)

    def jvp(
        self, part: Part, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], out: Tensor, lse: Tensor,
        douts: Tensor, dlses: Tensor,
    ) -> None:  # fmt: skip
        """Write the tangents of the output and lse, from those of `query`, `keys` and `values`."""
        for name, given, primals in (("key", keys, self.keys), ("value", values, self.values)):
            if len(given) != len(primals):
                raise ValueError(f"jvp: there must be {len(primals)} tangents of {name}s, got {len(given)}")
        _check_tangents((query, *keys, *values), (self.query, *self.keys, *self.values), self.query, out, lse)
        lse = lse[:, :, : dlses.shape[3]].contiguous()  # the rows of a split, which may be the first ones alone
        query, keys, values, out = launch.with_rows(query), _with_rows(keys), _with_rows(values), launch.with_rows(out)
        reads = self.query, self.keys, self.values, query, keys, values, out
        steps = *map(strides, reads), launch.strides(douts[0]), douts.stride(0)
        tensors = *reads, lse, douts, dlses, self.seed
        self._launch(jvp_kernel, part, (*reads, douts), dlses, self.scale, tensors, steps)

    def _launch(
        self, kernel: Any, part: Part, rows: tuple[Any, ...], lses: Tensor, scale: float, tensors: tuple[Any, ...],
        steps: tuple[Any, ...], **settings: Any,
    ) -> None:  # fmt: skip
        """`rows` are those of `tensors` that have rows, tuples of them, and results with all their splits."""
        if part.programs == 0:
            return
        flat = [x for some in rows for x in ((some,) if isinstance(some, Tensor) else some)]
        numbers = (*part.numbers, *[0] * (NUMBERS - len(part.numbers)))
        H, lse_rows = self.query.shape[1], math.prod(lses.shape[3:])
        launch.launch(
            kernel, part.programs, self.query, *tensors, part.pointers, *numbers, *steps, lse_rows, H, self.heads,
            scale, self.threshold, self.keep_scale, OP=part.op, SHAPE=launch.shape(*flat), PRECISION=launch.precision(),
            **settings, **part.tiles,
        )  # fmt: skip


def _seed(seed: Tensor | None, query: Tensor) -> tuple[Any, ...]:
    """What kernels take for dropout, see :func:`flash.dropout_query`."""
    if seed is None:
        return ()
    if seed.numel() == 1:
        return (seed,)
    heads = query.shape[0] * query.shape[1]
    return seed.contiguous(), *launch.pack((1, 1 + heads, 1 + heads + math.prod(query.shape[2:-1])))


def _check_tangents(
    tangents: Sequence[Tensor], primals: Sequence[Tensor], query: Tensor, out: Tensor, lse: Tensor
) -> None:  # fmt: skip
    """Raise unless each of `tangents` is like its primal, and `out` and `lse` are those of `query`."""
    for tangent, primal in zip((*tangents, out), (*primals, query), strict=True):
        if tangent.dtype != primal.dtype:
            raise TypeError(f"jvp: tangents and out must have the dtype {primal.dtype}, got {tangent.dtype}")
        if tangent.shape != primal.shape:
            raise ValueError(
                f"jvp: a tangent must have the shape of its input, {tuple(primal.shape)}, got {tuple(tangent.shape)}"
            )
    if lse.shape != query.shape[:-1] or lse.dtype != torch.float32:
        raise ValueError(f"jvp: lse must be float32 {tuple(query.shape[:-1])}, got {lse.dtype} {tuple(lse.shape)}")


def _with_rows(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(launch.with_rows(x) for x in tensors)


def strides(x: Tensor | Sequence[Tensor]) -> tuple[Any, ...]:
    """Those of a tensor, or of each of several."""
    return launch.strides(x) if isinstance(x, Tensor) else tuple(launch.strides(y) for y in x)


def empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """The output, laid out as :func:`empty_rows`, and lse in float32; or their tangents."""
    return empty_rows(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
