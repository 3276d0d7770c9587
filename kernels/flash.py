"""The online softmax: the one core that every attention kernel here runs.

For one tile of queries and the key tiles of its itinerary, with s = q k^T,

    m' = max(m, max_k s)          l' = l * exp(scale * (m - m')) + sum_k exp(scale * (s - m'))
    acc' = acc * exp(scale * (m - m')) + exp(scale * (s - m')) v
    out = acc / l                 lse = scale * m + log l

and its derivative, from lse and delta = <d out, out> - d lse, both one number per query:

    p = exp(scale * s - lse)      dv = p^T dout      ds = p * (dout v^T - delta)
    dq = scale * ds k             dk = scale * ds^T q

and its tangent, from tangents dq, dk and dv of the inputs:

    ds = scale * (dq k^T + q dk^T)      dlse = sum_k p ds      dout = sum_k p dv + (p ds) v - dlse * out

With a bias the scores are scale * s + bias, in all of them; they need no scale any more, ds is the bias's gradient,
and its tangent is added to that of the scores.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023).

An operator is an itinerary over this core: it decides which rows the next tile holds and where they lie, and
loads them with :func:`load_rows`; they may come from anywhere, one offset per row::

    queries  offs_q -> q --+
                           +-- scores -> (mask, bias) -> forward_step --+-- forward_finish -> out, lse
    keys     offs_k -> k --+                                  ^         |
                       v -------------------------------------+   next tile

A tile of rows is a tuple of (rows, chunk) blocks, so that a head dim of 80 is 64 + 16 columns wide and not 128;
`SHAPE`, from :func:`shape`, says how rows are cut and aligned. All state is float32. `PRECISION` is that of
``tl.dot`` for float32.
"""

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Chunk(NamedTuple):
    """Some columns of a tile of rows."""

    first: int
    width: int  # a power of two from 16 up, as matrix instructions want it


class Shape(NamedTuple):
    """How the rows of a tile look: known when a kernel is compiled."""

    head_dim: int
    alignment: int  # in elements: each row starts at a multiple of it
    far: bool  # whether two rows of a head may lie 2**31 elements apart or more
    chunks: tuple[Chunk, ...]

    @property
    def width(self) -> int:
        """Columns of a tile, with those past the head dim."""
        return sum(chunk.width for chunk in self.chunks)


def next_power_of_2(x: int) -> int:
    """The least power of two that is not below `x`, without the microseconds of ``triton.next_power_of_2``."""
    return 1 << max(x - 1, 0).bit_length()


@functools.cache
def shape(head_dim: int, alignment: int, far: bool = False) -> Shape:
    """Cut `head_dim` columns into one power of two, or into two if that wastes fewer columns (80 = 64 + 16)."""
    whole = max(16, next_power_of_2(head_dim))
    main = whole // 2
    rest = max(16, next_power_of_2(head_dim - main))
    if main >= 16 and main + rest < whole:
        return Shape(head_dim, alignment, far, (Chunk(0, main), Chunk(main, rest)))
    return Shape(head_dim, alignment, far, (Chunk(0, whole),))


def split_scale(scale: float) -> tuple[int, float]:
    """`scale` as the sign of the scores and a positive factor, so that their maximum is that of scale * scores."""
    return (scale > 0) - (scale < 0), abs(scale) or 1.0


def split_dropout(dropout_p: float) -> tuple[int, float]:
    """`dropout_p` as the threshold of the 24 random bits of a weight, and the factor of those that stay."""
    return math.ceil(dropout_p * 2**24), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


@triton.jit
def columns(SHAPE: tl.constexpr, I: tl.constexpr):
    """Column numbers of chunk I."""
    return SHAPE.chunks[I].first + tl.arange(0, SHAPE.chunks[I].width)


@triton.jit
def index(x, SHAPE: tl.constexpr):
    """An integer as the factor of an offset: 64 bits wide only where rows lie that far apart."""
    if SHAPE.far:
        return x.to(tl.int64)
    else:
        return x


@triton.jit
def aligned(ptr, offs_row, SHAPE: tl.constexpr):
    """``ptr + offs_row`` (rows, 1), with what the compiler must know to move 16 bytes at a time."""
    BYTES: tl.constexpr = SHAPE.alignment * (ptr.dtype.element_ty.primitive_bitwidth // 8)
    return tl.multiple_of(ptr + offs_row[:, None], (BYTES, BYTES))


@triton.jit
def load_rows(ptr, offs_row, mask_row, SHAPE: tl.constexpr):
    """The rows at ``ptr + offs_row``, 0 where `mask_row` is off (None: nowhere) and past the head dim."""
    ptrs = aligned(ptr, offs_row, SHAPE)
    tiles = ()
    for i in tl.static_range(len(SHAPE.chunks)):
        offs_d = columns(SHAPE, i)[None, :]
        if mask_row is not None:
            tile = tl.load(ptrs + offs_d, mask=mask_row[:, None] & (offs_d < SHAPE.head_dim), other=0.0)
        elif SHAPE.chunks[i].first + SHAPE.chunks[i].width <= SHAPE.head_dim:
            tile = tl.load(ptrs + offs_d)
        else:
            tile = tl.load(ptrs + offs_d, mask=offs_d < SHAPE.head_dim, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store_rows(ptr, offs_row, mask_row, tiles, SHAPE: tl.constexpr):
    """Write the rows at ``ptr + offs_row`` where `mask_row` is on, in the dtype of `ptr`."""
    ptrs = aligned(ptr, offs_row, SHAPE)
    for i in tl.static_range(len(SHAPE.chunks)):
        offs_d = columns(SHAPE, i)[None, :]
        mask = mask_row[:, None] & (offs_d < SHAPE.head_dim)
        tl.store(ptrs + offs_d, tiles[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_block(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Triton 3.6 wants the sizes of a block to be parameters."""
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def zero_rows(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """A float32 accumulator."""
    tiles = ()
    for i in tl.static_range(len(SHAPE.chunks)):
        tiles = tiles + (zero_block(ROWS, SHAPE.chunks[i].width),)
    return tiles


@triton.jit
def scale_rows(tiles, factor):
    """Each row, or all rows, times `factor`, in the tiles' own dtype."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + ((tiles[i] * factor).to(tiles[i].dtype),)
    return scaled


@triton.jit
def rows_or_zero(mask_row, tiles):
    """The rows where `mask_row` is on, 0 elsewhere."""
    chosen = ()
    for i in tl.static_range(len(tiles)):
        chosen = chosen + (tl.where(mask_row[:, None], tiles[i], 0.0),)
    return chosen


@triton.jit
def add_rows(acc, tiles, factor):
    """``acc + factor * tiles``, in float32."""
    total = ()
    for i in tl.static_range(len(acc)):
        total = total + (acc[i] + tiles[i].to(tl.float32) * factor,)
    return total


@triton.jit
def join_rows(a, b):
    """One tile out of two, of which one is 0 in every row."""
    joined = ()
    for i in tl.static_range(len(a)):
        joined = joined + (a[i] + b[i],)
    return joined


@triton.jit
def row_dot(a, b):
    """<a, b> of each row, in float32."""
    dot = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        dot += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return dot


@triton.jit
def transpose_rows(tiles):
    """Tiles of rows, transposed: before a loop, or it would write them to shared memory each time."""
    turned = ()
    for i in tl.static_range(len(tiles)):
        turned = turned + (tl.trans(tiles[i]),)
    return turned


@triton.jit
def products(a, b, PRECISION: tl.constexpr, SIGN: tl.constexpr = 1):
    """``SIGN * a b`` of a tile of rows and of one that :func:`transpose_rows` has turned."""
    s = tl.dot(a[0], b[0], input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], b[i], s, input_precision=PRECISION)
    if SIGN != 1:
        s *= SIGN
    return s


@triton.jit
def scores(a, b, PRECISION: tl.constexpr, SIGN: tl.constexpr = 1):
    """``SIGN * a b^T`` of two tiles of rows: (rows of a, rows of b)."""
    return products(a, transpose_rows(b), PRECISION, SIGN)


@triton.jit
def accumulate(acc, weights, rows, PRECISION: tl.constexpr):
    """``acc + weights rows``, the weights rounded to the dtype of the rows."""
    total = ()
    for i in tl.static_range(len(acc)):
        total = total + (tl.dot(weights.to(rows[i].dtype), rows[i], acc[i], input_precision=PRECISION),)
    return total


@triton.jit
def forward_start(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """The state (acc, m, l) of a query tile that has read nothing; acc is () if SHAPE is None, and so are values."""
    m, l = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if SHAPE is None:
        return (), m, l
    else:
        return zero_rows(ROWS, SHAPE), m, l


@triton.jit
def forward_step(state, s, scale, v, keep, PRECISION: tl.constexpr):
    """The state after reading one key tile.

    `s` (queries, keys), times the positive `scale`, is -inf where forbidden; `keep` is the dropout mask or None.
    Dropout thins the values, not the softmax: l counts every key.
    """
    acc, m, l = state
    m_next = tl.maximum(m, tl.max(s, 1))
    # Nothing read yet means m = -inf, acc = l = 0, and any finite alpha.
    alpha = tl.exp2(tl.minimum(log2_shift(m, scale) - log2_shift(m_next, scale), 0.0))
    p, total = weights(s, m_next, scale, keep)
    return accumulate(scale_rows(acc, alpha[:, None]), p, v, PRECISION), m_next, l * alpha + total


@triton.jit
def weights(s, m, scale, keep):
    """exp(scale * (s - m)) (queries, keys), thinned to what `keep` keeps, and its sums over all keys (queries,)."""
    p = tl.exp2(s * (scale * LOG2E) - log2_shift(m, scale)[:, None])
    total = tl.sum(p, 1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    return p, total


@triton.jit
def over_queries(mask):
    """A `mask` (keys,) as one of (1, keys); one of (queries, keys) as it is."""
    if len(mask.shape) == 1:
        return mask[None, :]
    else:
        return mask


@triton.jit
def key_scores(q, k, scale, bias, mask, PRECISION: tl.constexpr, SIGN: tl.constexpr = 1):
    """Scores (queries, keys) of a key tile: -inf where `mask` is off, scaled if there is a `bias` to add."""
    s = scores(q, k, PRECISION, SIGN)
    if bias is not None:
        s = s * scale + bias
    if mask is not None:
        s = tl.where(over_queries(mask), s, float("-inf"))
    return s


@triton.jit
def scale_left(scale, bias):
    """The factor that scores still want: `scale`, or 1 where a bias was added to them."""
    if bias is None:
        return scale
    else:
        return 1.0


@triton.jit
def forward_scores(state, s, scale, v, number, dropout, PRECISION: tl.constexpr):
    """The state of a query tile after its next key tile, of scores `s` (queries, keys), -inf where forbidden.

    `number` (keys,) are the keys as dropout counts them, and `dropout` what :func:`dropout_query` says, or ().
    """
    keep = None
    if len(dropout) > 0:
        keep = dropout_keep(*dropout, number[None, :])
    return forward_step(state, s, scale, v, keep, PRECISION)


@triton.jit
def forward_tile(s, scale, v, number, dropout, keep_scale, SHAPE: tl.constexpr, PRECISION: tl.constexpr):
    """The output and lse of queries that read one key tile and no other: no state, and nothing to rescale.

    The arguments are those of :func:`forward_scores`.
    """
    m = tl.max(s, 1)
    keep = None
    if len(dropout) > 0:
        keep = dropout_keep(*dropout, number[None, :])
    p, l = weights(s, m, scale, keep)
    acc = accumulate(zero_rows(p.shape[0], SHAPE), p, v, PRECISION)
    return forward_finish((acc, m, l), scale, keep_scale)


@triton.jit
def log2_shift(m, scale):
    """What is subtracted in the exponent, in log2 units; 0 for a query without keys, as -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m * (scale * LOG2E))


@triton.jit
def forward_finish(state, scale, keep_scale):
    """The output times `keep_scale`, and the natural-log lse; 0 and -inf for a query without keys.

    scale * LOG2E and m times it are rounded, which would cost lse some units in its last place and the backward
    as many in every weight. So lse is the exact m * scale, plus the rest of the rounded exponents.
    """
    acc, m, l = state
    none = l == 0  # but not if it is NaN, as of a score that is
    some, m_finite = tl.where(none, 1.0, l), tl.where(none, 0.0, m)
    factor = tl.zeros_like(m) + scale * LOG2E
    rest = tl.log2(some) - tl.fma(m_finite, factor, -log2_shift(m_finite, scale))
    lse = tl.where(none, float("-inf"), m_finite * scale + rest * LN2)
    return scale_rows(acc, (keep_scale / some)[:, None]), lse


@triton.jit
def load_numbers(ptrs, mask, OTHER: tl.constexpr):
    """A number for each row, OTHER where `mask` is off (None: nowhere)."""
    if mask is not None:
        return tl.load(ptrs, mask=mask, other=OTHER)
    else:
        return tl.load(ptrs)


@triton.jit
def load_lse(ptrs, mask):
    """The lse of queries; +inf, so that all weights are 0, where there is no query or it has no key."""
    lse = load_numbers(ptrs, mask, float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def probabilities(s, scale, lse, mask):
    """What the softmax makes of scores, of any sign of `scale`; 0 where `mask` is off (None: nowhere)."""
    p = tl.exp2(s * (scale * LOG2E) - lse * LOG2E)
    if mask is not None:
        p = tl.where(mask, p, 0.0)
    return p


@triton.jit
def backward_step(s, scale, lse, dp, delta, mask, keep, keep_scale):
    """The weights p (dropped, not yet divided by the share kept) and ds of one pair of tiles.

    `s`, `dp` = dout v^T, `mask` (None: all allowed) and `keep` have the same orientation, (queries, keys) or the
    transpose; `lse` and `delta` broadcast to them. `scale` may have any sign.
    """
    p = probabilities(s, scale, lse, mask)
    if keep is None:
        ds = p * (dp - delta)
    else:
        ds = p * (tl.where(keep, dp * keep_scale, 0.0) - delta)
        p = tl.where(keep, p, p * 0.0)  # of NaN, NaN
    if mask is not None:
        ds = tl.where(mask, ds, 0.0)  # not the 0 of p times what is not finite
    return p, ds


@triton.jit
def backward_keys(query, scale, keys, bias, mask, dropout, keep_scale, PRECISION: tl.constexpr):
    """ds (queries, keys) of a query tile ``(q, do, lse, delta)`` and a key tile ``(k, v, number)``.

    `mask` (keys,) or (queries, keys) is None where all may be read; `bias` (queries, keys), or None, is added to the
    scaled scores; `dropout` and `number` are those of :func:`forward_scores`.
    """
    q, do, lse, delta = query
    k, v, number = keys
    s, dp = key_scores(q, k, scale, bias, None, PRECISION), scores(do, v, PRECISION)  # (queries, keys)
    keep = None
    if len(dropout) > 0:
        keep = dropout_keep(*dropout, number[None, :])
    if mask is not None:
        mask = over_queries(mask)
    _, ds = backward_step(s, scale_left(scale, bias), lse[:, None], dp, delta[:, None], mask, keep, keep_scale)
    return ds


@triton.jit
def backward_queries(grads, keys, scale, query, bias, mask, dropout, keep_scale, PRECISION: tl.constexpr):
    """The gradients of a key tile after the next query tile, dk += ds^T q and dv += p^T dout; and ds^T.

    `mask` (keys,) or (keys, queries) tells which keys are read (None: all that exist), `dropout` broadcasts to
    (keys, queries) unless it is (), as does `bias`, unless it is None.
    """
    dk, dv = grads
    k, v, number = keys
    q, do, lse, delta = query
    s, dp = key_scores(k, q, scale, bias, None, PRECISION), scores(v, do, PRECISION)  # (keys, queries)
    keep = None
    if len(dropout) > 0:
        keep = dropout_keep(*dropout, number[:, None])
    if mask is not None:
        if len(mask.shape) == 1:
            mask = mask[:, None]
    p, ds = backward_step(s, scale_left(scale, bias), lse[None, :], dp, delta[None, :], mask, keep, keep_scale)
    dv = accumulate(dv, p, do, PRECISION)
    return (accumulate(dk, ds, q, PRECISION), dv), ds


@triton.jit
def tangent_keys(sums, query, scale, keys, tangents, bias, dbias, mask, dropout, PRECISION: tl.constexpr):
    """``sum p dv + (p ds) v`` (queries, D), yet to be divided by the share kept, and ``sum p ds`` (queries,).

    After the next key tile ``(k, v, number)`` with the tangents ``(dk, dv)``, of a query tile ``(q, dq, lse)``; the
    other arguments are those of :func:`backward_keys`, and `dbias` is the tangent of `bias`, or None.
    """
    acc, total = sums
    q, dq, lse = query
    k, v, number = keys
    dk, dv = tangents
    s = key_scores(q, k, scale, bias, None, PRECISION)
    ds = scores(dq, k, PRECISION)
    dk_columns = transpose_rows(dk)
    for i in tl.static_range(len(q)):
        ds = tl.dot(q[i], dk_columns[i], ds, input_precision=PRECISION)
    ds *= scale
    if dbias is not None:
        ds += dbias
    if mask is not None:
        mask = over_queries(mask)
        ds = tl.where(mask, ds, 0.0)  # a key that is not read may have any tangent
    p = probabilities(s, scale_left(scale, bias), lse[:, None], mask)
    ds *= p
    total += tl.sum(ds, 1)
    if len(dropout) > 0:
        keep = dropout_keep(*dropout, number[None, :])
        p, ds = tl.where(keep, p, 0.0), tl.where(keep, ds, 0.0)
    return accumulate(accumulate(acc, p, dv, PRECISION), ds, v, PRECISION), total


@triton.jit
def _mix(x):
    x = tl.mul(x ^ (x >> 16), 0x21F0AAAD, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0xD35A2D97, sanitize_overflow=False)
    return x ^ (x >> 15)


@triton.jit
def numbered(seed, I: tl.constexpr, x, mask):
    """The numbers that dropout counts `x` by where `mask` is on (None: everywhere): of table I, or `x` itself.

    `seed` is a pointer to the seed alone, or also where, behind it, the tables begin: of batches and heads (1), of
    queries (2), and of keys (3). It is () without dropout.
    """
    if len(seed) > 1:
        return load_numbers(seed[0] + (seed[I] >> 2) + x, mask, 0).to(tl.uint32)
    else:
        return x


@triton.jit
def key_number(seed, key, mask):
    """The numbers that dropout counts keys by; see :func:`numbered`."""
    return numbered(seed, 3, key, mask)


@triton.jit
def dropout_query(seed, bh, query, mask):
    """The part of the dropout hash that depends on queries alone; see ``vattn.reference.dropout``."""
    bh, query = numbered(seed, 1, bh, None), numbered(seed, 2, query, mask)
    bits = tl.load(seed[0])
    a = _mix(tl.add(bits.to(tl.uint32), bh.to(tl.uint32), sanitize_overflow=False))
    a = _mix(a ^ (bits >> 32).to(tl.uint32))
    add = _mix(tl.add(query.to(tl.uint32), a, sanitize_overflow=False))
    return add, _mix(add ^ a) | 1


@triton.jit
def dropout_keep(add, times, threshold, key):
    """Which weights stay: `add`, `times` of queries and `key` token numbers that broadcast together."""
    bits = tl.mul(times, key.to(tl.uint32), sanitize_overflow=False)
    bits = _mix(tl.add(bits, add, sanitize_overflow=False))
    return (bits >> 8) >= threshold.to(tl.uint32)
