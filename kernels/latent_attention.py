"""Latent attention on the GPU: the itinerary of queries over keys that lie in several tensors.

The tensors are segments of one long row of keys, which are read where they are::

    number    0            256                                    8448
    segment   |-- latents --|----------------- context -------------|
    tile      |----|----|---|----|----|----|----|----|----|----|----|
    split     |          0          |         1         |     2     |

Few queries and very many keys would keep few programs busy. So the keys are shared out among as many splits as
fill the device: each leaves a partial result in float32, and attention over the union of the splits is exactly
what merging gives. The gradient of the queries is the sum of partial sums over the same splits, as is their tangent,
and that of few keys, which very many queries read, the sum over splits of the queries: without atomics, and the same
every time. Very many queries over few keys need no split forward: see :func:`decode_kernel`.

A segment's length is an argument, and how many there are a constant of the kernel. MeBT: Yoo et al., "Towards
End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional Transformers" (CVPR 2023).
"""

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import attention, configs, flash, launch
from vattn.kernels.itinerary import Itinerary
from vattn.kernels.launch import head, unpack
from vattn.kernels.tokens import (
    SplitCall,
    keys_of_sample,
    lanes,
    locate_queries,
    number,
    offsets,
    own_plain,
    own_tile,
    share,
    span_queries,
    whole_tiles,
)


@triton.jit
def keys_before(counts, I: tl.constexpr):
    """How many keys lie in the segments before segment I."""
    before = unpack(counts, 0) * 0
    for i in tl.static_range(I):
        before += unpack(counts, i)
    return before


# A program that owns queries has the numbers (Lq, splits), and pointers to key lengths and the segments' packed counts.
# A row is its place in its tensor and its number.


@triton.jit
def own_queries(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A tile of queries, and a split of the keys: ``(counts, first key, last key)``."""
    lengths_ptr, counts = where[0]
    Lq, splits, _, _, _, _, _, _ = where[1]
    bh, split, first = own_tile(Lq, heads, BLOCK)
    count = keys_of_sample(keys_before(counts, len(counts)), lengths_ptr, bh // H)
    first_key, last_key = share(count, split, splits, OTHER)
    return bh, split, (counts, first_key, last_key), first, Lq


@triton.jit
def span_keys(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """The tokens of segment I with the split's numbers."""
    counts, first, last = group
    before, count = keys_before(counts, I), unpack(counts, I)
    first = tl.minimum(tl.maximum(first - before, 0), count)
    return whole_tiles(first, tl.minimum(tl.maximum(last - before, 0), count), BLOCK)


@triton.jit
def locate_keys(start, lane, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """Keys of segment I."""
    token = start + lane
    return token, keys_before(group[0], I) + token


QUERIES = Itinerary(own_queries, span_keys, lanes, locate_keys, offsets, number, mine=own_plain)


# A program that owns keys of one segment has the numbers (Lq, splits, its keys, keys before them), and key lengths.


@triton.jit
def own_keys(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A tile of keys, and a split of the queries: ``(first query, last query, keys before, keys that are read)``."""
    lengths_ptr = where[0][0]
    Lq, splits, Lk, before, _, _, _, _ = where[1]
    bh, split, first = own_tile(Lk, heads, BLOCK)
    first_query, last_query = share(Lq, split, splits, OTHER)
    length = keys_of_sample(Lk, lengths_ptr, bh // H)
    last_query = tl.where(first < length, last_query, first_query)
    return bh, split, (first_query, last_query, before, length), first, Lk


@triton.jit
def own_segment(first, last, group, BLOCK: tl.constexpr):
    """Keys of a segment."""
    token = first + tl.arange(0, BLOCK)
    return token, group[2] + token


@triton.jit
def reads(row, group):
    """Which keys their sample reads: the others have a gradient of 0."""
    return row[0] < group[3]


KEYS = Itinerary(own_keys, span_queries, lanes, locate_queries, offsets, number, mine=own_segment)
KEYS_OF_LENGTH = dataclasses.replace(KEYS, reads=reads)


@triton.jit
def load_keys(kv, row, mask, SHAPE: tl.constexpr):
    """Keys and values of rows, (keys, D) each."""
    k_ptr, v_ptr, k_strides, v_strides = kv
    k = flash.load_rows(k_ptr, offsets(row, k_strides, SHAPE), mask, SHAPE)
    return k, flash.load_rows(v_ptr, offsets(row, v_strides, SHAPE), mask, SHAPE)


@triton.jit
def load_all_keys(kv, group, lane, SHAPE: tl.constexpr):
    """The keys of all segments in one tile, with 0 from the last key on, and their values."""
    counts, _, last = group
    k, v = load_keys(kv[0], (lane, lane), lane < tl.minimum(unpack(counts, 0), last), SHAPE)
    for i in tl.static_range(1, len(kv)):
        before = keys_before(counts, i)
        mask = (lane >= before) & (lane < tl.minimum(before + unpack(counts, i), last))
        others = load_keys(kv[i], (lane - before, lane), mask, SHAPE)
        k, v = flash.join_rows(k, others[0]), flash.join_rows(v, others[1])
    return k, v


@launch.kernel
def decode_kernel(
    q_ptr, k_ptrs, v_ptrs, out_ptr, lse_ptr, seed, pointers, Lq, walk,
    q_strides, k_strides, v_strides, out_strides, H, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, FULL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x walk. A program owns `walk` tiles of BLOCK_Q queries: their out and lse.

    Its only key tile has all keys, which stay on chip, as MeBT's latents do, and the softmax is a plain one::

        walk      |       0       |       1       | ..       out of one tile of queries = softmax(q k^T) v
        tile      |---|---|---|---|---|---|---|---| ..       k, v stay from tile to tile

    FULL: the tile has no place without a key. A driver of its own, because it reads keys once for a whole walk.
    """
    walks = tl.cdiv(tl.cdiv(Lq, BLOCK_Q), walk)
    bh, first_tile = tl.program_id(0) // walks, tl.program_id(0) % walks * walk
    lane = tl.arange(0, BLOCK_K)
    lengths_ptr, counts = pointers
    last = keys_of_sample(keys_before(counts, len(counts)), lengths_ptr, bh // H)
    kv = attention.heads_of(k_ptrs, v_ptrs, k_strides, v_strides, bh, H)
    k, v = load_all_keys(kv, (counts, 0, last), lane, SHAPE)
    k_columns = flash.transpose_rows(k)
    q_ptr, out_ptr = head(q_ptr, q_strides, bh, H), head(out_ptr, out_strides, bh, H)
    lse_ptr += bh.to(tl.int64) * Lq
    for first in range(first_tile * BLOCK_Q, tl.minimum((first_tile + walk) * BLOCK_Q, Lq), BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        mask = row < Lq
        dropout = attention.dropout_of(seed, bh, row, mask, threshold)
        q = flash.load_rows(q_ptr, offsets((row,), q_strides, SHAPE), mask, SHAPE)
        s = flash.products(q, k_columns, PRECISION, SIGN)
        if not FULL:
            s = tl.where((lane < last)[None, :], s, float("-inf"))
        key_number = flash.key_number(seed, lane, lane < last)  # each time, or it would take registers all the while
        out, lse = flash.forward_tile(s, scale, v, key_number, dropout, keep_scale, SHAPE, PRECISION)
        tl.store(lse_ptr + row, lse, mask=mask)
        flash.store_rows(out_ptr, offsets((row,), out_strides, SHAPE), mask, out, SHAPE)


def forward(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], key_lengths: Tensor | None,
    dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Lq, D), in memory as (B, Lq, H, D), and the float32 lse (B, H, Lq)."""
    call = Call(query, keys, values, key_lengths, dropout_p, seed, scale)
    decode = configs.decode_tiles(query, dropout_p > 0, call.count)
    if decode is not None:
        return call.decode(decode)
    return call.forward_splits(call.queries("forward"))


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor],
    out: Tensor, lse: Tensor, key_lengths: Tensor | None, dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of query, keys and values; memory beyond them is `delta`, as large as lse, and splits."""
    call = Call(query, keys, values, key_lengths, dropout_p, seed, scale)
    delta = torch.empty_like(lse)
    part, splits = call.queries("backward_query")
    dqs = launch.partial(query, splits)
    call.backward_query(part, grad_out, grad_lse, out, lse, delta, dqs)
    grad_keys, grad_values = [], []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        part, splits = call.segment(i)
        dks, dvs = launch.partial(key, splits), launch.partial(value, splits)
        call.backward_key(part, grad_out, lse, delta, dks, dvs, i)
        grad_keys.append(launch.total(dks, key))
        grad_values.append(launch.total(dvs, value))
    return launch.total(dqs, query), grad_keys, grad_values


def jvp(
    query_tangent: Tensor, key_tangents: Sequence[Tensor], value_tangents: Sequence[Tensor], query: Tensor,
    keys: Sequence[Tensor], values: Sequence[Tensor], out: Tensor, lse: Tensor, key_lengths: Tensor | None,
    dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tangents of out and lse."""
    call = Call(query, keys, values, key_lengths, dropout_p, seed, scale)
    return call.jvp_splits(call.queries("jvp"), query_tangent, key_tangents, value_tangents, out, lse)


class Call(SplitCall):
    """A call with its segments and key lengths."""

    def __init__(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], key_lengths: Tensor | None,
        dropout_p: float, seed: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        super().__init__(query, keys, values, dropout_p, seed, scale)
        self.counts = [x.shape[2] for x in keys]
        self.count = sum(self.counts)
        self.lengths = None if key_lengths is None else key_lengths.contiguous()

    def queries(self, phase: str) -> tuple[attention.Part, int]:
        """A program for every tile of queries and every split of the keys, and how many splits there are."""
        Lq, tiles = self.query.shape[2], configs.tiles(phase, self.query, self.extras)
        if len(self.keys) > 1 and tiles["BLOCK_Q"] >= 128:
            # One loop for each segment costs registers that four warps have not. Of fewer rows, eight warps make Triton
            # 3.6 split float32 products in two layouts, and the second reads past its shared memory.
            tiles["num_warps"] = 8
        count = launch.cdiv(Lq, tiles["BLOCK_Q"])
        splits = self.splits(count, self.count, tiles["BLOCK_K"])
        pointers = self.lengths, launch.pack(self.counts)
        return attention.Part(QUERIES, tiles, count * splits * self.heads, (Lq, splits), pointers), splits

    def segment(self, i: int) -> tuple[attention.Part, int]:
        """A program for every tile of the keys of a segment and every split of the queries, and how many splits."""
        Lq, tiles = self.query.shape[2], configs.tiles("backward_key", self.query, self.extras)
        count = launch.cdiv(self.counts[i], tiles["BLOCK_K"])
        splits = self.splits(count, Lq, tiles["BLOCK_Q"])
        numbers = Lq, splits, self.counts[i], sum(self.counts[:i])
        op = KEYS if self.lengths is None else KEYS_OF_LENGTH
        return attention.Part(op, tiles, count * splits * self.heads, numbers, (self.lengths,)), splits

    def decode(self, tiles: dict[str, int]) -> tuple[Tensor, Tensor]:
        """The output and lse where all keys are one tile."""
        out, lse = attention.empty_results(self.query)
        count = launch.cdiv(self.query.shape[2], tiles["BLOCK_Q"])
        walk = configs.walk(count * self.heads, self.query)
        sign, scale = flash.split_scale(self.scale)
        rows = self.query, self.keys, self.values, out
        programs = launch.cdiv(count, walk) * self.heads
        if programs > 0:
            launch.launch(
                decode_kernel, programs, self.query, self.query, self.keys, self.values, out, lse, self.seed,
                (self.lengths, launch.pack(self.counts)), self.query.shape[2], walk, *map(attention.strides, rows),
                self.query.shape[1], scale, self.threshold, self.keep_scale,
                SHAPE=launch.shape(self.query, *self.keys, *self.values, out), PRECISION=launch.precision(), SIGN=sign,
                FULL=self.count == tiles["BLOCK_K"] and self.lengths is None, **tiles,
            )  # fmt: skip
        return out, lse
