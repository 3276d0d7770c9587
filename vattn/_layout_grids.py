"""Patterns of attention on the grid of a video as constructors of :class:`vattn.BlockLayout`.

Tiles of the grid read windows of tiles (`neighborhood`, `sliding_tile`), pieces of frames read fewer of more distant
frames (`radial`), pieces of lines read those in line with them (`strided`).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vattn import _checks
from vattn._layout_tiles import (
    box_rows,
    check_grid,
    check_sizes,
    count_tiles,
    ends,
    grid_of_blocks,
    none_if_consecutive,
    ranges,
    tile_order,
)


class GridPatterns:
    """What :class:`vattn.BlockLayout` inherits. Each returns a layout on the CPU, whatever the default device is."""

    if TYPE_CHECKING:

        def __init__(
            self,
            num_tokens: int,
            block_size: int,
            row_offsets: Tensor,
            columns: Tensor,
            *,
            num_global: int = 0,
            order: Tensor | None = None,
            check_values: bool = True,
        ) -> None: ...

        @classmethod
        def _from_blocks(cls, num_tokens: int, block_size: int, reads: Tensor, num_global: int = 0) -> Self: ...

    @classmethod
    def neighborhood(
        cls,
        grid: Sequence[int],
        window: Sequence[int],
        *,
        tile: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        num_global: int = 0,
    ) -> Self:
        """Each tile of a grid reads the tiles that the windows around its tokens touch.

        In neighborhood attention a token reads a window of tokens around itself, which at a border is moved inwards, so
        that every token reads as many. Along an axis of n tokens, token i reads w tokens from
        ``min(max(i - w // 2, 0), n - w)`` on. With a `stride`, tokens share the window of the one in the middle of
        theirs: ``min(i // stride * stride + stride // 2, n - 1)`` stands for i.

        A layout is a matter of whole blocks, here tiles of the grid. What is computed is therefore the union of the
        tiles that the windows of a tile's tokens touch: all pairs of tokens of neighborhood attention, and others. It
        is exactly neighborhood attention where all tokens of a tile share a window that consists of whole tiles: with a
        `tile` that divides `grid`, ``stride=tile``, and as `window` odd multiples of `tile` (or whole axes); and,
        slowly, with tiles of one token.

        Args:
            grid: the axes of the tokens, such as (T, H, W) or (H, W); any sizes of at least 1.
            window: how many tokens the window spans along each axis; the whole axis, if that is less.
            tile: how many tokens of each axis make a block; the last tiles along an axis may be cut off. None for 64
                tokens in a line, 8 x 8 or 4 x 4 x 4; at most the whole axis.
            stride: along each axis how many tokens share a window, at most `window`; None for 1.
            num_global: how many global tokens come before those of the grid.

        Returns:
            A layout on the CPU. Its order is that of the tiles, or None if their tokens are consecutive.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

        Source:
            Hassani et al., "Neighborhood Attention Transformer", and "Generalized Neighborhood Attention" for the
            stride: the masks of NATTEN without dilation and causality.

        Example:
            >>> layout = vattn.BlockLayout.neighborhood((8, 16, 16), window=(5, 7, 7), tile=(4, 4, 4))
            >>> layout.num_blocks, layout.block_size, round(layout.density, 2)
            (32, 64, 0.39)
            >>> layout.columns[: layout.row_offsets[0, 1]]                 # what the tile in the corner reads
            tensor([ 0,  1,  4,  5, 16, 17, 20, 21], dtype=torch.int32)
        """
        op = "BlockLayout.neighborhood"
        grid = check_grid(op, grid)
        window = check_sizes(op, "window", window, grid)
        if tile is None:
            tile = _default_tile(op, grid)
        tile = check_sizes(op, "tile", tile, grid)
        stride = check_sizes(op, "stride", (1,) * len(grid) if stride is None else stride, grid)
        if any(step > size for step, size in zip(stride, window, strict=True)):
            raise ValueError(f"{op}: stride must be at most window {window}, got stride={stride}")
        tile = tuple(map(min, tile, grid))
        starts, counts = [], []
        for n, w, t, s in zip(grid, map(min, window, grid), tile, stride, strict=True):
            tokens = torch.arange(n, device="cpu")
            centre = (tokens // s * s + s // 2).clamp(max=n - 1)
            begin = (centre - w // 2).clamp(0, n - w)  # of the window of each token
            first = torch.arange(0, n, t, device="cpu")  # token of each tile
            last = (first + t - 1).clamp(max=n - 1)
            start, stop = begin[first] // t, (begin[last] + w - 1) // t + 1
            starts.append(start)
            counts.append(stop - start)
        return cls._of_tiles(grid, tile, starts, counts, num_global)

    @classmethod
    def sliding_tile(
        cls, grid: Sequence[int], tile: Sequence[int], window: Sequence[int], *, num_global: int = 0
    ) -> Self:
        """Each tile of a grid reads a window of whole tiles around itself.

        At a border the window is moved inwards, so that every tile reads as many tiles: along an axis of n tiles, tile
        i reads w tiles from ``min(max(i - w // 2, 0), n - w)`` on.

        Args:
            grid: the axes of the tokens, such as (T, H, W); any sizes of at least 1.
            tile: how many tokens of each axis make a block, at most the whole axis; the last tiles along an axis may be
                cut off.
            window: how many tiles are read along each axis, odd to have the tile in the middle; the whole axis, if that
                is less. The paper counts it in tokens: (18, 24, 24) there is (3, 3, 3) here with its tile of (6, 8, 8).
            num_global: how many global tokens come before those of the grid.

        Returns:
            A layout on the CPU. Its order is that of the tiles, or None if their tokens are consecutive.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

        Source:
            Zhang et al., "Fast Video Generation with Sliding Tile Attention". An even window reads as many tiles as it
            says, where the official code reads one more; and the last tiles may be cut off, where that needs a `tile`
            that divides `grid`.

        Example:
            >>> layout = vattn.BlockLayout.sliding_tile((30, 48, 80), tile=(6, 8, 8), window=(3, 3, 3))
            >>> layout.num_blocks, layout.block_size, layout.columns.numel() // layout.num_blocks, layout.density
            (300, 384, 27, 0.09)
        """
        op = "BlockLayout.sliding_tile"
        grid = check_grid(op, grid)
        tile = tuple(map(min, check_sizes(op, "tile", tile, grid), grid))
        window = check_sizes(op, "window", window, grid)
        starts, counts = [], []
        for n, size in zip(count_tiles(grid, tile), window, strict=True):
            w = min(size, n)
            starts.append((torch.arange(n, device="cpu") - w // 2).clamp(0, n - w))
            counts.append(torch.full((n,), w, device="cpu"))
        return cls._of_tiles(grid, tile, starts, counts, num_global)

    @classmethod
    def radial(
        cls, grid: Sequence[int], block_size: int, *, decay: float = 1.0, sink: bool = True, num_global: int = 0
    ) -> Self:
        """Each block reads the blocks at about its place in the other frames, fewer of them the more distant the frame.

        A frame is cut, in raster order, into m blocks. Block k of frame i reads block l of frame j if, with
        ``d = abs(i - j)`` and ``r = 2**floor(log2(d)) / (decay * m)``,

        - ``d <= 1``: its own frame and the two beside it are read whole; or
        - ``abs(k - l) + 1 <= 1 / r``: a band, which halves when the distance doubles; or
        - ``k == l`` and ``d % ceil(r) == 0``: where a band would be less than a block, one block in fewer frames; or
        - `sink` and ``j == 0``: everything reads the first frame.

        For T frames of m blocks that makes about ``T * m**2 * log2(T)`` entries, not ``(T * m)**2``.

        Args:
            grid: the axes of the tokens, frames first, such as (T, H, W); any sizes of at least 1.
            block_size: tokens per block; the last block of each frame may be short.
            decay: how wide the bands are, relative to the paper's.
            sink: whether everything reads the first frame.
            num_global: how many global tokens come before those of the grid.

        Returns:
            A layout on the CPU, with an order if `block_size` does not divide a frame.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

        Source:
            Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
            whose mask this is with blocks in the place of tokens: with a `block_size` of 1 it is the paper's. `decay`
            is from its code, which rounds to blocks after the mask is made.

        Example:
            >>> [round(vattn.BlockLayout.radial((frames, 16, 16), 64).density, 2) for frames in (8, 16, 32, 64)]
            [0.7, 0.47, 0.3, 0.18]
        """
        op = "BlockLayout.radial"
        grid = check_grid(op, grid)
        _checks.integer(op, "block_size", block_size, least=1)
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"{op}: decay must be a float, got decay={decay!r}")
        if not 0 < decay < math.inf:
            raise ValueError(f"{op}: decay must be positive and finite, got decay={decay}")
        _checks.boolean(op, "sink", sink)
        frames, size = grid[0], math.prod(grid[1:])
        block_size = min(block_size, size)
        m = -(-size // block_size)
        # For each distance, of how many blocks |k - l| is less than; 0 where the frame is left out.
        reach = torch.tensor([_radial_reach(d, m, decay) for d in range(frames)], device="cpu")

        # The pairs of frames that have entries, frame by frame: those at the distances that have, and the sink.
        near = reach.nonzero()[:, 0]
        offsets = torch.cat([-near[1:].flip(0), near])  # ascending
        frame = torch.arange(frames, device="cpu")
        begin, end = (torch.searchsorted(offsets, x) for x in (-frame, frames - frame))
        query_frame, offset = torch.repeat_interleave(frame, end - begin), offsets[ranges(begin, end - begin)]
        key_frame, width = query_frame + offset, reach[offset.abs()]
        if sink:
            others = key_frame != 0
            query_frame, of_frame = torch.cat([frame, query_frame[others]]).sort(stable=True)
            key_frame = torch.cat([torch.zeros_like(frame), key_frame[others]])[of_frame]
            width = torch.cat([torch.full_like(frame, m), width[others]])[of_frame]

        # For each block of a frame the pairs of its frame; for each of these, the band of blocks around its own place.
        pairs = torch.bincount(query_frame, minlength=frames)
        rows = torch.arange(frames * m, device="cpu")
        pair = ranges((pairs.cumsum(0) - pairs)[rows // m], pairs[rows // m])
        row = torch.repeat_interleave(rows, pairs[rows // m])
        begin = (row % m - width[pair] + 1).clamp(min=0)
        counts = (row % m + width[pair]).clamp(max=m) - begin
        columns = ranges(key_frame[pair] * m + begin, counts)
        lengths = torch.zeros_like(rows).index_add_(0, row, counts)
        order = none_if_consecutive(tile_order((frames, size), (1, block_size)), frames * size)
        return cls(
            frames * size, block_size, ends(lengths), columns, num_global=num_global, order=order, check_values=False
        )

    @classmethod
    def strided(cls, grid: Sequence[int], block_size: int, *, num_local_blocks: int = 4, causal: bool = True) -> Self:
        """Each block reads the blocks near it, and those in line with it along every axis but the last.

        The grid of tokens is cut, in raster order, into a grid of blocks: trailing axes are merged until they hold more
        than a block. It is causal among blocks; within one, that is up to ``edge_sparse_attention(..., causal=True)``.

        Args:
            grid: the axes of the video, such as (T, H, W). There are no global tokens.
            block_size: tokens per block, a divisor of the merged axes.
            num_local_blocks: how many blocks before a block it reads, and, unless `causal`, how many from itself on.
            causal: a block reads only blocks that are not behind it.

        Returns:
            A layout on the CPU, whatever the default device is.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

        Source:
            Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers", whose code has this layout; its
            blocks are those of Child et al., "Generating Long Sequences with Sparse Transformers".

        Example:
            >>> vattn.BlockLayout.strided((4, 4, 4), 8, num_local_blocks=1).to_mask()[::8, ::8].int()
            tensor([[1, 0, 0, 0, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0, 0, 0, 0],
                    [1, 1, 1, 0, 0, 0, 0, 0],
                    [0, 1, 1, 1, 0, 0, 0, 0],
                    [1, 0, 1, 1, 1, 0, 0, 0],
                    [0, 1, 0, 1, 1, 1, 0, 0],
                    [1, 0, 1, 0, 1, 1, 1, 0],
                    [0, 1, 0, 1, 0, 1, 1, 1]], dtype=torch.int32)
        """
        op = "BlockLayout.strided"
        blocks = grid_of_blocks(op, grid, block_size)
        _checks.integer(op, "num_local_blocks", num_local_blocks, least=0)
        _checks.boolean(op, "causal", causal)
        rows = torch.arange(math.prod(blocks), device="cpu")
        distance = rows[:, None] - rows  # of the query's block from the key's
        reads = (distance <= num_local_blocks) & (distance >= 0 if causal else distance > -num_local_blocks)
        if len(blocks) > 1:
            coordinates = torch.stack(torch.unravel_index(rows, blocks))
            differs = coordinates[:, :, None] != coordinates[:, None, :]  # (axes, M, M)
            reads |= (differs.sum(0) <= 1) & ~differs[-1]
        if causal:
            reads &= distance >= 0
        return cls._from_blocks(math.prod(grid), block_size, reads[None])

    @staticmethod
    def tile_order(grid: Sequence[int], tile: Sequence[int]) -> Tensor:
        """The tokens of a grid, tile by tile: an order for layouts of one's own, and for :meth:`top_k`.

        Args:
            grid: the axes of the tokens, such as (T, H, W); any sizes of at least 1.
            tile: how many tokens of each axis make a block.

        Returns:
            ``(M * block_size,)`` int64 on the CPU, `block_size` being the product of `tile`: raster indices of tokens,
            tiles in raster order, and -1 at the end of a tile that the end of the grid cuts off.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

        Example:
            >>> vattn.BlockLayout.tile_order((3, 4), (2, 2)).view(-1, 4)
            tensor([[ 0,  1,  4,  5],
                    [ 2,  3,  6,  7],
                    [ 8,  9, -1, -1],
                    [10, 11, -1, -1]])
        """
        op = "BlockLayout.tile_order"
        grid = check_grid(op, grid)
        return tile_order(grid, check_sizes(op, "tile", tile, grid))

    @classmethod
    def _of_tiles(
        cls, grid: Sequence[int], tile: Sequence[int], starts: Sequence[Tensor], counts: Sequence[Tensor],
        num_global: int,
    ) -> Self:  # fmt: skip
        """The layout of tiles that read a box of tiles each: see :func:`vattn._layout_tiles.box_rows`."""
        offsets, columns = box_rows(starts, counts)
        order = none_if_consecutive(tile_order(grid, tile), math.prod(grid))
        return cls(
            math.prod(grid), math.prod(tile), offsets, columns, num_global=num_global, order=order, check_values=False
        )


def _default_tile(op: str, grid: Sequence[int]) -> tuple[int, ...]:
    """64 tokens in a line, 8 x 8 or 4 x 4 x 4."""
    if len(grid) > 3:
        raise ValueError(f"{op}: tile must be given for a grid of more than three axes, got grid={tuple(grid)}")
    return ((64,), (8, 8), (4, 4, 4))[len(grid) - 1]


def _radial_reach(distance: int, blocks: int, decay: float) -> int:
    """Of how many blocks ``abs(k - l)`` is less than in a frame at this distance; 0 where none is read."""
    if distance <= 1:
        return blocks
    band = 2 ** (distance.bit_length() - 1)
    if band <= decay * blocks:
        return min(blocks, math.floor(decay * blocks / band))
    return int(distance % math.ceil(band / (decay * blocks)) == 0)
