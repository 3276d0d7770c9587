"""Block layouts and position biases for tests of whatever takes them."""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from vattn import BlockLayout, RelativePositionBias3D

EMPTY = torch.empty(0, dtype=torch.int64)


@st.composite
def layouts(
    draw: st.DrawFn, heads: int = 1, max_blocks: int = 5, max_block_size: int = 9, samples: int = 1,
    orders: bool = False,
) -> BlockLayout:  # fmt: skip
    """Any layout of a few blocks: empty rows, repeated blocks, short blocks, rows per head or per sample.

    With `orders` perhaps blocks of any tokens, or none, instead of consecutive ones.
    """
    block_size = draw(st.integers(1, max_block_size), label="block_size")
    order = None
    if orders and draw(st.booleans(), label="order"):
        sizes = draw(st.lists(st.integers(0, block_size), max_size=max_blocks), label="tokens of blocks")
        order = random_order(sizes, block_size)
        num_tokens, blocks = sum(sizes), len(sizes)
    else:
        num_tokens = draw(st.integers(0, max_blocks * block_size), label="num_tokens")
        blocks = -(-num_tokens // block_size)
    sets = [draw(st.sampled_from([1, count]), label=label) for count, label in ((samples, "samples"), (heads, "sets"))]
    block = st.integers(0, max(blocks - 1, 0))
    rows = math.prod(sets) * blocks
    lists = draw(st.lists(st.lists(block, max_size=blocks + 2), min_size=rows, max_size=rows), label="rows")
    num_global = draw(st.integers(0, 3), label="num_global")
    return layout_of(lists, num_tokens, block_size, num_global, sets[1], sets[0], order)


def random_order(sizes: Sequence[int], block_size: int) -> Tensor:
    """An order whose blocks have so many tokens each, drawn by torch's generator."""
    blocks = torch.randperm(sum(sizes)).split(list(sizes))
    return torch.cat([torch.nn.functional.pad(x, (0, block_size - len(x)), value=-1) for x in blocks] or [EMPTY])


def layout_of(
    rows: list[list[int]], num_tokens: int, block_size: int, num_global: int = 0, sets: int = 1, samples: int = 1,
    order: Tensor | None = None,
) -> BlockLayout:  # fmt: skip
    """The layout with these rows: of the first sample those of the first head, then those of the second, and so on."""
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    blocks = len(rows) // (sets * samples)
    offsets = torch.stack([ends[i * blocks : (i + 1) * blocks + 1] for i in range(sets * samples)])
    columns = torch.tensor([column for row in rows for column in row], dtype=torch.int64)
    offsets = offsets.view(samples, sets, blocks + 1)
    return BlockLayout(num_tokens, block_size, offsets, columns, num_global=num_global, order=order)


def bias_without_table(window: tuple[int, int, int], num_heads: int, num_global: int = 1) -> RelativePositionBias3D:
    """A bias module whose `table` a test sets: to the result of something, say, which a parameter may not be."""
    bias = RelativePositionBias3D(window, num_heads, num_global)
    del bias.table
    return bias
