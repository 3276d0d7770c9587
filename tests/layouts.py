"""Block layouts and position biases for tests of whatever takes them."""

import torch
from hypothesis import strategies as st

from vattn import BlockLayout, RelativePositionBias3D


@st.composite
def layouts(draw: st.DrawFn, heads: int = 1, max_blocks: int = 5, max_block_size: int = 9) -> BlockLayout:
    """Any layout of a few blocks: empty rows, repeated blocks, a short last block, rows per head."""
    block_size = draw(st.integers(1, max_block_size), label="block_size")
    num_tokens = draw(st.integers(0, max_blocks * block_size), label="num_tokens")
    blocks = -(-num_tokens // block_size)
    sets = draw(st.sampled_from([1, heads]), label="sets of rows")
    block = st.integers(0, max(blocks - 1, 0))
    row = st.lists(block, max_size=blocks + 2)
    rows = draw(st.lists(row, min_size=sets * blocks, max_size=sets * blocks), label="rows")
    return layout_of(rows, num_tokens, block_size, num_global=draw(st.integers(0, 3), label="num_global"), sets=sets)


def layout_of(
    rows: list[list[int]], num_tokens: int, block_size: int, num_global: int = 0, sets: int = 1
) -> BlockLayout:
    """The layout with these rows: those of the first head, then those of the second, and so on."""
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    blocks = len(rows) // sets
    offsets = torch.stack([ends[head * blocks : (head + 1) * blocks + 1] for head in range(sets)])
    columns = torch.tensor([column for row in rows for column in row], dtype=torch.int64)
    return BlockLayout(num_tokens, block_size, offsets, columns, num_global=num_global)


def bias_without_table(window: tuple[int, int, int], num_heads: int, num_global: int = 1) -> RelativePositionBias3D:
    """A bias module whose `table` a test sets: to the result of something, say, which a parameter may not be."""
    bias = RelativePositionBias3D(window, num_heads, num_global)
    del bias.table
    return bias
