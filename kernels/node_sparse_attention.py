"""Node-sparse attention on the GPU: the itinerary of queries over keys that are listed, and gathered where they lie.

    key      0   1   2   3   4   5   6   7         kept = [5, 1, 2]
    number       1   2           5                 tiles of three keys; the others are not read, and their gradient is 0

A sample may have a length, of as many keys as it reads; what is listed behind them is nobody's, and may be anything.
Few queries share out their keys among splits, and few keys their queries, as in latent attention. The gradient of a
key that is listed twice is twice that of a copy, because the copies are equal, dropout included. An index out of range
is never read: another key takes its place, and the device reports it at the end, without the host waiting for it.
SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import attention, configs, flash, launch
from vattn.kernels.itinerary import Itinerary
from vattn.kernels.launch import unpack
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

# Numbers (Lq, splits, K, Lk), pointers (kept, lengths, how often a kept key is listed); a row is (place in its tensor,
# number, place in the list)


@triton.jit
def listed(kept_ptr, place, mask, Lk):
    """Keys at places of the list."""
    key = flash.load_numbers(kept_ptr + place, mask, 0)
    key = tl.minimum(tl.maximum(key, 0), Lk - 1).to(tl.int32)
    return key, key, place


@triton.jit
def own_queries(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A tile of queries, and a split of the list: ``(first place, last place, list of the sample, Lk)``."""
    Lq, splits, K, Lk, _, _, _, _ = where[1]
    bh, split, first = own_tile(Lq, heads, BLOCK)
    first_place, last_place = share(keys_of_sample(K, where[0][1], bh // H), split, splits, OTHER)
    kept_ptr = where[0][0] + (bh // H).to(tl.int64) * K
    return bh, split, (first_place, last_place, kept_ptr, Lk), first, Lq


@triton.jit
def span_list(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """The places of the split."""
    return whole_tiles(group[0], group[1], BLOCK)


@triton.jit
def locate_listed(start, lane, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """Keys at the places from `start` on."""
    place = start + lane
    if WHOLE:
        return listed(group[2], place, None, group[3])
    else:
        return listed(group[2], place, place < last, group[3])


QUERIES = Itinerary(own_queries, span_list, lanes, locate_listed, offsets, number, mine=own_plain)


@triton.jit
def own_keys(where, H, heads, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """A tile of listed keys, and a split of the queries: ``(first query, last query, list, Lk, sample)``."""
    Lq, splits, K, Lk, _, _, _, _ = where[1]
    bh, split, first = own_tile(K, heads, BLOCK)
    first_query, last_query = share(Lq, split, splits, OTHER)
    before = (bh // H).to(tl.int64) * K
    last = keys_of_sample(K, where[0][1], bh // H)
    return bh, split, (first_query, last_query, where[0][0] + before, Lk, before), first, last


@triton.jit
def own_listed(first, last, group, BLOCK: tl.constexpr):
    """Keys at the places owned."""
    place = first + tl.arange(0, BLOCK)
    return listed(group[2], place, place < last, group[3])


@triton.jit
def times_listed(where, row, mask, group):
    """How often a key is listed."""
    return tl.load(where[0][2] + group[4] + row[2], mask=mask, other=0).to(tl.float32)


@triton.jit
def offsets_in_list(row, strides, SHAPE: tl.constexpr):
    """Offsets of gradients that lie in the order of the list."""
    return flash.index(row[2], SHAPE) * unpack(strides, 2)


KEYS = Itinerary(own_keys, span_queries, lanes, locate_queries, offsets, number, mine=own_listed, times=times_listed)
KEYS_AS_LISTED = dataclasses.replace(KEYS, grad_offsets=offsets_in_list)


def forward(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, kept_lengths: Tensor | None, dropout_p: float,
    seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Lq, D), in memory as (B, Lq, H, D), and the float32 lse (B, H, Lq)."""
    call = Call(query, key, value, kept, kept_lengths, dropout_p, seed, scale)
    return call.forward_splits(call.queries("forward"))


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    kept: Tensor, kept_lengths: Tensor | None, dropout_p: float, seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, the same every time: nothing is added by atomics but integers."""
    call = Call(query, key, value, kept, kept_lengths, dropout_p, seed, scale)
    delta = torch.empty_like(lse)
    part, splits = call.queries("backward_query")
    dqs = launch.partial(query, splits)
    call.backward_query(part, grad_out, grad_lse, out, lse, delta, dqs)
    part, splits = call.listed_keys()
    dk, dv = empty_rows(key).zero_(), empty_rows(value).zero_()
    if splits == 1:
        call.backward_key(part, grad_out, lse, delta, dk[None], dv[None])
    else:
        like = key[:, :, :1].expand(-1, -1, call.K, -1)
        dks, dvs = launch.partial(like, splits), launch.partial(like, splits)
        call.backward_key(part, grad_out, lse, delta, dks, dvs)
        samples = torch.arange(kept.shape[0], device=kept.device)[:, None]
        # Copies of a key have the same gradient: whichever is written last, it is the same.
        for grad, parts in ((dk, dks), (dv, dvs)):
            grad.transpose(1, 2)[samples, call.listed()] = call.rows(parts.sum(0).transpose(1, 2)).to(grad.dtype)
    return launch.total(dqs, query), dk, dv


def jvp(
    query_tangent: Tensor, key_tangent: Tensor, value_tangent: Tensor, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, kept: Tensor, kept_lengths: Tensor | None, dropout_p: float, seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tangents of out and lse."""
    call = Call(query, key, value, kept, kept_lengths, dropout_p, seed, scale)
    return call.jvp_splits(call.queries("jvp"), query_tangent, [key_tangent], [value_tangent], out, lse)


class Call(SplitCall):
    """A call with its list of keys, and how much of it each sample reads."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, kept_lengths: Tensor | None, dropout_p: float,
        seed: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        super().__init__(query, [key], [value], dropout_p, seed, scale)
        Lk, read = key.shape[2], None
        if kept_lengths is not None:
            read = torch.arange(kept.shape[1], device=kept.device) < kept_lengths[:, None]
        if kept.device.type != "meta":
            message = f"node_sparse_attention: kept must be from 0 to below the number of keys ({Lk})"
            exists = (kept >= 0) & (kept < Lk)
            torch._assert_async((exists if read is None else exists | ~read).all(), message)
        self.K = kept.shape[1] if Lk > 0 else 0
        self.kept = kept[:, : self.K].contiguous()
        self.lengths = None if kept_lengths is None else kept_lengths.contiguous()
        self.read = None if read is None else read[:, : self.K]

    def queries(self, phase: str) -> tuple[attention.Part, int]:
        """A program for every tile of queries and every split of the list, and how many splits there are."""
        Lq, tiles = self.query.shape[2], configs.tiles(phase, self.query, self.extras)
        count = launch.cdiv(Lq, tiles["BLOCK_Q"])
        splits = self.splits(count, self.K, tiles["BLOCK_K"])
        numbers, pointers = (Lq, splits, self.K, self.keys[0].shape[2]), (self.kept, self.lengths, None)
        return attention.Part(QUERIES, tiles, count * splits * self.heads, numbers, pointers), splits

    def listed_keys(self) -> tuple[attention.Part, int]:
        """A program for every tile of the list and every split of the queries, and how many splits there are."""
        # Where the keys lie, and how often they are listed, wants registers.
        Lq, tiles = self.query.shape[2], configs.tiles("backward_key", self.query, self.extras + 1)
        count = launch.cdiv(self.K, tiles["BLOCK_K"])
        splits = self.splits(count, Lq, tiles["BLOCK_Q"])
        numbers = Lq, splits, self.K, self.keys[0].shape[2]
        op = KEYS if splits == 1 else KEYS_AS_LISTED
        pointers = self.kept, self.lengths, self._times()
        return attention.Part(op, tiles, count * splits * self.heads, numbers, pointers), splits

    def _times(self) -> Tensor:
        """How often each kept key is listed, (B, K) int32: counted by adding integers, in any order."""
        listed = self.listed()
        counts = listed.new_zeros(listed.shape[0], self.keys[0].shape[2], dtype=torch.int32)
        samples = torch.arange(listed.shape[0], device=listed.device)[:, None]
        ones = counts.new_ones(()) if self.read is None else self.read.int()
        counts.index_put_((samples, listed), ones, accumulate=True)
        return counts.gather(1, listed)

    def listed(self) -> Tensor:
        """The list as the kernels read it, with another key in the place of one that does not exist, or is not read."""
        listed = self.kept.clamp(0, self.keys[0].shape[2] - 1)
        return listed if self.read is None else torch.where(self.read, listed, listed[:, :1])

    def rows(self, x: Tensor) -> Tensor:
        """Rows (B, K, H, D) of :func:`listed`, out of those of the places that are read; 0 if a sample reads none."""
        if self.read is None:
            return x
        read = self.read[..., None, None]
        return torch.where(read, x, torch.where(read[:, :1], x[:, :1], 0))
