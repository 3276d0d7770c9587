"""Hooks for rows that are tokens of (B, H, tokens, D), and calls that share out what they read among splits.

A row is its place in its tensor and its number, the same for queries::

    place     0      BLOCK                      Lq
    tile      |--------|--------|--------|------ :
    split     |       0         |       1        |       of what another tile reads
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vattn.kernels import attention, configs, flash, launch, merge_attention
from vattn.kernels.launch import unpack


@triton.jit
def own_tile(rows, heads, BLOCK: tl.constexpr):
    """What this program owns: batch * H + head, the split, and the first row of its tile."""
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
def whole_tiles(first, last, BLOCK: tl.constexpr):
    """What the driver's `span` returns."""
    return first, last - (last - first) % BLOCK, last


@triton.jit
def lanes(group, BLOCK: tl.constexpr):
    """The lanes of a tile."""
    return tl.arange(0, BLOCK)


@triton.jit
def locate_queries(start, lane, last, group, I: tl.constexpr, WHOLE: tl.constexpr):
    """Queries, which are their own numbers."""
    return start + lane, start + lane


@triton.jit
def span_queries(group, BLOCK: tl.constexpr, I: tl.constexpr):
    """The queries of the split."""
    return whole_tiles(group[0], group[1], BLOCK)


@triton.jit
def own_plain(first, last, group, BLOCK: tl.constexpr):
    """Rows that are their own numbers."""
    row = first + tl.arange(0, BLOCK)
    return row, row


@triton.jit
def offsets(row, strides, SHAPE: tl.constexpr):
    """Offsets of rows within their batch and head."""
    return flash.index(row[0], SHAPE) * unpack(strides, 2)


@triton.jit
def number(row, group):
    """What dropout and lse count."""
    return row[1]


class SplitCall(attention.Call):
    """A call whose queries share out their keys among splits."""

    def splits(self, tiles: int, reads: int, other: int) -> int:
        """Among how many programs to share out the `reads` rows that each of `tiles` reads, `other` at a time."""
        return configs.splits(tiles * self.heads, launch.cdiv(reads, other), self.query)

    def forward_splits(self, pass_: tuple[attention.Part, int]) -> tuple[Tensor, Tensor]:
        """The output and lse, merged out of those of splits."""
        part, splits = pass_
        outs, lses = launch.partial(self.query, splits), launch.sums(self.query, splits)
        self.forward(part, outs, lses)
        return (outs[0], lses[0]) if splits == 1 else merge_attention.merge_splits(outs, lses, self.query.dtype)

    def jvp_splits(
        self, pass_: tuple[attention.Part, int], query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor],
        out: Tensor, lse: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The tangents of the output and lse, added up out of those of splits."""
        part, splits = pass_
        douts, dlses = launch.partial(self.query, splits), launch.sums(self.query, splits)
        self.jvp(part, query, keys, values, out, lse, douts, dlses)
        return launch.total(douts, self.query), dlses[0] if splits == 1 else dlses.sum(0)
