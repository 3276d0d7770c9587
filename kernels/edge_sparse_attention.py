"""Edge-sparse attention on the GPU: the itinerary of a block of tokens over the blocks that a layout lists for it.

A query tile belongs to one block. What it reads is one long list: the blocks of its row of the layout, then the global
tokens. Key tiles are cut from the list, whatever blocks they touch, so that 56 tokens cost what 56 tokens cost::

    list      |----- block 7 -----|----- block 2 -----|-- 9 (short) --:     |g|
    place     0                   56                  112                   168
    tile      |-------|-------|-------|-------|-------|-------|-------|-------|

Tiles before the global tokens need no mask, unless the last block of the grid is short: it may stand anywhere in a
row, and its places past the end are masked. The backward for keys is the same walk over the transposed layout, which
lists the query blocks that read a block of keys; nothing is added by atomics.

With an order, a block has slots, each of which names a token, or none: one more load finds a row, and nothing is moved.
Slots without a token stand at the end of their block, and are masked.

Global queries read everything, and global keys are read by everything: a second launch, in which a program owns
global rows, and shares out what they read, or who reads them, among splits that fill a device. Partial results are
merged, and partial gradients and tangents added, always in the same order.

The gradient of the bias table is added up by atomics, since a row of the table collects pairs from everywhere. They
add floats, in any order; or, if the result must be the same every time, whole multiples of a unit, which add up to the
same in every order (see :func:`_unit`). Pairs with a global token share rows of the table: a program of global
queries, or of global keys, sums them up before.

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import attention, configs, flash, launch, merge_attention, position_bias
from vattn.kernels.itinerary import Itinerary
from vattn.kernels.launch import quotient
from vattn.kernels.tokens import lanes as lanes_alone
from vattn.kernels.tokens import offsets, share, whole_tiles

# Numbers: of global tokens splits, of blocks from sample to sample of the layout; from head to head of the layout, from
# sample to sample of the codes, S of the table, G, N, the size of a block and 1 / that. Pointers: see below. A row is
# (its number, which rows exist, whether some are global).


class Pointers(NamedTuple):
    """What the hooks read beside rows; None where there is none."""

    table: Tensor | None
    codes: Tensor | None
    starts: Tensor | None = None
    columns: Tensor | None = None
    scores: Tensor | None = None  # of the first global query, which become importance
    table_grad: Tensor | None = None
    unit: Tensor | None = None
    table_tangent: Tensor | None = None
    order: Tensor | None = None


@triton.jit
def list_of(where, sample_step, bh, H, block):
    """The first entry of a block's list, and how many places its blocks have."""
    start_ptr = where[0].starts + bh // H * sample_step + bh % H * where[1][1] + block
    start = tl.load(start_ptr)
    return start, (tl.load(start_ptr + 1) - start) * where[1][6]


@triton.jit
def own_consecutive(where, sample_step, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """Rows of a block: ``(bh, H, G, N, block size, 1 / that, its list, and places: first, whole, global, last)``."""
    _, _, _, _, G, N, block_size, inverse = where[1]
    pid = tl.program_id(0)
    tiles, blocks = tl.cdiv(tl.minimum(block_size, N), BLOCK), tl.cdiv(N, block_size)
    component = pid // tiles
    block, bh = component % blocks, component // blocks
    begin = G + block * block_size
    start, listed = list_of(where, sample_step, bh, H, block)
    whole = tl.where(N % block_size == 0, listed - listed % OTHER, 0)
    group = (bh, H, G, N, block_size, inverse, where[0].columns + start, 0, whole, listed, listed + G)
    return bh, 0, group, begin + pid % tiles * BLOCK, tl.minimum(begin + block_size, G + N)


@triton.jit
def own_block(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """Rows of a block, of a layout for all samples."""
    return own_consecutive(where, 0, H, heads, BLOCK, OTHER)


@triton.jit
def own_block_of_sample(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """Rows of a block, of a layout per sample."""
    return own_consecutive(where, where[1][0], H, heads, BLOCK, OTHER)


@triton.jit
def own_slots(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """Slots of a block; ``group`` as :func:`own_consecutive` has it, and the order behind it."""
    sample_step, _, _, _, G, N, block_size, inverse = where[1]
    order_ptr = where[0].order
    pid = tl.program_id(0)
    tiles = tl.cdiv(block_size, BLOCK)
    component, blocks = pid // tiles, tl.num_programs(0) // (tiles * heads)
    block, bh = component % blocks, component // blocks
    start, listed = list_of(where, sample_step, bh, H, block)
    whole = tl.where(N == blocks * block_size, listed - listed % OTHER, 0)
    group = (bh, H, G, N, block_size, inverse, where[0].columns + start, 0, whole, listed, listed + G, order_ptr)
    first = block * block_size + pid % tiles * BLOCK
    slot = first + tl.arange(0, BLOCK)
    tokens = tl.load(order_ptr + slot, mask=slot < (block + 1) * block_size, other=-1)
    return bh, 0, group, first, first + tl.sum((tokens >= 0).to(tl.int32))


@triton.jit
def own_globals(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """Global tokens, and a split of what they read; ``group`` as :func:`own_consecutive` has it."""
    splits, _, _, _, G, N, block_size, inverse = where[1]
    tiles = tl.cdiv(G, BLOCK)
    component = tl.program_id(0) // tiles
    bh, split = component % heads, component // heads
    first, last = share(G + N, split, splits, OTHER)
    first, whole, last = whole_tiles(first, last, OTHER)
    group = (bh, H, G, N, block_size, inverse, where[0].columns, first, whole, 0, last)
    return bh, split, group, tl.program_id(0) % tiles * BLOCK, G


@triton.jit
def span(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """The places that a program reads."""
    return group[7], group[8], group[10]


@triton.jit
def lanes_listed(group, BLOCK: tl.constexpr):
    """The lanes of a tile, and their blocks and tokens if the tile began with a block."""
    lane, block_size = tl.arange(0, BLOCK), group[4]
    return lane, lane // block_size, lane % block_size


@triton.jit
def entries(start, lanes, group):
    """Where the blocks of the list stand that have the places from `start` on, and the places in their block."""
    _, blocks, tokens = lanes
    block_size, inverse, columns_ptr = group[4], group[5], group[6]
    entry = quotient(start, inverse)
    token = start - entry * block_size + tokens
    wraps = (token >= block_size).to(tl.int32)
    token -= wraps * block_size
    return columns_ptr + entry + blocks + wraps, token


@triton.jit
def locate_listed(start, lanes, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """The rows at the places of the list from `start` on."""
    lane, G, N, block_size, listed = lanes[0], group[2], group[3], group[4], group[9]
    columns_ptrs, token = entries(start, lanes, group)
    if WHOLE:
        return (G + tl.load(columns_ptrs) * block_size + token,)
    else:
        place = start + lane
        is_listed = place < listed
        token += tl.load(columns_ptrs, mask=is_listed, other=0) * block_size
        row = tl.where(is_listed, G + token, place - listed)
        return row, tl.where(is_listed, token < N, place < last), start + lane.shape[0] > listed


@triton.jit
def locate_slots(start, lanes, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """The rows at the places of the list from `start` on, of blocks of slots."""
    lane, G, block_size, listed, order_ptr = lanes[0], group[2], group[4], group[9], group[11]
    columns_ptrs, slot = entries(start, lanes, group)
    if WHOLE:
        return (G + tl.load(order_ptr + tl.load(columns_ptrs) * block_size + slot),)
    else:
        place = start + lane
        is_listed = place < listed
        slot += tl.load(columns_ptrs, mask=is_listed, other=0) * block_size
        token = tl.load(order_ptr + slot, mask=is_listed, other=-1)
        row = tl.where(is_listed, G + tl.maximum(token, 0), place - listed)
        return row, tl.where(is_listed, token >= 0, place < last), start + lane.shape[0] > listed


@triton.jit
def locate_all(start, lane, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """All rows, as they lie."""
    return start + lane, start + lane < last, start < group[2]


@triton.jit
def mine(first, last, group, BLOCK: tl.constexpr):
    """The rows owned."""
    return (first + tl.arange(0, BLOCK),)


@triton.jit
def tokens_of_slots(first, last, group, BLOCK: tl.constexpr):
    """The rows owned, of slots."""
    slot = first + tl.arange(0, BLOCK)
    return (group[2] + tl.load(group[11] + slot, mask=slot < last, other=0),)


@triton.jit
def exists(row):
    """Which rows exist."""
    return row[1]


@triton.jit
def number(row, group):
    """What dropout and lse count."""
    return row[0]


@triton.jit
def codes_of(where, row, mask, group):
    """What tells where tokens are: their codes, or their order if they have none."""
    if where[0].codes is not None:
        code_ptr = where[0].codes + (group[0] // group[1]).to(tl.int64) * where[1][2]
        return position_bias.load_codes(code_ptr, row[0], mask, group[2])
    else:
        return row[0] - group[2]


@triton.jit
def table_head(table_ptr, where, group):
    """Where the table of a head begins."""
    S, G = where[1][3], group[2]
    return table_ptr + group[0] % group[1] * (S + (2 + G) * G)


@triton.jit
def pair_block(where, row, mask, group, OF_KEYS: tl.constexpr):
    """What own rows tell of the pairs they are in: their part of a place in the table, and their codes."""
    code = codes_of(where, row, mask, group)
    if OF_KEYS:
        return position_bias.own_key(row[0], code, mask, False), code, group
    else:
        return position_bias.own_query(row[0], code, mask, False), code, group


@triton.jit
def pair_globals(where, row, mask, group, OF_KEYS: tl.constexpr):
    """Likewise of global rows, which have no codes."""
    return tl.where(mask, row[0], 0), row[0], group


@triton.jit
def bias_block(where, pair, row, mask, group, OF_KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """The bias of own rows of a block, and its place in the table of the head."""
    own, S, code = pair[0], where[1][3], codes_of(where, row, mask, group)
    if WHOLE:
        if OF_KEYS:
            place = own[:, None] + ((S >> 1) + code)[None, :]
        else:
            place = own[:, None] + ((S >> 1) - code)[None, :]
    else:
        place = position_bias.place(own, row[0], code, False, S, group[2], OF_KEYS)
    return position_bias.lookup(table_head(where[0].table, where, group), place), place


@triton.jit
def bias_globals(where, pair, row, mask, group, OF_KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """Likewise of global rows."""
    code = codes_of(where, row, mask, group)
    place = position_bias.place(pair[0], row[0], code, True, where[1][3], group[2], OF_KEYS)
    return position_bias.lookup(table_head(where[0].table, where, group), place), place


@triton.jit
def bias_tangent(where, pair, place):
    """The tangent of a bias, which lies as the bias does."""
    return position_bias.lookup(table_head(where[0].table_tangent, where, pair[2]), place)


@triton.jit
def not_later(where, pair, row, mask, group, OF_KEYS: tl.constexpr):
    """Causal: which keys come no later than the query; global tokens read and are read whatever their place."""
    code, G = codes_of(where, row, mask, group), group[2]
    if OF_KEYS:
        return pair[1][:, None] <= tl.where(row[0] < G, position_bias.LAST, code)[None, :]
    else:
        allowed = tl.where(row[0] < G, position_bias.FIRST, code)[None, :] <= pair[1][:, None]
        if mask is not None:
            allowed = allowed & mask[None, :]
        return allowed


@triton.jit
def keep_scores(where, s, own_row, row, mask, group):
    """The scaled and biased scores (N,) of global query 0."""
    scores_ptrs = (
        where[0].scores + group[0].to(tl.int64) * group[3] + (row[0] - group[2])[None, :] + own_row[0][:, None]
    )
    tl.store(scores_ptrs, s, mask=(own_row[0] == 0)[:, None] & (row[1] & (row[0] >= group[2]))[None, :])


@triton.jit
def add_to_table(where, group, place, ds, mask):
    """Add `ds` to places of a head's table where `mask` is on: as floats, or as so many units."""
    if where[0].unit is not None:
        ds = (ds * tl.load(where[0].unit)).to(tl.int64)
    tl.atomic_add(table_head(where[0].table_grad, where, group) + place, ds, mask=mask, sem="relaxed")


@triton.jit
def grad_block(where, state, ds, place, pair, row, mask, own_mask, group, WHOLE: tl.constexpr):
    """Own queries of a block add what they find with tokens of blocks; global keys do it for pairs with them."""
    # By value: a mask of the addition costs a branch for each pair. Also of a pair that is not there the place exists.
    ds = tl.where(own_mask[:, None], ds, 0.0)
    if not WHOLE:
        ds = tl.where((row[0] >= group[2])[None, :], ds, 0.0)
    add_to_table(where, group, place, ds, None)
    return state


@triton.jit
def grad_start(BLOCK: tl.constexpr):
    """The sum of a global query or key over its pairs with tokens of blocks, which share a place."""
    return tl.zeros((BLOCK,), tl.float32)


@triton.jit
def grad_global_queries(where, ds_local, ds, place, pair, row, mask, own_mask, group, WHOLE: tl.constexpr):
    """Own global queries sum up what they find, and add pairs of two global tokens."""
    is_global = row[0] < group[2]
    if row[2]:
        add_to_table(where, group, place, ds, own_mask[:, None] & is_global[None, :])
    return ds_local + tl.sum(tl.where(is_global[None, :], 0.0, ds), 1)


@triton.jit
def grad_global_keys(where, ds_local, ds, place, pair, row, mask, own_mask, group, WHOLE: tl.constexpr):
    """Own global keys sum up what queries of blocks find."""
    return ds_local + tl.sum(tl.where((row[0] < group[2])[None, :], 0.0, ds), 1)


@triton.jit
def add_global_queries(where, ds_local, own_row, mask, pair, group):
    """Add the sums of global queries."""
    add_to_table(where, group, where[1][3] + own_row[0], ds_local, mask)


@triton.jit
def add_global_keys(where, ds_local, own_row, mask, pair, group):
    """Add the sums of global keys."""
    add_to_table(where, group, where[1][3] + group[2] + own_row[0], ds_local, mask)


ROWS = {
    "globals": Itinerary(own_globals, span, lanes_alone, locate_all, offsets, number, mine=mine),
    "blocks": Itinerary(own_block, span, lanes_listed, locate_listed, offsets, number, exists, mine),
    "blocks of samples": Itinerary(
        own_block_of_sample, span, lanes_listed, locate_listed, offsets, number, exists, mine
    ),
    "slots": Itinerary(own_slots, span, lanes_listed, locate_slots, offsets, number, exists, tokens_of_slots),
}

GRADS = {
    "queries": {"grad_step": grad_block},
    "global queries": {
        "grad_start": grad_start, "grad_step": grad_global_queries, "grad_finish": add_global_queries,
    },
    "global keys": {"grad_start": grad_start, "grad_step": grad_global_keys, "grad_finish": add_global_keys},
}  # fmt: skip


@functools.cache
def itinerary(rows: str, bias: bool, causal: bool, taps: bool, grad: str, tangent: bool) -> Itinerary:
    """Of the `rows` that programs own, with what a call asks for; `grad` is that of the table, of whose rows."""
    is_global = rows == "globals"
    changes: dict[str, Any] = {}
    if bias:
        changes["bias"] = bias_globals if is_global else bias_block
    if causal and not is_global:
        changes["allowed"] = not_later
    if changes:
        changes["pair"] = pair_globals if is_global else pair_block
    if taps and is_global:
        changes["tap"] = keep_scores
    if tangent:
        changes["bias_tangent"] = bias_tangent
    changes |= GRADS.get(f"global {grad}" if is_global else grad, {})
    return dataclasses.replace(ROWS[rows], **changes)


def forward(
    query: Tensor, key: Tensor, value: Tensor, row_offsets: Tensor, columns: Tensor, column_offsets: Tensor | None,
    rows: Tensor | None, order: Tensor | None, block_size: int, num_global: int, bias_table: Tensor | None,
    window: Sequence[int], positions: Tensor | None, causal: bool, dropout_p: float, seed: Tensor | None, scale: float,
    importance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out (B, H, G+N, D), in memory as (B, G+N, H, D), the float32 lse (B, H, G+N), and importance (B, N) or (0,)."""
    bias = bias_table, window, positions, causal
    call = Call(query, key, value, row_offsets, columns, order, block_size, num_global, bias, dropout_p, seed, scale)
    out, lse = attention.empty_results(query)
    scores = lse.new_empty(lse[:, :, num_global:].shape) if importance else None
    for part, splits in call.parts("forward", {"scores": scores}, taps=importance):
        outs, lses = call.partial(out, splits), call.partial_sums(lse, splits)
        call.forward(part, outs, lses)
        if splits > 1:
            merged = merge_attention.merge_splits(outs, lses, query.dtype)
            out[:, :, :num_global], lse[:, :, :num_global] = merged
    if scores is None:
        return out, lse, lse.new_empty(0)
    # Of scores that are all -inf there is no weight, and -inf - -inf is NaN.
    return out, lse, scores.sub_(lse[:, :, :1].clamp(min=torch.finfo(torch.float32).min)).exp_().mean(1)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    row_offsets: Tensor, columns: Tensor, column_offsets: Tensor, rows: Tensor, order: Tensor | None, block_size: int,
    num_global: int, bias_table: Tensor | None, window: Sequence[int], positions: Tensor | None, causal: bool,
    dropout_p: float, seed: Tensor | None, scale: float, importance: bool, *, deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key, value and the table, the last (0,) without one.

    That of the table is `deterministic`, or, with None, if PyTorch's algorithms are to be.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    bias = bias_table, window, positions, causal
    call = Call(query, key, value, row_offsets, columns, order, block_size, num_global, bias, dropout_p, seed, scale)
    dq, dk, dv, delta = empty_rows(query), empty_rows(query), empty_rows(query), torch.empty_like(lse)
    unit = worth = dtable = None
    if call.table is not None:
        if deterministic and query.numel() > 0:
            unit, worth = _unit(grad_out, grad_lse, value, lse, dropout_p)
        dtable = torch.zeros_like(call.table, dtype=torch.float32 if unit is None else torch.int64)

    table: dict[str, Tensor | None] = {"table_grad": dtable, "unit": unit}
    for part, splits in call.parts("backward_query", table, "" if dtable is None else "queries"):
        dqs = call.partial(dq, splits)
        call.backward_query(part, grad_out, grad_lse, out, lse, delta, dqs)
        call.add_up(dqs, dq)
    table |= {"starts": column_offsets.contiguous(), "columns": rows.contiguous()}
    for part, splits in call.parts("backward_key", table, "" if dtable is None else "keys"):
        dks, dvs = call.partial(dk, splits), call.partial(dv, splits)
        call.backward_key(part, grad_out, lse, delta, dks, dvs)
        call.add_up(dks, dk)
        call.add_up(dvs, dv)
    if dtable is None:
        return dq, dk, dv, lse.new_empty(0)
    grad_table = dtable if worth is None else dtable.float() * worth
    return dq, dk, dv, grad_table.t().contiguous()


def jvp(
    query_tangent: Tensor, key_tangent: Tensor, value_tangent: Tensor, table_tangent: Tensor | None, query: Tensor,
    key: Tensor, value: Tensor, out: Tensor, lse: Tensor, row_offsets: Tensor, columns: Tensor,
    column_offsets: Tensor | None, rows: Tensor | None, order: Tensor | None, block_size: int, num_global: int,
    bias_table: Tensor | None, window: Sequence[int], positions: Tensor | None, causal: bool, dropout_p: float,
    seed: Tensor | None, scale: float, importance: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tangents of out and lse."""
    bias = bias_table, window, positions, causal
    call = Call(query, key, value, row_offsets, columns, order, block_size, num_global, bias, dropout_p, seed, scale)
    dout, dlse = attention.empty_results(query)
    dtable = None if table_tangent is None else table_tangent.float().t().contiguous()
    for part, splits in call.parts("jvp", {"table_tangent": dtable}, tangent=dtable is not None):
        douts, dlses = call.partial(dout, splits), call.partial_sums(dlse, splits)
        call.jvp(part, query_tangent, [key_tangent], [value_tangent], out, lse, douts, dlses)
        call.add_up(douts, dout)
        call.add_up(dlses, dlse)
    return dout, dlse


class Call(attention.Call):
    """A call with its layout and its bias."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, row_offsets: Tensor, columns: Tensor, order: Tensor | None,
        block_size: int, num_global: int, bias: tuple[Tensor | None, Sequence[int], Tensor | None, bool],
        dropout_p: float, seed: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        super().__init__(query, [key], [value], dropout_p, seed, scale)
        bias_table, window, positions, self.causal = bias
        self.num_global, self.tokens = num_global, query.shape[2] - num_global
        self.slots = self.tokens if order is None else order.numel()
        self.block_size = block_size = min(block_size, max(self.slots, 1))
        asked = None if bias_table is None and not self.causal else positions
        self.table, codes, (code_step, _, S) = position_bias.arguments(bias_table, window, asked, self.tokens, query)
        row_offsets, columns = row_offsets.contiguous(), columns.contiguous()
        self.pointers = Pointers(
            self.table, codes, row_offsets, columns, order=None if order is None else order.contiguous()
        )
        *samples, heads, ends = row_offsets.shape
        self.sample_step = heads * ends if samples else 0
        self.rows = "slots" if order is not None else "blocks of samples" if samples else "blocks"
        inverse = launch.reciprocal(block_size)
        self.numbers = 0 if heads == 1 else ends, code_step, S, num_global, self.tokens, block_size, inverse

    def parts(
        self, phase: str, pointers: dict[str, Tensor | None], grad: str = "", taps: bool = False, tangent: bool = False
    ) -> Iterator[tuple[attention.Part, int]]:
        """The launches that a pass wants, for blocks and for global tokens, and the splits of what those read."""
        for is_global, rows in ((False, self.slots), (True, self.num_global)):
            if rows == 0:
                continue
            size, kind = rows if is_global else self.block_size, "group" if self.table is None else "bias"
            tiles = configs.group_tiles(phase, self.query, self.extras, size, kind)
            own, other = configs.own_and_other(phase, tiles)
            splits, programs = 1, launch.cdiv(min(self.block_size, rows), own) * launch.cdiv(rows, self.block_size)
            if is_global:
                programs = launch.cdiv(rows, own)
                reads = launch.cdiv(self.num_global + self.tokens, other)
                splits = configs.splits(programs * self.heads, reads, self.query)
            owned = "globals" if is_global else self.rows
            op = itinerary(owned, self.table is not None, self.causal, taps, grad, tangent)
            where = (splits if is_global else self.sample_step, *self.numbers), self.pointers._replace(**pointers)
            yield attention.Part(op, tiles, programs * splits * self.heads, *where), splits

    def partial(self, x: Tensor, splits: int) -> Tensor:
        """Where to write results: to `x` (1, B, H, G+N, D), or partial ones of its global rows (splits, B, H, G, D)."""
        return x[None] if splits == 1 else launch.partial(x[:, :, : self.num_global], splits)

    def partial_sums(self, x: Tensor, splits: int) -> Tensor:
        """Likewise of a number for each row: to `x`, or (splits, B, H, G)."""
        return x[None] if splits == 1 else launch.sums(self.query[:, :, : self.num_global], splits)

    def add_up(self, parts: Tensor, x: Tensor) -> None:
        """The global rows of `x` are the sum of those of several splits."""
        if parts.shape[0] > 1:
            x[:, :, : self.num_global] = parts.sum(0)


def _unit(
    grad_out: Tensor, grad_lse: Tensor | None, value: Tensor, lse: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How many units make 1, a power of two, so that the sum of all |ds|, counted in units, fits 62 bits.

    For each query, sum_k |ds| <= 2 max_k |dout v_k^T| / (1 - dropout_p) + |dlse|; twice that covers what is rounded in
    p and out. With B * (G+N) = 2**16 queries a unit is at most 2**-43 of this bound for one query, where float32 would
    keep 2**-24 of the sum. Also what a unit is worth: NaN, like the gradient, if the bound or an lse is not finite, but
    for the -inf of a query without keys.
    """
    B, _, queries, _ = grad_out.shape
    largest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax().double() for x in (grad_out, value)]
    bound = 2 * flash.split_dropout(dropout_p)[1] * largest[0] * largest[1]
    if grad_lse is not None:
        bound = bound + grad_lse.abs().amax()
    exponent = 62 - torch.frexp(2 * B * queries * bound).exponent
    unit = torch.ldexp(torch.ones_like(bound), exponent.clamp(-126, 126)).float()
    return unit, torch.where(bound.isfinite() & (lse < torch.inf).all(), 1 / unit, torch.nan)
