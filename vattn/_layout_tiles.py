"""Grids of tokens cut into tiles: the order of their tokens, and rows that list the tiles in a box around each."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vattn import _checks


def check_grid(op: str, grid: object) -> tuple[int, ...]:
    """`grid` as a tuple: a list or tuple of at least one int of at least 1."""
    if not isinstance(grid, (list, tuple)) or not grid:
        raise TypeError(f"{op}: grid must be a tuple of at least one int, got grid={grid!r}")
    for axis, size in enumerate(grid):
        _checks.integer(op, f"grid[{axis}]", size, least=1)
    return tuple(grid)


def check_sizes(op: str, name: str, sizes: object, grid: Sequence[int]) -> tuple[int, ...]:
    """`sizes` as a tuple: one int of at least 1 per axis of `grid`."""
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a tuple of {len(grid)} ints, got {name}={sizes!r}")
    if len(sizes) != len(grid):
        raise ValueError(f"{op}: {name} must have one int per axis of grid ({len(grid)}), got {name}={tuple(sizes)}")
    for axis, size in enumerate(sizes):
        _checks.integer(op, f"{name}[{axis}]", size, least=1)
    return tuple(sizes)


def count_tiles(grid: Sequence[int], tile: Sequence[int]) -> tuple[int, ...]:
    """How many tiles there are along each axis, the last of which may be cut off by the end of the grid."""
    return tuple(-(-size // step) for size, step in zip(grid, tile, strict=True))


def tile_order(grid: Sequence[int], tile: Sequence[int]) -> Tensor:
    """``(M * S,)`` int64: the raster index of each token, tile by tile, and -1 at the end of a tile that is cut off."""
    counts, axes = count_tiles(grid, tile), len(grid)
    tokens = torch.zeros((), dtype=torch.int64, device="cpu")
    inside = torch.ones((), dtype=torch.bool, device="cpu")
    for axis in range(axes):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = counts[axis], tile[axis]
        coordinate = torch.arange(counts[axis] * tile[axis], device="cpu").view(shape)
        tokens = tokens * grid[axis] + coordinate
        inside = inside & (coordinate < grid[axis])
    tokens = tokens.masked_fill(~inside, -1).view(-1, math.prod(tile))
    if math.prod(grid) < tokens.numel():
        last = (tokens < 0).int().argsort(dim=1, stable=True)  # the slots without a token go to the end of their tile
        tokens = tokens.gather(1, last)
    return tokens.view(-1)


def none_if_consecutive(order: Tensor, num_tokens: int) -> Tensor | None:
    """`order`, or None if its blocks are consecutive tokens, as they are without an order."""
    in_raster = torch.equal(order[:num_tokens], torch.arange(num_tokens, device=order.device))
    return None if in_raster else order


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """The numbers ``starts[i], starts[i] + 1, ...``, `counts[i]` of them, for every i."""
    before = counts.cumsum(0) - counts
    numbers = torch.repeat_interleave(starts - before, counts)
    return numbers.add_(torch.arange(numbers.numel(), device=numbers.device))


def box_rows(starts: Sequence[Tensor], counts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Row offsets ``(M + 1,)`` and columns of tiles that read a box of tiles each.

    Along axis a, a tile with coordinate i reads the coordinates from ``starts[a][i]`` on, ``counts[a][i]`` of them.
    Memory grows with the tiles and the entries.
    """
    sizes = [len(start) for start in starts]
    rows = torch.arange(math.prod(sizes), device="cpu")
    columns, lengths = torch.zeros_like(rows), torch.ones_like(rows)
    entries = rows  # the row of each column, as far as its axes go
    for size, start, count, coordinate in zip(sizes, starts, counts, torch.unravel_index(rows, sizes), strict=True):
        times = count[coordinate[entries]]
        columns = ranges(columns * size + start[coordinate[entries]], times)
        entries = torch.repeat_interleave(entries, times)
        lengths = lengths * count[coordinate]
    return ends(lengths), columns


def ends(lengths: Tensor) -> Tensor:
    """``(M + 1,)``: the offsets of rows of these lengths."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def grid_of_blocks(op: str, grid: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The grid of tokens in blocks: trailing axes are merged until they hold more than a block, and are cut."""
    grid = check_grid(op, grid)
    _checks.integer(op, "block_size", block_size, least=1)
    axis = len(grid) - 1
    while axis > 0 and math.prod(grid[axis:]) <= block_size:
        axis -= 1
    merged = math.prod(grid[axis:])
    if merged % block_size != 0:
        raise ValueError(
            f"{op}: block_size must divide the merged trailing axes {grid[axis:]}, got block_size={block_size}"
        )
    return (*grid[:axis], merged // block_size)


def row_starts(sets: int, blocks: int, device: torch.device) -> Tensor:
    """``(sets, M + 1)``: the rows of each set, counted through all sets, and the one behind its last."""
    return torch.arange(sets, device=device)[:, None] * blocks + torch.arange(blocks + 1, device=device)
