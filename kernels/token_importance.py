"""Token importance on the GPU: what each key receives, in two passes over the scores, which are never stored.

    importance[k] = mean over heads and queries of exp(s[q, k] - lse[q])

The first pass is a forward without values, for lse; in the second a program owns keys and adds up the columns::

                keys                          keys
    queries    ------->  lse       queries     | |
               ------->                        v v   importance

Both share out what they read among splits where few programs would own rows. SViTT: Li et al., "SViTT: Temporal
Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import configs, flash, launch, position_bias
from vattn.kernels.latent_attention import keys_of_sample, offsets, share
from vattn.kernels.launch import head


@triton.jit
def own_rows(rows, heads, G, BLOCK: tl.constexpr):
    """What this program owns: batch * H + head, the split, rows and which exist, and whether they are global."""
    global_tiles, tiles = tl.cdiv(G, BLOCK), tl.cdiv(G, BLOCK) + tl.cdiv(rows - G, BLOCK)
    pid = tl.program_id(0)
    component, tile = pid // tiles, pid % tiles
    is_global = tile < global_tiles
    first = tl.where(is_global, tile * BLOCK, G + (tile - global_tiles) * BLOCK)
    row = first + tl.arange(0, BLOCK)
    return component % heads, component // heads, row, row < tl.where(is_global, G, rows), is_global


@launch.kernel
def lse_kernel(
    q_ptr, k_ptr, table_ptr, code_ptr, lengths_ptr, lse_ptr, q_strides, k_strides,
    code_step, R, S, splits, H, heads, G, Lq, Lk, scale,
    SHAPE: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: split x batch and head x query tile. A program owns BLOCK_Q queries: their lse of its split."""
    bh, split, row, mask_q, is_global = own_rows(Lq, heads, G, BLOCK_Q)
    table_ptr, code_ptr = position_bias.of_head(table_ptr, code_ptr, R, code_step, bh, H)
    own = None
    if table_ptr is not None:
        own = position_bias.own_query(row, position_bias.load_codes(code_ptr, row, mask_q, G), mask_q, is_global)

    q = flash.load_rows(head(q_ptr, q_strides, bh, H), offsets(row, q_strides), mask_q, SHAPE)
    k_ptr = head(k_ptr, k_strides, bh, H)
    state = flash.forward_start(BLOCK_Q, None)
    first_k, last_k = share(keys_of_sample(Lk, lengths_ptr, bh // H), split, splits, BLOCK_K)
    for first in range(first_k, last_k, BLOCK_K):
        row_k = first + tl.arange(0, BLOCK_K)
        mask_k = row_k < last_k
        k = flash.load_rows(k_ptr, offsets(row_k, k_strides), mask_k, SHAPE)
        bias = None
        if table_ptr is not None:
            code = position_bias.load_codes(code_ptr, row_k, mask_k, G)
            times, plus = position_bias.other_keys(row_k, code, is_global, S, G)
            bias, _ = position_bias.lookup(table_ptr, own, times, plus)
        s = flash.key_scores(q, k, scale, bias, mask_k, PRECISION, SIGN)
        state = flash.forward_scores(state, s, flash.scale_left(scale, bias), (), row_k, None, PRECISION)
    if table_ptr is not None:
        scale = 1.0
    _, lse = flash.forward_finish(state, scale, 1.0)
    tl.store(lse_ptr + (split * heads + bh).to(tl.int64) * Lq + row, lse, mask=mask_q)


@launch.kernel
def sum_kernel(
    q_ptr, k_ptr, table_ptr, code_ptr, lengths_ptr, lse_ptr, sum_ptr, q_strides, k_strides,
    code_step, R, S, splits, H, heads, G, Lq, Lk, scale,
    SHAPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: split x batch and head x key tile. A program owns BLOCK_K keys: what its split of the queries gives them.

    Queries past the split's end have lse = +inf, and give nothing; keys that their sample does not read get 0.
    """
    bh, split, row, mask_k, is_global = own_rows(Lk, heads, G, BLOCK_K)
    table_ptr, code_ptr = position_bias.of_head(table_ptr, code_ptr, R, code_step, bh, H)
    own = None
    if table_ptr is not None:
        own = position_bias.own_key(row, position_bias.load_codes(code_ptr, row, mask_k, G), mask_k, is_global)

    k = flash.load_rows(head(k_ptr, k_strides, bh, H), offsets(row, k_strides), mask_k, SHAPE)
    q_ptr = head(q_ptr, q_strides, bh, H)
    total = tl.zeros((BLOCK_K,), tl.float32)
    first_q, last_q = share(Lq, split, splits, BLOCK_Q)
    for first in range(first_q, last_q, BLOCK_Q):
        row_q = first + tl.arange(0, BLOCK_Q)
        mask_q = row_q < last_q
        q = flash.load_rows(q_ptr, offsets(row_q, q_strides), mask_q, SHAPE)
        lse = flash.load_lse(lse_ptr + bh.to(tl.int64) * Lq + row_q, mask_q)
        bias = None
        if table_ptr is not None:
            code = position_bias.load_codes(code_ptr, row_q, mask_q, G)
            times, plus = position_bias.other_queries(row_q, code, is_global, S, G)
            bias, _ = position_bias.lookup(table_ptr, own, times, plus)
        s = flash.key_scores(k, q, scale, bias, None, PRECISION)  # (keys, queries)
        total += tl.sum(flash.probabilities(s, flash.scale_left(scale, bias), lse[None, :], None), 1)
    is_read = row < keys_of_sample(Lk, lengths_ptr, bh // H)
    tl.store(sum_ptr + (split * heads + bh).to(tl.int64) * Lk + row, tl.where(is_read, total, 0.0), mask=mask_k)


def forward(
    query: Tensor, key: Tensor, bias_table: Tensor | None, window: Sequence[int], num_global: int,
    positions: Tensor | None, key_lengths: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """(B, Lk) float32; memory beyond it is lse, and as much for the keys."""
    work = _Work(query, key, bias_table, window, num_global, positions, key_lengths)
    (_, H, Lq, _), Lk = query.shape, key.shape[2]
    sign, positive = flash.split_scale(scale)
    lse = work.run(lse_kernel, "BLOCK_Q", Lq, Lk, positive, SIGN=sign)
    lse = lse[0] if lse.shape[0] == 1 else lse.logsumexp(0)
    return work.run(sum_kernel, "BLOCK_K", Lk, Lq, scale, lse).sum((0, 2)) / max(H * Lq, 1)


class _Work:
    """What both kernels read, and how they are launched."""

    def __init__(
        self, query: Tensor, key: Tensor, bias_table: Tensor | None, window: Sequence[int], num_global: int,
        positions: Tensor | None, key_lengths: Tensor | None,
    ) -> None:  # fmt: skip
        self.query, self.key = launch.with_rows(query), launch.with_rows(key)
        self.num_global = 0 if bias_table is None else num_global
        tokens = query.shape[2] - num_global
        table, codes, self.bias_values = position_bias.arguments(bias_table, window, positions, tokens, query)
        lengths = None if key_lengths is None else key_lengths.contiguous()
        self.tensors = (self.query, self.key, table, codes, lengths)
        self.strides = (launch.strides(self.query), launch.strides(self.key))
        self.tiles = configs.tiles("forward", query, extras=int(table is not None))

    def run(self, kernel: Any, side: str, rows: int, reads: int, scale: float, *args: Any, **settings: Any) -> Tensor:
        """What `kernel` finds for `rows` rows that read `reads` others: (splits, B, H, rows).

        `side` is that of the tiles that the kernel owns: as large as the queries of a forward.
        """
        B, H, Lq, D = self.query.shape
        tiles = self.tiles if side == "BLOCK_Q" else self._turned()
        own, G = tiles[side], self.num_global
        other = tiles["BLOCK_K" if side == "BLOCK_Q" else "BLOCK_Q"]
        programs = (triton.cdiv(G, own) + triton.cdiv(rows - G, own)) * B * H
        splits = configs.splits(programs, triton.cdiv(reads, other), self.query)
        results = self.query.new_empty((splits, B, H, rows), dtype=torch.float32)
        if programs > 0:
            launch.launch(
                kernel, programs * splits, self.query, *self.tensors, *args, results, *self.strides,
                *self.bias_values, splits, H, B * H, G, Lq, self.key.shape[2], scale,
                SHAPE=flash.shape(D, launch.alignment(self.query, self.key)), PRECISION=launch.precision(),
                **tiles, **settings,
            )  # fmt: skip
        return results

    def _turned(self) -> dict[str, int]:
        """The tiles with keys and queries in each other's place."""
        return {**self.tiles, "BLOCK_Q": self.tiles["BLOCK_K"], "BLOCK_K": self.tiles["BLOCK_Q"]}
