"""Latent attention on the GPU: the itinerary of queries over keys that lie in several tensors.

The tensors are segments of one long row of keys, which are read where they are::

    number    0            256                                    8448
    segment   |-- latents --|----------------- context -------------|
    tile      |----|----|---|----|----|----|----|----|----|----|----|
    split     |          0          |         1         |     2     |

Few queries and very many keys would keep few programs busy. So the keys are shared out among as many splits as
fill the device: each leaves a partial result in float32, and attention over the union of the splits is exactly
what merging gives. The gradient of the queries is the sum of partial sums over the same splits, and that of few
keys, which very many queries read, the sum over splits of the queries: without atomics, and alike every time.
Very many queries over few keys need no split forward. Where all keys of a head fill one tile, as MeBT's latents do, a
program loads them once, and they stay on chip while it walks over query tiles, whose softmax is a plain one::

    walk      |       0       |       1       | ..       out of one tile of queries = softmax(q k^T) v
    tile      |---|---|---|---|---|---|---|---| ..       k, v stay from tile to tile

Keys may also be listed, as those are that node-sparse attention keeps: then they are gathered, and the gradient of one
that is listed twice is twice that of a copy, since its copies are alike, dropout included.

A segment's length is an argument, and how many there are a constant of the kernel. MeBT: Yoo et al., "Towards
End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional Transformers" (CVPR 2023).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import configs, flash, launch, merge_attention
from vattn.kernels.launch import head, unpack


@triton.jit
def own_rows(rows, heads, BLOCK: tl.constexpr):
    """What this program owns: batch * H + head, the split, and its tile's first row."""
    tiles = tl.cdiv(rows, BLOCK)
    pid = tl.program_id(0)
    component = pid // tiles
    return component % heads, component // heads, pid % tiles * BLOCK


@triton.jit
def share(count, split, splits, BLOCK: tl.constexpr):
    """The rows, of `count`, that a split reads: from the first to before the last; whole tiles but for the end."""
    rows = tl.cdiv(tl.cdiv(count, splits), BLOCK) * BLOCK
    first = tl.minimum(split * rows, count)
    return first, tl.minimum(first + rows, count)


@triton.jit
def keys_of_sample(count, lengths_ptr, sample):
    """How many of `count` keys a sample reads."""
    if lengths_ptr is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths_ptr + sample), 0), count).to(tl.int32)
    return count


@triton.jit
def keys_of_split(counts, lengths_ptr, sample, split, splits, BLOCK: tl.constexpr):
    """The keys that a split reads, as numbers from the first to before the last."""
    count = unpack(counts, 0)
    for i in tl.static_range(1, len(counts)):
        count += unpack(counts, i)
    return share(keys_of_sample(count, lengths_ptr, sample), split, splits, BLOCK)


@triton.jit
def tokens_of_segment(numbers, before, count, BLOCK: tl.constexpr):
    """The tokens of a segment with the key `numbers`: the first, the end of whole tiles, and the end."""
    first = tl.minimum(tl.maximum(numbers[0] - before, 0), count)
    last = tl.minimum(tl.maximum(numbers[1] - before, 0), count)
    return first, last - (last - first) % BLOCK, last


@triton.jit
def key_head(k_ptr, v_ptr, k_strides, v_strides, bh, H):
    """Where the keys and values of a segment begin for a batch and head, and the steps from token to token."""
    k_step, v_step = unpack(k_strides, 2).to(tl.int64), unpack(v_strides, 2).to(tl.int64)
    return head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_step, v_step


@triton.jit
def list_of_sample(list_ptr, counts, sample):
    """Where the list of a sample begins, of as many keys as its only segment has; None where keys are not listed."""
    if list_ptr is not None:
        list_ptr += sample.to(tl.int64) * unpack(counts, 0)
    return list_ptr


@triton.jit
def load_keys(kv, kept_ptr, first, mask, lane, before, SHAPE: tl.constexpr):
    """Keys and values of the tokens from `first` on, (keys, D) each, and their numbers (keys,).

    With `kept_ptr`, of the tokens that are listed from there on, which are their own numbers.
    """
    k_ptr, v_ptr, k_step, v_step = kv
    if kept_ptr is not None:
        number = tl.load(kept_ptr + first + lane, mask=mask)
        offs_k, offs_v = number * k_step, number * v_step
    else:
        number = before + first + lane
        k_ptr, v_ptr = k_ptr + first * k_step, v_ptr + first * v_step
        offs_k, offs_v = lane * k_step, lane * v_step
    return flash.load_rows(k_ptr, offs_k, mask, SHAPE), flash.load_rows(v_ptr, offs_v, mask, SHAPE), number


@triton.jit
def load_all_keys(k_ptrs, v_ptrs, k_strides, v_strides, kept_ptr, counts, last, lane, bh, H, SHAPE: tl.constexpr):
    """The keys of all segments in one tile, with 0 from the key `last` on; and their values and numbers."""
    kept_ptr = list_of_sample(kept_ptr, counts, bh // H)
    count = unpack(counts, 0)
    kv = key_head(k_ptrs[0], v_ptrs[0], k_strides[0], v_strides[0], bh, H)
    k, v, number = load_keys(kv, kept_ptr, 0, lane < tl.minimum(count, last), lane, 0, SHAPE)
    before = count
    for i in tl.static_range(1, len(counts)):
        count = unpack(counts, i)
        kv = key_head(k_ptrs[i], v_ptrs[i], k_strides[i], v_strides[i], bh, H)
        mask = (lane >= before) & (lane < tl.minimum(before + count, last))
        others = load_keys(kv, kept_ptr, -before, mask, lane, before, SHAPE)
        k, v = flash.join_rows(k, others[0]), flash.join_rows(v, others[1])
        before += count
    return k, v, number


@triton.jit
def offsets(row, strides):
    """Offsets of rows within their batch and head."""
    return row.to(tl.int64) * unpack(strides, 2)


@launch.kernel
def forward_kernel(
    q_ptr, k_ptrs, v_ptrs, kept_ptr, out_ptr, lse_ptr, lengths_ptr, seed_ptr,
    q_strides, k_strides, v_strides, out_strides, split_stride, counts, splits,
    H, heads, Lq, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: split x batch and head x query tile. A program owns BLOCK_Q queries: their out and lse of its split."""
    bh, split, first_q = own_rows(Lq, heads, BLOCK_Q)
    row = first_q + tl.arange(0, BLOCK_Q)
    mask_q = row < Lq
    dropout = None
    if DROPOUT:
        add, times = flash.dropout_query(seed_ptr, bh, row)
        dropout = (add[:, None], times[:, None], threshold)

    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(row, q_strides), mask_q, SHAPE)
    state = flash.forward_start(BLOCK_Q, SHAPE)
    lane = tl.arange(0, BLOCK_K)
    kept_ptr = list_of_sample(kept_ptr, counts, bh // H)
    numbers = keys_of_split(counts, lengths_ptr, bh // H, split, splits, BLOCK_K)
    before = 0
    for i in tl.static_range(len(counts)):
        kv = key_head(k_ptrs[i], v_ptrs[i], k_strides[i], v_strides[i], bh, H)
        first, whole, last = tokens_of_segment(numbers, before, unpack(counts, i), BLOCK_K)
        for token in range(first, whole, BLOCK_K):
            keys = load_keys(kv, kept_ptr, token, None, lane, before, SHAPE)
            state = flash.forward_keys(state, q, scale, keys, None, dropout, PRECISION, SIGN)
        if whole < last:
            mask = whole + lane < last
            keys = load_keys(kv, kept_ptr, whole, mask, lane, before, SHAPE)
            state = flash.forward_keys(state, q, scale, keys, mask, dropout, PRECISION, SIGN)
        before += unpack(counts, i)

    out, lse = flash.forward_finish(state, scale, keep_scale)
    tl.store(lse_ptr + (split * heads + bh).to(tl.int64) * Lq + row, lse, mask=mask_q)
    out_ptr = head(out_ptr + split.to(tl.int64) * split_stride, out_strides, bh, H)
    flash.store_rows(out_ptr, offsets(row, out_strides), mask_q, out, SHAPE)


@launch.kernel
def decode_kernel(
    q_ptr, k_ptrs, v_ptrs, kept_ptr, out_ptr, lse_ptr, lengths_ptr, seed_ptr,
    q_strides, k_strides, v_strides, out_strides, counts, walk,
    H, heads, Lq, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x walk. A program owns `walk` tiles of BLOCK_Q queries: their out and lse.

    Its only key tile has all keys.
    """
    walks = tl.cdiv(tl.cdiv(Lq, BLOCK_Q), walk)
    bh, first_tile = tl.program_id(0) // walks, tl.program_id(0) % walks * walk
    lane = tl.arange(0, BLOCK_K)
    _, last = keys_of_split(counts, lengths_ptr, bh // H, 0, 1, BLOCK_K)
    k, v, number = load_all_keys(k_ptrs, v_ptrs, k_strides, v_strides, kept_ptr, counts, last, lane, bh, H, SHAPE)
    k_columns = flash.transpose_rows(k)
    q_ptr, out_ptr = head(q_ptr, q_strides, bh, H), head(out_ptr, out_strides, bh, H)
    lse_ptr += bh.to(tl.int64) * Lq
    for first in range(first_tile * BLOCK_Q, tl.minimum((first_tile + walk) * BLOCK_Q, Lq), BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        mask_q = row < Lq
        dropout = None
        if DROPOUT:
            add, times = flash.dropout_query(seed_ptr, bh, row)
            dropout = (add[:, None], times[:, None], threshold)
        q = flash.load_rows(q_ptr, offsets(row, q_strides), mask_q, SHAPE)
        s = tl.where((lane < last)[None, :], flash.products(q, k_columns, PRECISION, SIGN), float("-inf"))
        out, lse = flash.forward_tile(s, scale, v, number, dropout, keep_scale, SHAPE, PRECISION)
        tl.store(lse_ptr + row, lse, mask=mask_q)
        flash.store_rows(out_ptr, offsets(row, out_strides), mask_q, out, SHAPE)


@launch.kernel
def backward_query_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptrs, v_ptrs, kept_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, lengths_ptr, seed_ptr,
    do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, split_stride, counts, splits,
    H, heads, Lq, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: split x batch and head x query tile. A program owns BLOCK_Q queries: their dq of its split, and delta.

        delta = <dout, out> - dlse,   dq = scale * sum_k ds k

    Every split needs delta, and the first one writes it.
    """
    bh, split, first_q = own_rows(Lq, heads, BLOCK_Q)
    row = first_q + tl.arange(0, BLOCK_Q)
    mask_q = row < Lq
    dropout = None
    if DROPOUT:
        add, times = flash.dropout_query(seed_ptr, bh, row)
        dropout = (add[:, None], times[:, None], threshold)

    do = flash.load_rows(head(do_ptr, do_strides, bh, H), offsets(row, do_strides), mask_q, SHAPE)
    out = flash.load_rows(head(out_ptr, out_strides, bh, H), offsets(row, out_strides), mask_q, SHAPE)
    delta = flash.row_dot(do, out)
    if dlse_ptr is not None:
        delta -= tl.load(head(dlse_ptr, dlse_strides, bh, H) + offsets(row, dlse_strides), mask=mask_q, other=0.0)
    offs_row = bh.to(tl.int64) * Lq + row
    if split == 0:
        tl.store(delta_ptr + offs_row, delta, mask=mask_q)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(row, q_strides), mask_q, SHAPE)
    query = (q, do, flash.load_lse(lse_ptr + offs_row, mask_q), delta)

    dq = flash.zero_rows(BLOCK_Q, SHAPE)
    lane = tl.arange(0, BLOCK_K)
    kept_ptr = list_of_sample(kept_ptr, counts, bh // H)
    numbers = keys_of_split(counts, lengths_ptr, bh // H, split, splits, BLOCK_K)
    before = 0
    for i in tl.static_range(len(counts)):
        kv = key_head(k_ptrs[i], v_ptrs[i], k_strides[i], v_strides[i], bh, H)
        first, whole, last = tokens_of_segment(numbers, before, unpack(counts, i), BLOCK_K)
        for token in range(first, whole, BLOCK_K):
            keys = load_keys(kv, kept_ptr, token, None, lane, before, SHAPE)
            dq = flash.backward_keys(dq, query, scale, keys, None, dropout, keep_scale, PRECISION)
        if whole < last:
            mask = whole + lane < last
            keys = load_keys(kv, kept_ptr, whole, mask, lane, before, SHAPE)
            dq = flash.backward_keys(dq, query, scale, keys, mask, dropout, keep_scale, PRECISION)
        before += unpack(counts, i)

    dq_ptr = head(dq_ptr + split.to(tl.int64) * split_stride, dq_strides, bh, H)
    flash.store_rows(dq_ptr, offsets(row, dq_strides), mask_q, flash.scale_rows(dq, scale), SHAPE)


@launch.kernel
def backward_key_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, kept_ptr, copies_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lengths_ptr, seed_ptr,
    do_strides, q_strides, k_strides, v_strides, grad_strides, split_stride, counts, before, splits,
    H, heads, Lq, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, SCATTER: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: split x batch and head x key tile of one segment. A program owns BLOCK_K keys: dk and dv of its split.

        dv = sum_q p^T dout,   dk = scale * sum_q ds^T q

    `before` keys lie in the segments before this one. Queries past the split's end have lse = +inf, hence
    p = ds = 0; keys that their sample does not read get a gradient of 0. Gradients of listed keys count their
    `copies_ptr`, and lie in the order of the list or, if SCATTER, where the keys lie.
    """
    Lk = unpack(counts, 0)
    bh, split, first_k = own_rows(Lk, heads, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    mask_k = first_k + lane < Lk
    first_q, last_q = share(Lq, split, splits, BLOCK_Q)
    mask_read = None
    mask_load = mask_k
    if lengths_ptr is not None:
        length = keys_of_sample(Lk, lengths_ptr, bh // H)
        mask_read = first_k + lane < length
        mask_load = mask_read
        last_q = tl.where(first_k < length, last_q, first_q)
    kv = key_head(k_ptr, v_ptr, k_strides, v_strides, bh, H)
    kept_ptr, copies_ptr = list_of_sample(kept_ptr, counts, bh // H), list_of_sample(copies_ptr, counts, bh // H)
    keys = load_keys(kv, kept_ptr, first_k, mask_load, lane, before, SHAPE)

    do_ptr, q_ptr = head(do_ptr, do_strides, bh, H), head(q_ptr, q_strides, bh, H)
    grads = flash.zero_rows(BLOCK_K, SHAPE), flash.zero_rows(BLOCK_K, SHAPE)
    for first in range(first_q, last_q, BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        mask_q = row < last_q
        q = flash.load_rows(q_ptr, offsets(row, q_strides), mask_q, SHAPE)
        do = flash.load_rows(do_ptr, offsets(row, do_strides), mask_q, SHAPE)
        offs_row = bh.to(tl.int64) * Lq + row
        lse = flash.load_lse(lse_ptr + offs_row, mask_q)
        delta = tl.load(delta_ptr + offs_row, mask=mask_q, other=0.0)
        dropout = None
        if DROPOUT:
            add, times = flash.dropout_query(seed_ptr, bh, row)
            dropout = (add[None, :], times[None, :], threshold)
        query = (q, do, lse, delta)
        grads = flash.backward_queries(grads, keys, scale, query, mask_read, dropout, keep_scale, PRECISION)

    dk, dv = flash.scale_rows(grads[0], scale), flash.scale_rows(grads[1], keep_scale)
    if copies_ptr is not None:
        copies = tl.load(copies_ptr + first_k + lane, mask=mask_k, other=0).to(tl.float32)[:, None]
        dk, dv = flash.scale_rows(dk, copies), flash.scale_rows(dv, copies)
    offs_split = split.to(tl.int64) * split_stride
    offs = offsets(keys[2] if SCATTER else first_k + lane, grad_strides)
    flash.store_rows(head(dk_ptr + offs_split, grad_strides, bh, H), offs, mask_k, dk, SHAPE)
    flash.store_rows(head(dv_ptr + offs_split, grad_strides, bh, H), offs, mask_k, dv, SHAPE)


def forward(
    query: Tensor, keys: list[Tensor], values: list[Tensor], key_lengths: Tensor | None,
    dropout_p: float, seed: Tensor | None, scale: float, kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Lq, D), in memory as (B, Lq, H, D), and the float32 lse (B, H, Lq).

    With `kept` (B, K) int64, over the keys it lists, of the one tensor that there is.
    """
    if query.numel() == 0:
        return empty_rows(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    sign, scale = flash.split_scale(scale)
    work = _Work(query, keys, values, kept, key_lengths, dropout_p, scale)
    Lq, Lk = query.shape[2], sum(work.counts)
    reads = work.query, work.keys, work.values, work.kept
    strides = launch.strides(work.query), work.key_strides, work.value_strides
    if work.decode is not None:
        out, lse = empty_rows(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        tiles = work.tiles("decode", Lq)
        walk = configs.walk(tiles * work.heads, query)
        work.run(
            decode_kernel, "decode", triton.cdiv(tiles, walk), (out,), *reads, out, lse, work.key_lengths, seed,
            *strides, launch.strides(out), launch.pack(work.counts), walk, SIGN=sign,
        )  # fmt: skip
        return out, lse
    splits = work.splits("forward", Lq, Lk)
    outs = launch.partial(query, splits)
    lses = query.new_empty((splits, *query.shape[:-1]), dtype=torch.float32)
    work.run(
        forward_kernel, "forward", work.tiles("forward", Lq) * splits, (outs,), *reads, outs, lses, work.key_lengths,
        seed, *strides, launch.strides(outs[0]), outs.stride(0), launch.pack(work.counts), splits, SIGN=sign,
    )  # fmt: skip
    return (outs[0], lses[0]) if splits == 1 else merge_attention.merge(list(outs), list(lses), query.dtype)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, keys: list[Tensor], values: list[Tensor], out: Tensor,
    lse: Tensor, key_lengths: Tensor | None, dropout_p: float, seed: Tensor | None, scale: float,
    kept: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of query, keys and values; memory beyond them is `delta`, as large as lse, and splits."""
    work = _Work(query, keys, values, kept, key_lengths, dropout_p, scale)
    grad_out, out, delta = launch.with_rows(grad_out), launch.with_rows(out), torch.empty_like(lse)
    do_strides, q_strides = launch.strides(grad_out), launch.strides(work.query)
    dlse_strides = None if grad_lse is None else launch.strides(grad_lse[..., None])
    Lq, Lk = query.shape[2], sum(work.counts)

    splits = work.splits("backward_query", Lq, Lk)
    dq = launch.partial(query, splits)
    work.run(
        backward_query_kernel, "backward_query", work.tiles("backward_query", Lq) * splits, (grad_out, out, dq),
        grad_out, grad_lse, work.query, work.keys, work.values, work.kept, out, lse, delta, dq, work.key_lengths, seed,
        do_strides, dlse_strides, q_strides, work.key_strides, work.value_strides, launch.strides(out),
        launch.strides(dq[0]), dq.stride(0), launch.pack(work.counts), splits,
    )  # fmt: skip

    grad_keys, grad_values, before = [], [], 0
    for i, (key, value) in enumerate(zip(work.keys, work.values, strict=True)):
        splits = work.splits("backward_key", work.counts[i], Lq)
        dk, dv = (_key_gradients(x, work.kept, splits) for x in (key, value))
        work.run(
            backward_key_kernel, "backward_key", work.tiles("backward_key", work.counts[i]) * splits, (grad_out, dk),
            grad_out, work.query, key, value, work.kept, work.copies(), lse, delta, dk, dv, work.key_lengths, seed,
            do_strides, q_strides, work.key_strides[i], work.value_strides[i], launch.strides(dk[0]), dk.stride(0),
            launch.pack(work.counts[i : i + 1]), before, splits, SCATTER=work.kept is not None and splits == 1,
        )  # fmt: skip
        grad_keys.append(_total(dk, key, work.kept))
        grad_values.append(_total(dv, value, work.kept))
        before += work.counts[i]
    return launch.total(dq, query), grad_keys, grad_values


def _key_gradients(key: Tensor, kept: Tensor | None, splits: int) -> Tensor:
    """Where to write (partial) gradients of `key`: of all keys, or those of splits of the `kept` ones, as listed."""
    if kept is None:
        return launch.partial(key, splits)
    if splits == 1:
        return empty_rows(key).zero_()[None]
    return launch.partial(key[:, :, :1].expand(-1, -1, kept.shape[1], -1), splits)


def _total(parts: Tensor, key: Tensor, kept: Tensor | None) -> Tensor:
    """The gradient of `key`, of what :func:`_key_gradients` made room for."""
    if kept is None or parts.shape[0] == 1:
        return launch.total(parts, key)
    grad = empty_rows(key).zero_()
    samples = torch.arange(kept.shape[0], device=kept.device)[:, None]
    # Copies of a key have the same gradient: whichever is written last, it is the same.
    grad.transpose(1, 2)[samples, kept] = parts.sum(0).transpose(1, 2).to(grad.dtype)
    return grad


class _Work:
    """What the kernels of one call share: tensors as they read them, the settings, and the tile shape."""

    def __init__(
        self, query: Tensor, keys: list[Tensor], values: list[Tensor], kept: Tensor | None, key_lengths: Tensor | None,
        dropout_p: float, scale: float,
    ) -> None:  # fmt: skip
        B, H, Lq, _ = query.shape
        self.query = launch.with_rows(query)
        self.keys, self.values = (tuple(launch.with_rows(x) for x in some) for some in (keys, values))
        self.key_strides, self.value_strides = (
            tuple(launch.strides(x) for x in some) for some in (self.keys, self.values)
        )
        self.key_lengths = None if key_lengths is None else key_lengths.contiguous()
        self.kept = None if kept is None else kept.contiguous()
        self.counts = [x.shape[2] for x in keys] if kept is None else [kept.shape[1]]
        self.heads = B * H
        self.arguments = (H, B * H, Lq, scale, *flash.split_dropout(dropout_p))
        self.dropout = dropout_p > 0
        self.decode = configs.decode_tiles(query, self.dropout, sum(self.counts))  # where one tile has all keys

    def copies(self) -> Tensor | None:
        """How often each listed key is listed, (B, K) int32: counted by adding integers, in any order."""
        if self.kept is None:
            return None
        counts = self.kept.new_zeros(self.kept.shape[0], self.keys[0].shape[2], dtype=torch.int32)
        samples = torch.arange(self.kept.shape[0], device=self.kept.device)[:, None]
        counts.index_put_((samples, self.kept), counts.new_ones(()), accumulate=True)
        return counts.gather(1, self.kept)

    def tiles(self, phase: str, rows: int) -> int:
        """Tiles of `rows` rows, each of which a program owns."""
        return triton.cdiv(rows, self._blocks(phase)[0])

    def splits(self, phase: str, rows: int, reads: int) -> int:
        """Among how many programs to share out the `reads` rows that each tile of `rows` reads."""
        other = self._blocks(phase)[1]
        return configs.splits(self.tiles(phase, rows) * self.heads, triton.cdiv(reads, other), self.query)

    def run(
        self, kernel: Any, phase: str, programs: int, tensors: tuple[Tensor, ...], *args: Any, **settings: Any
    ) -> None:
        """Launch `kernel`, which also uses the rows of `tensors`, with `programs` programs for each batch and head."""
        if programs * self.heads == 0:
            return
        alignment = launch.alignment(self.query, *self.keys, *self.values, *tensors)
        launch.launch(
            kernel, programs * self.heads, self.query, *args, *self.arguments, **settings,
            SHAPE=flash.shape(self.query.shape[-1], alignment), DROPOUT=self.dropout, PRECISION=launch.precision(),
            **self._tiles(phase),
        )  # fmt: skip

    def _tiles(self, phase: str) -> dict[str, int]:
        if phase == "decode" and self.decode is not None:
            return self.decode
        tiles = configs.tiles(phase, self.query, self.dropout)
        if phase == "forward" and len(self.keys) > 1:
            tiles["num_warps"] = 8  # one loop for each segment costs registers that four warps have not
        return tiles

    def _blocks(self, phase: str) -> tuple[int, int]:
        """Rows of a tile that a program owns, and of those that it reads."""
        return configs.own_and_other(phase, self._tiles(phase))
