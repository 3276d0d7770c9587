"""Token importance on the GPU: what each key receives, in two passes over the scores, which are never stored.

    importance[k] = mean over heads and queries of exp(s[q, k] - lse[q])

The first pass is a forward without values, for an lse that is not given; in the second a program owns keys and adds up
the columns::

                keys                          keys
    queries    ------->  lse       queries     | |
               ------->                        v v   importance

Both share out what they read among splits where few programs would own rows. SViTT: Li et al., "SViTT: Temporal
Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import attention, configs, flash, launch, position_bias
from vattn.kernels.itinerary import Itinerary
from vattn.kernels.launch import head
from vattn.kernels.tokens import (
    keys_of_sample,
    lanes,
    locate_queries,
    number,
    offsets,
    own_plain,
    share,
    whole_tiles,
)

# Numbers: rows owned, rows read, splits, G, from sample to sample of the codes, S of the table. Pointers: table, codes,
# key lengths. A row is its number, twice.


@triton.jit
def own(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A tile of rows, global or not, and a split: ``(bh, H, is global, first, whole, last)``."""
    rows, reads, splits, G, _, _, _, _ = where[1]
    global_tiles, tiles = tl.cdiv(G, BLOCK), tl.cdiv(G, BLOCK) + tl.cdiv(rows - G, BLOCK)
    component, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    is_global = tile < global_tiles
    first = tl.where(is_global, tile * BLOCK, G + (tile - global_tiles) * BLOCK)
    bh, split = component % heads, component // heads
    first_read, last_read = share(reads, split, splits, OTHER)
    first_read, whole, last_read = whole_tiles(first_read, last_read, OTHER)
    return bh, split, (bh, H, is_global, first_read, whole, last_read), first, tl.where(is_global, G, rows)


@triton.jit
def own_queries(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """Likewise where samples read some of their keys."""
    bh, split, group, first, last = own(where, H, heads, BLOCK, OTHER)
    count = keys_of_sample(where[1][1], where[0][2], bh // H)
    first_read, last_read = share(count, split, where[1][2], OTHER)
    first_read, whole, last_read = whole_tiles(first_read, last_read, OTHER)
    return bh, split, (bh, H, group[2], first_read, whole, last_read), first, last


@triton.jit
def span(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """The rows of the split."""
    return group[3], group[4], group[5]


@triton.jit
def own_part(where, row, mask, group, OF_KEYS: tl.constexpr):
    """What own rows tell of the pairs they are in: their part of a place in the table."""
    code = codes_of(where, row, mask, group)
    if OF_KEYS:
        return (position_bias.own_key(row[0], code, mask, group[2]),)
    else:
        return (position_bias.own_query(row[0], code, mask, group[2]),)


@triton.jit
def codes_of(where, row, mask, group):
    """The codes of tokens."""
    code_ptr = where[0][1] + (group[0] // group[1]).to(tl.int64) * where[1][4]
    return position_bias.load_codes(code_ptr, row[0], mask, where[1][3])


@triton.jit
def bias_of(where, pair, row, mask, group, OF_KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """The bias of pairs, and its place in the table of the head."""
    G, S = where[1][3], where[1][5]
    place = position_bias.place(pair[0], row[0], codes_of(where, row, mask, group), group[2], S, G, OF_KEYS)
    return position_bias.lookup(where[0][0] + group[0] % group[1] * (S + (2 + G) * G), place), place


PLAIN = Itinerary(own_queries, span, lanes, locate_queries, offsets, number, mine=own_plain)
BIASED = dataclasses.replace(PLAIN, pair=own_part, bias=bias_of)
KEYS = dataclasses.replace(PLAIN, own=own)
BIASED_KEYS = dataclasses.replace(BIASED, own=own)


@triton.jit
def lse_step(
    state, own, other, row, mask, bias, place, allowed, program,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    q, scale = own
    k_ptr, k_strides = other
    k = flash.load_rows(k_ptr, OP.offsets(row, k_strides, SHAPE), mask, SHAPE)
    s = flash.key_scores(q, k, scale, bias, allowed, PRECISION, SIGN)
    return flash.forward_scores(state, s, flash.scale_left(scale, bias), (), row[0], (), PRECISION)


@launch.kernel
def lse_kernel(
    q_ptr, k_ptr, lse_ptr, pointers, n0, n1, n2, n3, n4, n5, q_strides, k_strides, H, heads, scale,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: split x batch and head x query tile. A program owns BLOCK_Q queries: their lse of its split."""
    where = (pointers, (n0, n1, n2, n3, n4, n5, 0, 0))
    bh, split, group, first, last = OP.own(where, H, heads, BLOCK_Q, BLOCK_K)
    row, mask = OP.mine(first, last, group, BLOCK_Q), first + tl.arange(0, BLOCK_Q) < last
    pair = attention.pair_of(where, row, mask, group, OP, False)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), OP.offsets(row, q_strides, SHAPE), mask, SHAPE)
    state = attention.walk(
        flash.forward_start(BLOCK_Q, None), (q, scale), ((head(k_ptr, k_strides, bh, H), k_strides),),
        (where, group, pair), OP, lse_step, False, SHAPE, PRECISION, SIGN, BLOCK_K,
    )  # fmt: skip
    if OP.bias is not None:
        scale = 1.0
    _, lse = flash.forward_finish(state, scale, 1.0)
    tl.store(lse_ptr + (split * heads + bh).to(tl.int64) * n0 + row[0], lse, mask=mask)


@triton.jit
def sum_step(
    total, own, other, row, mask, bias, place, allowed, program,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    k, scale = own
    q_ptr, q_strides, lse_ptr = other
    q = flash.load_rows(q_ptr, OP.offsets(row, q_strides, SHAPE), mask, SHAPE)
    lse = flash.load_lse(lse_ptr + row[0], mask)
    s = flash.key_scores(k, q, scale, bias, None, PRECISION)  # (keys, queries)
    return total + tl.sum(flash.probabilities(s, flash.scale_left(scale, bias), lse[None, :], None), 1)


@launch.kernel
def sum_kernel(
    q_ptr, k_ptr, lse_ptr, sum_ptr, pointers, n0, n1, n2, n3, n4, n5, q_strides, k_strides, H, heads, scale,
    OP: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: split x batch and head x key tile. A program owns BLOCK_K keys: what its split of the queries gives them.

    Queries past the split's end have lse = +inf, and give nothing; keys that their sample does not read get 0.
    """
    where = (pointers, (n0, n1, n2, n3, n4, n5, 0, 0))
    bh, split, group, first, last = OP.own(where, H, heads, BLOCK_K, BLOCK_Q)
    row, mask = OP.mine(first, last, group, BLOCK_K), first + tl.arange(0, BLOCK_K) < last
    pair = attention.pair_of(where, row, mask, group, OP, True)
    k = flash.load_rows(head(k_ptr, k_strides, bh, H), OP.offsets(row, k_strides, SHAPE), mask, SHAPE)
    other = (head(q_ptr, q_strides, bh, H), q_strides, lse_ptr + bh.to(tl.int64) * n1)
    total = attention.walk(
        tl.zeros((BLOCK_K,), tl.float32), (k, scale), (other,), (where, group, pair), OP, sum_step, True, SHAPE,
        PRECISION, 1, BLOCK_Q,
    )  # fmt: skip
    is_read = row[0] < keys_of_sample(n0, pointers[2], bh // H)
    tl.store(sum_ptr + (split * heads + bh).to(tl.int64) * n0 + row[0], tl.where(is_read, total, 0.0), mask=mask)


def forward(
    query: Tensor, key: Tensor, bias_table: Tensor | None, window: Sequence[int], num_global: int,
    positions: Tensor | None, key_lengths: Tensor | None, lse: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """(B, Lk) float32; memory beyond it is lse, and as much for the keys."""
    work = _Work(query, key, bias_table, window, num_global, positions, key_lengths)
    (_, H, Lq, _), Lk = query.shape, key.shape[2]
    sign, positive = flash.split_scale(scale)
    ops = (PLAIN, KEYS) if bias_table is None else (BIASED, BIASED_KEYS)
    if lse is None:
        lse = work.run(lse_kernel, "BLOCK_Q", Lq, Lk, positive, OP=ops[0], SIGN=sign)
        lse = lse[0] if lse.shape[0] == 1 else lse.logsumexp(0)
    return work.run(sum_kernel, "BLOCK_K", Lk, Lq, scale, lse.contiguous(), OP=ops[1]).sum((0, 2)) / max(H * Lq, 1)


class _Work:
    """What both kernels read, and how they are launched."""

    def __init__(
        self, query: Tensor, key: Tensor, bias_table: Tensor | None, window: Sequence[int], num_global: int,
        positions: Tensor | None, key_lengths: Tensor | None,
    ) -> None:  # fmt: skip
        self.query, self.key = launch.with_rows(query), launch.with_rows(key)
        self.num_global = 0 if bias_table is None else num_global
        tokens = query.shape[2] - num_global
        table, codes, (code_step, _, S) = position_bias.arguments(bias_table, window, positions, tokens, query)
        self.numbers = self.num_global, code_step, S
        self.pointers = table, codes, None if key_lengths is None else key_lengths.contiguous()
        self.tiles = configs.tiles("forward", query, extras=int(table is not None))

    def run(self, kernel: Any, side: str, rows: int, reads: int, scale: float, *args: Any, **settings: Any) -> Tensor:
        """What `kernel` finds for `rows` rows that read `reads` others: (splits, B, H, rows).

        `side` is that of the tiles that the kernel owns: as large as the queries of a forward.
        """
        B, H, _, _ = self.query.shape
        tiles = self.tiles if side == "BLOCK_Q" else self._turned()
        own, G = tiles[side], self.num_global
        other = tiles["BLOCK_K" if side == "BLOCK_Q" else "BLOCK_Q"]
        programs = (launch.cdiv(G, own) + launch.cdiv(rows - G, own)) * B * H
        splits = configs.splits(programs, launch.cdiv(reads, other), self.query)
        results = self.query.new_empty((splits, B, H, rows), dtype=torch.float32)
        if programs > 0:
            launch.launch(
                kernel, programs * splits, self.query, self.query, self.key, *args, results, self.pointers, rows, reads,
                splits, *self.numbers, launch.strides(self.query), launch.strides(self.key), H, B * H, scale,
                SHAPE=launch.shape(self.query, self.key), PRECISION=launch.precision(), **tiles, **settings,
            )  # fmt: skip
        return results

    def _turned(self) -> dict[str, int]:
        """The tiles with keys and queries in each other's place."""
        return {**self.tiles, "BLOCK_Q": self.tiles["BLOCK_K"], "BLOCK_K": self.tiles["BLOCK_Q"]}
