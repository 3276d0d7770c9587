"""Edge-sparse attention on the GPU: the itinerary of a block of tokens over the blocks that a layout lists for it.

A query tile belongs to one block. What it reads is one long list: the global tokens, then the blocks of its row of
the layout. Key tiles are cut from the list, whatever blocks they touch, so that 56 tokens cost what 56 tokens cost::

    list      |g|----- block 7 -----|----- block 2 -----|-- 9 (short) --:     |
    place     0  1                  57                  113                   169
    tile      |-------|-------|-------|-------|-------|-------|-------|

A short last block may stand anywhere in a row: its places past the end are masked. The backward for keys is the same
walk over the transposed layout, which lists the query blocks that read a block of keys; nothing is added by atomics.

Global queries read everything, and global keys are read by everything: a second launch, in which a program owns
global rows, and shares out what they read, or who reads them, among splits that fill a device. Partial results are
merged, and partial gradients added, always in the same order.

The gradient of the bias table is added up by atomics, since a row of the table collects pairs from everywhere. They
add floats, in any order; or, if the result must be the same every time, whole multiples of a unit, which add up alike
in every order (see :func:`_unit`). Pairs with a global token share rows of the table: they are summed before.

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import configs, flash, launch, merge_attention, position_bias
from vattn.kernels.latent_attention import offsets, share
from vattn.kernels.launch import head


@triton.jit
def own_rows(heads, sizes, GLOBAL: tl.constexpr, BLOCK: tl.constexpr):
    """What this program owns: batch * H + head, a block (or global tokens, and a split), its rows and which exist."""
    G, N, block_size = sizes
    lane = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    if GLOBAL:
        tiles = tl.cdiv(G, BLOCK)
        component = pid // tiles
        row = pid % tiles * BLOCK + lane
        return component % heads, component // heads, row, row < G
    else:
        tiles, blocks = tl.cdiv(tl.minimum(block_size, N), BLOCK), tl.cdiv(N, block_size)
        component = pid // tiles
        block = component % blocks
        within = pid % tiles * BLOCK + lane
        token = block * block_size + within
        return component // blocks, block, G + token, (within < block_size) & (token < N)


@triton.jit
def places(starts_ptr, columns_ptr, layout_step, h, part, splits, sizes, GLOBAL: tl.constexpr, BLOCK: tl.constexpr):
    """The list that a program reads: its first place, that after its last one, and where its blocks are listed."""
    G, N, block_size = sizes
    if GLOBAL:
        first, last = share(G + N, part, splits, BLOCK)
        return first, last, columns_ptr
    else:
        start_ptr = starts_ptr + h * layout_step + part
        start = tl.load(start_ptr)
        return 0, G + (tl.load(start_ptr + 1) - start) * block_size, columns_ptr + start


@triton.jit
def lanes_of(block_size, BLOCK: tl.constexpr):
    """The lanes of a tile, and their blocks and tokens if the tile began with a block."""
    lane = tl.arange(0, BLOCK)
    return lane, lane // block_size, lane % block_size


@triton.jit
def listed_rows(first, last, columns_ptr, lanes, sizes, GLOBAL: tl.constexpr):
    """The rows at the places from `first` on, and which of them exist.

    A tile costs one scalar division. The global tokens stand at the end of as many blocks as hold them.
    """
    lane, blocks, tokens = lanes
    place = first + lane
    if GLOBAL:
        return place, place < last
    else:
        G, N, block_size = sizes
        before = tl.cdiv(G, block_size)
        begin = first + before * block_size - G
        slot = begin // block_size
        within = begin - slot * block_size + tokens
        wraps = (within >= block_size).to(tl.int32)
        within -= wraps * block_size
        listed = (place >= G) & (place < last)
        column = tl.load(columns_ptr + slot + blocks + wraps - before, mask=listed, other=0)
        token = column * block_size + within
        return tl.where(place < G, place, G + token), (place < G) | (listed & (token < N))


@triton.jit
def codes_of(code_ptr, row, mask, G):
    """What tells where the tokens of `row` are: their codes, or their order if they have none."""
    if code_ptr is not None:
        return position_bias.load_codes(code_ptr, row, mask, G)
    else:
        return row - G


@triton.jit
def of_queries(
    row, mask, table_ptr, code_ptr, R, S, code_step, bh, H, G, GLOBAL: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """What a program's queries tell :func:`key_tile`: where table and codes begin, and their own part in pairs."""
    table_ptr, code_ptr = position_bias.of_head(table_ptr, code_ptr, R, code_step, bh, H)
    own, code = None, codes_of(code_ptr, row, mask, G)
    if table_ptr is not None or CAUSAL:
        own = position_bias.own_query(row, code, mask, GLOBAL)
    return table_ptr, code_ptr, S, own, code


@triton.jit
def key_tile(row, mask, kv, queries, G, SHAPE: tl.constexpr, GLOBAL: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys ``(k, v, number)``, which pairs exist, (keys,) or (queries, keys), their bias, and its rows of the table."""
    k_ptr, v_ptr, k_strides, v_strides = kv
    k = flash.load_rows(k_ptr, offsets(row, k_strides), mask, SHAPE)
    v = flash.load_rows(v_ptr, offsets(row, v_strides), mask, SHAPE)
    table_ptr, code_ptr, S, own, code_q = queries
    bias, index = None, None
    if own is not None:
        code = codes_of(code_ptr, row, mask, G)
        if table_ptr is not None:
            times, plus = position_bias.other_keys(row, code, GLOBAL, S, G)
            bias, index = position_bias.lookup(table_ptr, own, times, plus)
        if CAUSAL and not GLOBAL:
            code = tl.where(row < G, position_bias.FIRST, code)
            mask = mask[None, :] & (code[None, :] <= code_q[:, None])
    return (k, v, row), mask, bias, index


@triton.jit
def dropout_of(seed_ptr, bh, row, threshold, DROPOUT: tl.constexpr):
    """What dropout knows of queries (queries, 1), or None."""
    if DROPOUT:
        add, times = flash.dropout_query(seed_ptr, bh, row)
        return add[:, None], times[:, None], threshold
    else:
        return None


@launch.kernel
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scores_ptr, table_ptr, code_ptr, starts_ptr, columns_ptr, seed_ptr,
    q_strides, k_strides, v_strides, out_strides, split_stride, lse_rows,
    splits, layout_step, code_step, R, S, H, heads, G, N, block_size, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, GLOBAL: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x block x query tile; of global queries, split x batch and head x query tile.

    A program owns BLOCK_Q queries: their out and lse, of its split. Global query 0 also leaves its scaled and biased
    scores (N,), which become importance.
    """
    sizes = (G, N, block_size)
    bh, part, row, mask_q = own_rows(heads, sizes, GLOBAL, BLOCK_Q)
    split = part if GLOBAL else 0
    dropout = dropout_of(seed_ptr, bh, row, threshold, DROPOUT)
    queries = of_queries(row, mask_q, table_ptr, code_ptr, R, S, code_step, bh, H, G, GLOBAL, CAUSAL)

    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(row, q_strides), mask_q, SHAPE)
    kv = (head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides)
    state = flash.forward_start(BLOCK_Q, SHAPE)
    lanes = lanes_of(block_size, BLOCK_K)
    first, last, listed = places(starts_ptr, columns_ptr, layout_step, bh % H, part, splits, sizes, GLOBAL, BLOCK_K)
    for place in range(first, last, BLOCK_K):
        row_k, mask_k = listed_rows(place, last, listed, lanes, sizes, GLOBAL)
        keys, mask, bias, _ = key_tile(row_k, mask_k, kv, queries, G, SHAPE, GLOBAL, CAUSAL)
        s = flash.key_scores(q, keys[0], scale, bias, mask, PRECISION, SIGN)
        factor = flash.scale_left(scale, bias)
        if scores_ptr is not None:
            scores_ptrs = scores_ptr + bh.to(tl.int64) * N + (row_k - G)[None, :] + row[:, None]
            tl.store(scores_ptrs, s * factor, mask=(row == 0)[:, None] & (mask_k & (row_k >= G))[None, :])
        state = flash.forward_scores(state, s, factor, keys[1], row_k, dropout, PRECISION)

    if table_ptr is not None:
        scale = 1.0
    out, lse = flash.forward_finish(state, scale, keep_scale)
    tl.store(lse_ptr + (split * heads + bh).to(tl.int64) * lse_rows + row, lse, mask=mask_q)
    out_ptr = head(out_ptr + split * split_stride.to(tl.int64), out_strides, bh, H)
    flash.store_rows(out_ptr, offsets(row, out_strides), mask_q, out, SHAPE)


@triton.jit
def add_to_table(dtable_ptr, unit_ptr, index, ds, mask):
    """Add `ds` to the rows `index` of a head's table where `mask` is on: as floats, or as so many units."""
    if unit_ptr is not None:
        ds = (ds * tl.load(unit_ptr)).to(tl.int64)
    tl.atomic_add(dtable_ptr + index, ds, mask=mask, sem="relaxed")


@launch.kernel
def backward_query_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, dtable_ptr, unit_ptr,
    table_ptr, code_ptr, starts_ptr, columns_ptr, seed_ptr,
    do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, split_stride,
    splits, layout_step, code_step, R, S, H, heads, G, N, block_size, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, GLOBAL: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: as forward. A program owns BLOCK_Q queries: their dq, of its split, and delta; it adds to the table's.

        delta = <dout, out> - dlse,   dq = scale * sum_k ds k,   dtable[index] += ds

    Every split needs delta, and the first one writes it.
    """
    sizes = (G, N, block_size)
    bh, part, row, mask_q = own_rows(heads, sizes, GLOBAL, BLOCK_Q)
    split = part if GLOBAL else 0
    dropout = dropout_of(seed_ptr, bh, row, threshold, DROPOUT)
    queries = of_queries(row, mask_q, table_ptr, code_ptr, R, S, code_step, bh, H, G, GLOBAL, CAUSAL)

    do = flash.load_rows(head(do_ptr, do_strides, bh, H), offsets(row, do_strides), mask_q, SHAPE)
    out = flash.load_rows(head(out_ptr, out_strides, bh, H), offsets(row, out_strides), mask_q, SHAPE)
    delta = flash.row_dot(do, out)
    if dlse_ptr is not None:
        delta -= tl.load(head(dlse_ptr, dlse_strides, bh, H) + offsets(row, dlse_strides), mask=mask_q, other=0.0)
    offs_row = bh.to(tl.int64) * (G + N) + row
    if split == 0:
        tl.store(delta_ptr + offs_row, delta, mask=mask_q)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(row, q_strides), mask_q, SHAPE)
    query = (q, do, flash.load_lse(lse_ptr + offs_row, mask_q), delta)

    kv = (head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides)
    dq = flash.zero_rows(BLOCK_Q, SHAPE)
    ds_local = tl.zeros((BLOCK_Q,), tl.float32)
    if table_ptr is not None:
        dtable_ptr += bh % H * R
    lanes = lanes_of(block_size, BLOCK_K)
    first, last, listed = places(starts_ptr, columns_ptr, layout_step, bh % H, part, splits, sizes, GLOBAL, BLOCK_K)
    for place in range(first, last, BLOCK_K):
        row_k, mask_k = listed_rows(place, last, listed, lanes, sizes, GLOBAL)
        keys, mask, bias, index = key_tile(row_k, mask_k, kv, queries, G, SHAPE, GLOBAL, CAUSAL)
        ds = flash.key_gradients(query, scale, keys, mask, dropout, keep_scale, PRECISION, bias)
        dq = flash.accumulate(dq, ds, keys[0], PRECISION)
        if table_ptr is not None:
            to_local = (row_k >= G)[None, :]
            if GLOBAL:
                ds_local += tl.sum(tl.where(to_local, ds, 0.0), 1)
                if place < G:
                    add_to_table(dtable_ptr, unit_ptr, index, ds, mask_q[:, None] & (row_k < G)[None, :])
            else:
                # Of a pair that is not there ds is 0, and its index in the table.
                add_to_table(dtable_ptr, unit_ptr, index, ds, (ds != 0) & to_local)
                if place < G:
                    ds_global = tl.sum(tl.where(to_local, 0.0, ds), 0)
                    add_to_table(dtable_ptr, unit_ptr, S + G + row_k, ds_global, row_k < G)
    if table_ptr is not None and GLOBAL:
        add_to_table(dtable_ptr, unit_ptr, S + row, ds_local, mask_q)

    dq_ptr = head(dq_ptr + split * split_stride.to(tl.int64), dq_strides, bh, H)
    flash.store_rows(dq_ptr, offsets(row, dq_strides), mask_q, flash.scale_rows(dq, scale), SHAPE)


@launch.kernel
def backward_key_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    table_ptr, code_ptr, starts_ptr, rows_ptr, seed_ptr,
    do_strides, q_strides, k_strides, v_strides, grad_strides, split_stride,
    splits, layout_step, code_step, R, S, H, heads, G, N, block_size, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, GLOBAL: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x block x key tile; of global keys, split x batch and head x key tile.

    A program owns BLOCK_K keys: their dk and dv, of its split. It walks the transposed layout.

        dv = sum_q p^T dout,   dk = scale * sum_q ds^T q

    Tiles are (keys, queries). Places without a query have lse = +inf, hence p = ds = 0.
    """
    sizes = (G, N, block_size)
    bh, part, row, mask_k = own_rows(heads, sizes, GLOBAL, BLOCK_K)
    split = part if GLOBAL else 0
    table_ptr, code_ptr = position_bias.of_head(table_ptr, code_ptr, R, code_step, bh, H)
    own, code_k = None, codes_of(code_ptr, row, mask_k, G)
    if table_ptr is not None or CAUSAL:
        own = position_bias.own_key(row, code_k, mask_k, GLOBAL)
    k = flash.load_rows(head(k_ptr, k_strides, bh, H), offsets(row, k_strides), mask_k, SHAPE)
    v = flash.load_rows(head(v_ptr, v_strides, bh, H), offsets(row, v_strides), mask_k, SHAPE)

    do_ptr, q_ptr = head(do_ptr, do_strides, bh, H), head(q_ptr, q_strides, bh, H)
    grads = flash.zero_rows(BLOCK_K, SHAPE), flash.zero_rows(BLOCK_K, SHAPE)
    lanes = lanes_of(block_size, BLOCK_Q)
    first, last, listed = places(starts_ptr, rows_ptr, layout_step, bh % H, part, splits, sizes, GLOBAL, BLOCK_Q)
    for place in range(first, last, BLOCK_Q):
        row_q, mask_q = listed_rows(place, last, listed, lanes, sizes, GLOBAL)
        q = flash.load_rows(q_ptr, offsets(row_q, q_strides), mask_q, SHAPE)
        do = flash.load_rows(do_ptr, offsets(row_q, do_strides), mask_q, SHAPE)
        offs_row = bh.to(tl.int64) * (G + N) + row_q
        query = (q, do, flash.load_lse(lse_ptr + offs_row, mask_q), tl.load(delta_ptr + offs_row, mask=mask_q, other=0))
        bias, mask, dropout = None, None, None
        if own is not None:
            code_q = codes_of(code_ptr, row_q, mask_q, G)
            if table_ptr is not None:
                times, plus = position_bias.other_queries(row_q, code_q, GLOBAL, S, G)
                bias, _ = position_bias.lookup(table_ptr, own, times, plus)
            if CAUSAL and not GLOBAL:
                code_q = tl.where(row_q < G, position_bias.LAST, code_q)
                mask = code_k[:, None] <= code_q[None, :]
        if DROPOUT:
            add, times = flash.dropout_query(seed_ptr, bh, row_q)
            dropout = (add[None, :], times[None, :], threshold)
        grads = flash.backward_queries(grads, (k, v, row), scale, query, mask, dropout, keep_scale, PRECISION, bias)

    dk, dv = grads
    offs_split, offs = split * split_stride.to(tl.int64), offsets(row, grad_strides)
    dk_ptr, dv_ptr = head(dk_ptr + offs_split, grad_strides, bh, H), head(dv_ptr + offs_split, grad_strides, bh, H)
    flash.store_rows(dk_ptr, offs, mask_k, flash.scale_rows(dk, scale), SHAPE)
    flash.store_rows(dv_ptr, offs, mask_k, flash.scale_rows(dv, keep_scale), SHAPE)


def forward(
    query: Tensor, key: Tensor, value: Tensor, row_offsets: Tensor, columns: Tensor, column_offsets: Tensor | None,
    rows: Tensor | None, block_size: int, num_global: int, bias_table: Tensor | None, window: Sequence[int],
    positions: Tensor | None, causal: bool, dropout_p: float, seed: Tensor | None, scale: float, importance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out (B, H, G+N, D), in memory as (B, G+N, H, D), the float32 lse (B, H, G+N), and importance (B, N) or (0,)."""
    sign, scale = flash.split_scale(scale)
    query, key, value = inputs = [launch.with_rows(x) for x in (query, key, value)]
    work = _Work(inputs, row_offsets, block_size, num_global, bias_table, window, positions, causal, dropout_p, scale)
    out, lse = empty_rows(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    scores = lse.new_empty(lse[:, :, num_global:].shape) if importance else None
    strides = [launch.strides(x) for x in inputs]
    for part in work.parts("forward"):
        outs = part.results(out)
        lses = lse if part.splits == 1 else outs.new_empty(outs.shape[:-1])
        work.run(
            forward_kernel, part, (outs,), query, key, value, outs, lses, scores if part.is_global else None,
            *work.bias, row_offsets, columns, seed, *strides, launch.strides(outs[0]), outs.stride(0), lses.shape[-1],
            SIGN=sign,
        )  # fmt: skip
        if part.splits > 1:
            merged = merge_attention.merge(list(outs), list(lses), query.dtype)
            out[:, :, :num_global], lse[:, :, :num_global] = merged
    if scores is None:
        return out, lse, lse.new_empty(0)
    return out, lse, scores.sub_(lse[:, :, :1]).exp_().mean(1)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    row_offsets: Tensor, columns: Tensor, column_offsets: Tensor, rows: Tensor, block_size: int, num_global: int,
    bias_table: Tensor | None, window: Sequence[int], positions: Tensor | None, causal: bool, dropout_p: float,
    seed: Tensor | None, scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key, value and the table, the last (0,) without one."""
    grad_out, query, key, value, out = inputs = [launch.with_rows(x) for x in (grad_out, query, key, value, out)]
    work = _Work(inputs, row_offsets, block_size, num_global, bias_table, window, positions, causal, dropout_p, scale)
    dq, dk, dv, delta = empty_rows(query), empty_rows(query), empty_rows(query), torch.empty_like(lse)
    do_strides, q_strides, k_strides, v_strides, out_strides = (launch.strides(x) for x in inputs)
    dlse_strides = None if grad_lse is None else launch.strides(grad_lse[..., None])
    unit = worth = dtable = None
    if bias_table is not None:
        unit, worth = _unit(grad_out, grad_lse, value, dropout_p) if deterministic else (None, None)
        dtable = torch.zeros_like(work.bias[0], dtype=torch.float32 if unit is None else torch.int64)

    for part in work.parts("backward_query"):
        dqs = part.results(dq)
        work.run(
            backward_query_kernel, part, (dqs,), grad_out, grad_lse, query, key, value, out, lse, delta, dqs, dtable,
            unit, *work.bias, row_offsets, columns, seed, do_strides, dlse_strides, q_strides, k_strides, v_strides,
            out_strides, launch.strides(dqs[0]), dqs.stride(0),
        )  # fmt: skip
        part.add_up(dqs, dq)
    for part in work.parts("backward_key"):
        dks, dvs = part.results(dk), part.results(dv)
        work.run(
            backward_key_kernel, part, (dks,), grad_out, query, key, value, lse, delta, dks, dvs,
            *work.bias, column_offsets, rows, seed, do_strides, q_strides, k_strides, v_strides,
            launch.strides(dks[0]), dks.stride(0),
        )  # fmt: skip
        part.add_up(dks, dk)
        part.add_up(dvs, dv)
    if dtable is None:
        return dq, dk, dv, lse.new_empty(0)
    grad_table = dtable if worth is None else dtable.float() * worth
    return dq, dk, dv, grad_table.t().contiguous()


def _unit(
    grad_out: Tensor, grad_lse: Tensor | None, value: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How many units make 1, a power of two, so that the sum of all |ds|, counted in units, fits 62 bits.

    For each query, sum_k |ds| <= 2 max_k |dout v_k^T| / (1 - dropout_p) + |dlse|; twice that covers what is rounded in
    p and out. With B * (G+N) = 2**16 queries a unit is at most 2**-43 of this bound for one query, where float32 would
    keep 2**-24 of the sum. Also what a unit is worth: NaN, like the gradient, if the bound is not finite.
    """
    B, _, queries, _ = grad_out.shape
    largest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax().double() for x in (grad_out, value)]
    bound = 2 * flash.split_dropout(dropout_p)[1] * largest[0] * largest[1]
    if grad_lse is not None:
        bound = bound + grad_lse.abs().amax()
    exponent = 62 - torch.frexp(2 * B * queries * bound).exponent
    unit = torch.ldexp(torch.ones_like(bound), exponent.clamp(-126, 126)).float()
    return unit, torch.where(bound.isfinite(), 1 / unit, torch.nan)


class _Part(NamedTuple):
    """One launch of a pass: the blocks, or the global tokens, shared out among splits."""

    phase: str
    is_global: bool
    splits: int
    num_global: int

    def results(self, x: Tensor) -> Tensor:
        """Where to write results: to `x` (1, B, H, G+N, D), or partial ones of its global rows (splits, B, H, G, D)."""
        return x[None] if self.splits == 1 else launch.partial(x[:, :, : self.num_global], self.splits)

    def add_up(self, partial: Tensor, x: Tensor) -> None:
        """The global rows of `x` are the sum of `partial`."""
        if self.splits > 1:
            x[:, :, : self.num_global] = partial.sum(0)


class _Work:
    """What the launches of one call share: tensors as they read them, the settings, and the tile shape."""

    def __init__(
        self, inputs: list[Tensor], row_offsets: Tensor, block_size: int, num_global: int, bias_table: Tensor | None,
        window: Sequence[int], positions: Tensor | None, causal: bool, dropout_p: float, scale: float,
    ) -> None:  # fmt: skip
        B, H, length, _ = inputs[0].shape
        self.inputs, self.block_size, self.num_global = inputs, block_size, num_global
        self.tokens, self.heads, self.causal, self.dropout = length - num_global, B * H, causal, dropout_p > 0
        order = None if bias_table is None and not causal else positions  # all that positions are asked for
        table, codes, bias_values = position_bias.arguments(bias_table, window, order, self.tokens, inputs[0])
        self.bias = (table, codes)
        self.values = (
            0 if row_offsets.shape[0] == 1 else row_offsets.stride(0), *bias_values,
            H, B * H, num_global, self.tokens, block_size, scale, *flash.split_dropout(dropout_p),
        )  # fmt: skip

    def parts(self, phase: str) -> list[_Part]:
        """The launches that a pass wants."""
        parts = []
        if self.tokens > 0:
            parts.append(_Part(phase, False, 1, self.num_global))
        if self.num_global > 0:
            own, other = self._blocks(phase, is_global=True)
            reads = triton.cdiv(self.num_global + self.tokens, other)
            splits = configs.splits(triton.cdiv(self.num_global, own) * self.heads, reads, self.inputs[0])
            parts.append(_Part(phase, True, splits, self.num_global))
        return parts

    def run(self, kernel: Any, part: _Part, tensors: tuple[Tensor, ...], *args: Any, **settings: Any) -> None:
        """Launch `kernel`, which also uses the rows of `tensors`, with a program for every tile of `part`."""
        own, _ = self._blocks(part.phase, part.is_global)
        if part.is_global:
            programs = triton.cdiv(self.num_global, own) * part.splits
        else:
            programs = triton.cdiv(min(self.block_size, self.tokens), own) * triton.cdiv(self.tokens, self.block_size)
        if programs * self.heads == 0:
            return
        shape = flash.shape(self.inputs[0].shape[-1], launch.alignment(*self.inputs, *tensors))
        launch.launch(
            kernel, programs * self.heads, self.inputs[0], *args, part.splits, *self.values, **settings,
            SHAPE=shape, GLOBAL=part.is_global, CAUSAL=self.causal, DROPOUT=self.dropout,
            PRECISION=launch.precision(), **self._tiles(part.phase, part.is_global),
        )  # fmt: skip

    def _tiles(self, phase: str, is_global: bool) -> dict[str, int]:
        extras = (self.bias[0] is not None) + self.dropout
        return configs.group_tiles(phase, self.inputs[0], extras, self.num_global if is_global else self.block_size)

    def _blocks(self, phase: str, is_global: bool) -> tuple[int, int]:
        """Rows of a tile that a program owns, and of those that it reads."""
        return configs.own_and_other(phase, self._tiles(phase, is_global))
