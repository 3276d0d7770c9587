"""Axial attention on the GPU: the itinerary of the lines of a grid over the flash core.

The axes before that of the lines are one, `outer`, and those behind it, `inner`; lines are numbered through both. A
program owns whole lines, as many as its tile has room for, and a token reads the lanes of its own line::

    inner = 3, lines of 2 tokens, tiles of 8 rows
    row     0   1 | 2   3 | 4   5 |              line and token are row // 2 and row % 2
    line    0   0 | 1   1 | 2   2 |              line 3 begins in the next tile

So lines of 4 tokens do not cost a tile each, nothing is permuted, and a backward reads every row once: queries, keys
and values of a tile get their gradients from one program. Of a line that is longer than a tile, a program owns a part
and reads the others, as everywhere. Ho et al., "Axial Attention in Multidimensional Transformers" (2019).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import configs, flash, launch
from vattn.kernels.launch import head, unpack


@triton.jit
def own_rows(grid, lines, tiles, BLOCK: tl.constexpr):
    """What this program owns: batch * H + head, its first line, the rows of its lines, and its tile's first row."""
    outer, L, inner = grid
    groups = tl.cdiv(outer * inner, lines)
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    line = pid % groups * lines
    return pid // groups, line, tl.minimum(lines, outer * inner - line) * L, tile * BLOCK


@triton.jit
def locate(row, line, grid, WHOLE: tl.constexpr):
    """Where rows are, (outer, token, inner), and the numbers of their tokens in the grid.

    Tiles of WHOLE lines have several of them, others are part of one, which spares them the divisions.
    """
    L, inner = grid[1], grid[2]
    if WHOLE:
        line += row // L
        row = row % L
    place = line // inner, row, line % inner
    return place, (place[0].to(tl.int64) * L + row) * inner + place[2]


@triton.jit
def offsets(place, strides):
    """Offsets of rows within their batch and head."""
    outer, token, inner = place
    offs = outer.to(tl.int64) * unpack(strides, 2) + inner.to(tl.int64) * unpack(strides, 4)
    return offs + token.to(tl.int64) * unpack(strides, 3)


@triton.jit
def load_keys(kv, row, mask, line, grid, WHOLE: tl.constexpr, SHAPE: tl.constexpr):
    """Keys and values of rows, (keys, D) each, and their token numbers (keys,)."""
    k_ptr, v_ptr, k_strides, v_strides = kv
    place, number = locate(row, line, grid, WHOLE)
    k = flash.load_rows(k_ptr, offsets(place, k_strides), mask, SHAPE)
    v = flash.load_rows(v_ptr, offsets(place, v_strides), mask, SHAPE)
    return k, v, number


@triton.jit
def same_line(row, rows, L):
    """Which row of a tile reads which: (queries, keys)."""
    line = row // L
    return (line[:, None] == line[None, :]) & (row < rows)[None, :]


@triton.jit
def dropout_over_keys(seed_ptr, bh, number, threshold, DROPOUT: tl.constexpr):
    """What the flash core wants to know of dropout, for tiles (queries, keys), or None."""
    if DROPOUT:
        add, times = flash.dropout_query(seed_ptr, bh, number)
        return add[:, None], times[:, None], threshold
    else:
        return None


@triton.jit
def load_delta(do_ptr, dlse_ptr, out_ptr, do_strides, dlse_strides, out_strides, place, mask, SHAPE: tl.constexpr):
    """dout (queries, D), and delta = <dout, out> - dlse (queries,), of a batch and head."""
    do = flash.load_rows(do_ptr, offsets(place, do_strides), mask, SHAPE)
    out = flash.load_rows(out_ptr, offsets(place, out_strides), mask, SHAPE)
    delta = flash.row_dot(do, out)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offsets(place, dlse_strides), mask=mask, other=0.0)
    return do, delta


@triton.jit
def optional_head(ptr, strides, bh, H):
    """:func:`head` of a tensor that may be None."""
    if ptr is not None:
        return head(ptr, strides, bh, H)
    else:
        return None


@launch.kernel
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr, q_strides, k_strides, v_strides, out_strides,
    H, outer, L, inner, lines, tiles, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, WHOLE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x lines x query tile. A program owns BLOCK_Q queries: their out and lse.

    Where lines are WHOLE, its queries are its keys.
    """
    grid = outer, L, inner
    bh, line, rows, first_q = own_rows(grid, lines, tiles, BLOCK_Q)
    row = first_q + tl.arange(0, BLOCK_Q)
    mask_q = row < rows
    place, number = locate(row, line, grid, WHOLE)
    dropout = dropout_over_keys(seed_ptr, bh, number, threshold, DROPOUT)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(place, q_strides), mask_q, SHAPE)
    kv = head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides
    if WHOLE:
        k, v, _ = load_keys(kv, row, mask_q, line, grid, WHOLE, SHAPE)
        s = flash.key_scores(q, k, scale, None, same_line(row, rows, L), PRECISION, SIGN)
        out, lse = flash.forward_tile(s, scale, v, number, dropout, keep_scale, SHAPE, PRECISION)
    else:
        state = flash.forward_start(BLOCK_Q, SHAPE)
        lane_k = tl.arange(0, BLOCK_K)
        whole = rows // BLOCK_K * BLOCK_K
        for first in range(0, whole, BLOCK_K):
            keys = load_keys(kv, first + lane_k, None, line, grid, WHOLE, SHAPE)
            state = flash.forward_keys(state, q, scale, keys, None, dropout, PRECISION, SIGN)
        if whole < rows:
            mask = whole + lane_k < rows
            keys = load_keys(kv, whole + lane_k, mask, line, grid, WHOLE, SHAPE)
            state = flash.forward_keys(state, q, scale, keys, mask, dropout, PRECISION, SIGN)
        out, lse = flash.forward_finish(state, scale, keep_scale)
    tl.store(lse_ptr + bh.to(tl.int64) * outer * L * inner + number, lse, mask=mask_q)
    flash.store_rows(head(out_ptr, out_strides, bh, H), offsets(place, out_strides), mask_q, out, SHAPE)


@launch.kernel
def backward_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, seed_ptr,
    do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, grad_strides,
    H, outer, L, inner, lines, tiles, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x whole lines. A program owns the rows of its lines: their dq, dk and dv.

    delta = <dout, out> - dlse,   dq = scale * ds k,   dv = p^T dout,   dk = scale * ds^T q
    """
    grid = outer, L, inner
    bh, line, rows, _ = own_rows(grid, lines, tiles, BLOCK_Q)
    row = tl.arange(0, BLOCK_Q)
    mask = row < rows
    place, number = locate(row, line, grid, True)
    dropout = dropout_over_keys(seed_ptr, bh, number, threshold, DROPOUT)
    do, delta = load_delta(
        head(do_ptr, do_strides, bh, H), optional_head(dlse_ptr, dlse_strides, bh, H),
        head(out_ptr, out_strides, bh, H), do_strides, dlse_strides, out_strides, place, mask, SHAPE,
    )  # fmt: skip
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(place, q_strides), mask, SHAPE)
    kv = head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides
    k, v, _ = load_keys(kv, row, mask, line, grid, True, SHAPE)
    lse = flash.load_lse(lse_ptr + bh.to(tl.int64) * outer * L * inner + number, mask)

    keep = None
    if dropout is not None:
        keep = flash.dropout_keep(*dropout, number[None, :])
    s, dp = flash.scores(q, k, PRECISION), flash.scores(do, v, PRECISION)  # (queries, keys)
    allowed = same_line(row, rows, L)
    p, ds = flash.backward_step(s, scale, lse[:, None], dp, delta[:, None], allowed, keep, keep_scale)
    offs = offsets(place, grad_strides)
    zero = flash.zero_rows(BLOCK_Q, SHAPE)
    dv = flash.accumulate(zero, tl.trans(p), do, PRECISION)
    flash.store_rows(head(dv_ptr, grad_strides, bh, H), offs, mask, flash.scale_rows(dv, keep_scale), SHAPE)
    dk = flash.accumulate(zero, tl.trans(ds), q, PRECISION)
    flash.store_rows(head(dk_ptr, grad_strides, bh, H), offs, mask, flash.scale_rows(dk, scale), SHAPE)
    dq = flash.accumulate(zero, ds, k, PRECISION)
    flash.store_rows(head(dq_ptr, grad_strides, bh, H), offs, mask, flash.scale_rows(dq, scale), SHAPE)


@launch.kernel
def backward_query_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, seed_ptr,
    do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, dq_strides,
    H, outer, L, inner, lines, tiles, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x line x query tile. A program owns BLOCK_Q queries of a line: their dq and delta.

    delta = <dout, out> - dlse,   dq = scale * sum_k ds k
    """
    grid = outer, L, inner
    bh, line, rows, first_q = own_rows(grid, lines, tiles, BLOCK_Q)
    row = first_q + tl.arange(0, BLOCK_Q)
    mask_q = row < rows
    place, number = locate(row, line, grid, False)
    dropout = dropout_over_keys(seed_ptr, bh, number, threshold, DROPOUT)
    do, delta = load_delta(
        head(do_ptr, do_strides, bh, H), optional_head(dlse_ptr, dlse_strides, bh, H),
        head(out_ptr, out_strides, bh, H), do_strides, dlse_strides, out_strides, place, mask_q, SHAPE,
    )  # fmt: skip
    before = bh.to(tl.int64) * outer * L * inner
    tl.store(delta_ptr + before + number, delta, mask=mask_q)
    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(place, q_strides), mask_q, SHAPE)
    query = q, do, flash.load_lse(lse_ptr + before + number, mask_q), delta

    kv = head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides
    dq = flash.zero_rows(BLOCK_Q, SHAPE)
    lane_k = tl.arange(0, BLOCK_K)
    whole = rows // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        keys = load_keys(kv, first + lane_k, None, line, grid, False, SHAPE)
        dq = flash.backward_keys(dq, query, scale, keys, None, dropout, keep_scale, PRECISION)
    if whole < rows:
        mask = whole + lane_k < rows
        keys = load_keys(kv, whole + lane_k, mask, line, grid, False, SHAPE)
        dq = flash.backward_keys(dq, query, scale, keys, mask, dropout, keep_scale, PRECISION)
    dq_ptr = head(dq_ptr, dq_strides, bh, H)
    flash.store_rows(dq_ptr, offsets(place, dq_strides), mask_q, flash.scale_rows(dq, scale), SHAPE)


@launch.kernel
def backward_key_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, seed_ptr,
    do_strides, q_strides, k_strides, v_strides, grad_strides,
    H, outer, L, inner, lines, tiles, scale, threshold, keep_scale,
    SHAPE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: batch and head x line x key tile. A program owns BLOCK_K keys of a line: their dk and dv.

        dv = sum_q p^T dout,   dk = scale * sum_q ds^T q

    Tiles are (keys, queries). Queries past the line's end have lse = +inf, hence p = ds = 0.
    """
    grid = outer, L, inner
    bh, line, rows, first_k = own_rows(grid, lines, tiles, BLOCK_K)
    row = first_k + tl.arange(0, BLOCK_K)
    mask_k = row < rows
    kv = head(k_ptr, k_strides, bh, H), head(v_ptr, v_strides, bh, H), k_strides, v_strides
    keys = load_keys(kv, row, mask_k, line, grid, False, SHAPE)

    do_ptr, q_ptr = head(do_ptr, do_strides, bh, H), head(q_ptr, q_strides, bh, H)
    before = bh.to(tl.int64) * outer * L * inner
    grads = flash.zero_rows(BLOCK_K, SHAPE), flash.zero_rows(BLOCK_K, SHAPE)
    for first in range(0, rows, BLOCK_Q):
        row_q = first + tl.arange(0, BLOCK_Q)
        mask_q = row_q < rows
        place, number = locate(row_q, line, grid, False)
        q = flash.load_rows(q_ptr, offsets(place, q_strides), mask_q, SHAPE)
        do = flash.load_rows(do_ptr, offsets(place, do_strides), mask_q, SHAPE)
        lse = flash.load_lse(lse_ptr + before + number, mask_q)
        delta = tl.load(delta_ptr + before + number, mask=mask_q, other=0.0)
        dropout = None
        if DROPOUT:
            add, times = flash.dropout_query(seed_ptr, bh, number)
            dropout = (add[None, :], times[None, :], threshold)
        query = (q, do, lse, delta)
        grads = flash.backward_queries(grads, keys, scale, query, None, dropout, keep_scale, PRECISION)

    dk, dv = grads
    offs = offsets(locate(row, line, grid, False)[0], grad_strides)
    flash.store_rows(head(dk_ptr, grad_strides, bh, H), offs, mask_k, flash.scale_rows(dk, scale), SHAPE)
    flash.store_rows(head(dv_ptr, grad_strides, bh, H), offs, mask_k, flash.scale_rows(dv, keep_scale), SHAPE)


def forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, outer, line, inner, D), in memory as (B, outer, line, inner, H, D), and lse, float32, without D."""
    out = empty_rows(query)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    query, key, value = (launch.with_rows(x) for x in (query, key, value))
    sign, scale = flash.split_scale(scale)
    work = _Work(query, dropout_p, scale, (query, key, value, out))
    work.run(
        forward_kernel, "forward", query, key, value, out, lse, seed,
        *(launch.strides(x) for x in (query, key, value, out)), SIGN=sign, WHOLE=work.whole("forward"),
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value; memory beyond them is `delta`, as large as lse, where lines are long."""
    dq, dk, dv = empty_rows(query), empty_rows(query), empty_rows(query)
    if lse.numel() == 0:
        return dq, dk, dv
    grad_out, query, key, value, out = (launch.with_rows(x) for x in (grad_out, query, key, value, out))
    inputs = (grad_out, query, key, value, out, dq)
    work = _Work(query, dropout_p, scale, inputs)
    do_strides, q_strides, k_strides, v_strides, out_strides, grad_strides = (launch.strides(x) for x in inputs)
    dlse_strides = None if grad_lse is None else launch.strides(grad_lse[..., None])
    if work.whole("backward"):
        work.run(
            backward_kernel, "backward", grad_out, grad_lse, query, key, value, out, lse, dq, dk, dv, seed,
            do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, grad_strides,
        )  # fmt: skip
        return dq, dk, dv
    delta = torch.empty_like(lse)
    work.run(
        backward_query_kernel, "backward_query", grad_out, grad_lse, query, key, value, out, lse, delta, dq, seed,
        do_strides, dlse_strides, q_strides, k_strides, v_strides, out_strides, grad_strides,
    )  # fmt: skip
    work.run(
        backward_key_kernel, "backward_key", grad_out, query, key, value, lse, delta, dk, dv, seed,
        do_strides, q_strides, k_strides, v_strides, grad_strides,
    )  # fmt: skip
    return dq, dk, dv


class _Work:
    """What the kernels of one call share: the grid, the settings and the tile shape."""

    def __init__(self, query: Tensor, dropout_p: float, scale: float, tensors: tuple[Tensor, ...]) -> None:
        B, self.H, *self.grid, D = query.shape
        self.like = query
        self.heads = B * self.H
        self.values = (scale, *flash.split_dropout(dropout_p))
        self.settings = {
            "SHAPE": flash.shape(D, launch.alignment(*tensors)),
            "DROPOUT": dropout_p > 0,
            "PRECISION": launch.precision(),
        }

    def whole(self, phase: str) -> bool:
        """Whether a program owns whole lines."""
        return self.grid[1] <= self._square(phase)["BLOCK_Q"]

    def run(self, kernel: Any, phase: str, *args: Any, **settings: Any) -> None:
        """Launch `kernel`, with a program for every tile of whole lines, or of a part of one."""
        outer, line, inner = self.grid
        if self.whole(phase):
            tiles = self._square(phase)
            lines, parts = tiles["BLOCK_Q"] // line, 1
        else:
            tiles = configs.tiles(phase, self.like, self.settings["DROPOUT"])
            lines, parts = 1, triton.cdiv(line, tiles["BLOCK_K" if phase == "backward_key" else "BLOCK_Q"])
        programs = self.heads * triton.cdiv(outer * inner, lines) * parts
        launch.launch(
            kernel, programs, self.like, *args, self.H, outer, line, inner, lines, parts, *self.values,
            **self.settings, **settings, **tiles,
        )  # fmt: skip

    def _square(self, phase: str) -> dict[str, int]:
        """Tiles for whole lines, with as many keys as queries, and no loop to be staged."""
        phase = "backward_query" if phase == "backward" else phase
        tiles = configs.tiles(phase, self.like, self.settings["DROPOUT"])
        block = min(tiles["BLOCK_Q"], tiles["BLOCK_K"])
        return tiles | {"BLOCK_Q": block, "BLOCK_K": block, "num_stages": 1}
