"""Pictures of block layouts: see :meth:`vattn.BlockLayout.plot`."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vattn import _checks
from vattn._extras import needs
from vattn._layout_tiles import check_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vattn.layout import BlockLayout

OP = "BlockLayout.plot"
MOST_CELLS = 512
"""Into how many cells a side of a picture is divided at most: what has more blocks is drawn as means of several."""


def plot(layout: "BlockLayout", path: str | os.PathLike[str], grid: Sequence[int] | None, query: int | None) -> None:
    """The definition of :meth:`vattn.BlockLayout.plot`."""
    if grid is None and query is not None:
        raise ValueError(f"{OP}: query must come with a grid, got query={query}")
    if grid is not None:
        grid = check_grid(OP, grid)
        if len(grid) > 3 or math.prod(grid) != layout.num_tokens:
            raise ValueError(
                f"{OP}: grid must have at most three axes and the layout's {layout.num_tokens} tokens, got grid={grid}"
            )
        if query is None:
            query = 0
            for size in grid:
                query = query * size + size // 2
        _checks.integer(OP, "query", query, least=0)
        if query >= layout.num_tokens:
            raise ValueError(f"{OP}: query must be below {layout.num_tokens}, got query={query}")
    layout = layout.to("cpu")
    figure = _blocks(layout) if grid is None or query is None else _frames(layout, grid, query)
    figure.savefig(path)


def _blocks(layout: "BlockLayout") -> "Figure":
    """A panel per set of rows, in it a cell per pair of blocks, as large as these have tokens."""
    with needs(OP, "plot"):
        from matplotlib.figure import Figure

    S, L, G = layout.num_samples, layout.num_heads, layout.num_global
    shares, sizes = _cells(layout)
    edges = [0, *(G + sizes.cumsum(0)).tolist()]
    if G > 0:
        shares = torch.nn.functional.pad(shares, (1, 0, 1, 0), value=1.0)
        edges = [0, G, *edges[1:]]
    most = max(1.0, float(shares.max())) if shares.numel() > 0 else 1.0
    lines = {"edgecolors": "white", "linewidth": 0.3} if len(edges) <= 64 else {}
    figure = Figure(figsize=(4 * L, 4 * S), layout="constrained")
    panels = figure.subplots(S, L, squeeze=False)
    for sample in range(S):
        for head in range(L):
            axes = panels[sample, head]
            axes.pcolormesh(edges, edges, shares[sample * L + head].numpy(), cmap="Blues", vmin=0, vmax=most, **lines)
            axes.set(xlabel="key", aspect="equal", title=_title(layout, sample, head))
            axes.invert_yaxis()
            axes.set_ylabel("query" if head == 0 else "")
    return figure


def _title(layout: "BlockLayout", sample: int, head: int) -> str:
    return ", ".join(
        f"{name} {index}"
        for name, index, count in (("sample", sample, layout.num_samples), ("head", head, layout.num_heads))
        if count > 1
    )


def _cells(layout: "BlockLayout") -> tuple[Tensor, Tensor]:
    """How often the tokens of a cell read those of another on average ``(S * L, cells, cells)``; tokens per cell.

    A cell is a block, or several consecutive ones if there are more than MOST_CELLS.
    """
    sets, M = layout.num_samples * layout.num_heads, layout.num_blocks
    blocks_per_cell = max(1, math.ceil(M / MOST_CELLS))
    cells = math.ceil(M / blocks_per_cell)
    sizes = layout._block_sizes().double()
    cell = torch.arange(M, device=sizes.device) // blocks_per_cell
    of_cells = sizes.new_zeros(cells).index_add_(0, cell, sizes)
    row, column = layout._row_of_each_entry(), layout.columns.long()
    block = row % max(M, 1)
    place = (row // max(M, 1) * cells + cell[block]) * cells + cell[column]
    pairs = sizes.new_zeros(sets * cells * cells)
    pairs.index_add_(0, place, sizes[block] * sizes[column])
    some = of_cells > 0  # of blocks without tokens there is nothing to draw
    of_cells = of_cells[some]
    shares = pairs.view(sets, cells, cells)[:, some][..., some] / (of_cells[:, None] * of_cells)
    return shares, of_cells.long()


def _frames(layout: "BlockLayout", grid: Sequence[int], query: int) -> "Figure":
    """A panel per frame, in it a cell per token: what the block of `query` reads, and that block itself."""
    with needs(OP, "plot"):
        from matplotlib.figure import Figure

    frames, height, width = (1,) * (3 - len(grid)) + tuple(grid)
    state = _read_by(layout, query).view(frames, height, width)
    columns = min(frames, 8)
    rows = -(-frames // columns)
    scale = min(2.0, 16 / columns)
    size = (scale * columns, (scale * min(4.0, height / width) + 0.3) * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for frame, axes in enumerate(panels):
        axes.set(xticks=[], yticks=[])
        if frame >= frames:
            axes.set_axis_off()
            continue
        axes.pcolormesh(state[frame].numpy(), cmap="Blues", vmin=0, vmax=2)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_title(f"frame {frame}" if frames > 1 else "", fontsize=8)
        if query // (height * width) == frame:
            row, column = divmod(query % (height * width), width)
            axes.plot(column + 0.5, row + 0.5, "o", color="tab:orange", markersize=6)
    return figure


def _read_by(layout: "BlockLayout", query: int) -> Tensor:
    """``(N,)``, by the first set of rows: 2 in the block of `query`, 1 where that one reads, and 0 elsewhere."""
    block_of = layout._block_of_tokens()
    block = int(block_of[query])
    offsets = layout.row_offsets.flatten(0, -2)[0]
    read = torch.zeros(layout.num_blocks, dtype=torch.bool, device=block_of.device)
    read[layout.columns[offsets[block] : offsets[block + 1]].long()] = True
    state = read[block_of].int()
    return torch.where((block_of == block) & read[block_of], 2, state)
