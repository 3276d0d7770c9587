"""Patterns of attention as constructors of :class:`vattn.BlockLayout`: random, strided and dense."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vattn import _checks
from vattn._layout_checks import count_blocks


class Patterns:
    """What :class:`vattn.BlockLayout` inherits."""

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
    def local_random(
        cls,
        num_tokens: int,
        block_size: int,
        *,
        num_local: int = 1,
        num_random: int = 3,
        num_global: int = 1,
        wrap: bool = True,
        generator: torch.Generator | None = None,
        draws: Tensor | None = None,
    ) -> Self:
        """Each block reads its neighbours, then some random blocks in ascending order.

        Cheap enough for a new one in every step. The random blocks are those with the largest of uniform random
        numbers, where the neighbours have 0: they are drawn again only where there are not enough others.

        Args:
            num_tokens, block_size, num_global: as of the layout.
            num_local: how many neighbouring blocks, the block itself in their middle: 0 or odd.
            num_random: how many random blocks, at most as many as there are blocks.
            wrap: whether the first and the last block are neighbours. If they are, few blocks with many neighbours have
                some of them twice; if not, the blocks at the ends have fewer.
            generator: where the random numbers come from, and the device of the layout; None for torch's on the CPU.
            draws: ``(M, M)`` random numbers above 0 instead, M being the number of blocks, on the device of the layout.

        Source:
            Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on edge sparsity.

        Example:
            >>> layout = vattn.BlockLayout.local_random(8 * 196, 56)
            >>> layout.num_blocks, round(layout.density, 3)
            (28, 0.144)
        """
        op = "BlockLayout.local_random"
        M = count_blocks(op, num_tokens, block_size, num_global)
        _checks.integer(op, "num_local", num_local, least=0)
        _checks.integer(op, "num_random", num_random, least=0)
        if num_local % 2 == 0 and num_local > 0:
            raise ValueError(f"{op}: num_local must be 0 or odd, got num_local={num_local}")
        if num_random > M:
            raise ValueError(
                f"{op}: num_random must be at most the number of blocks ({M}), got num_random={num_random}"
            )
        if draws is None:
            device = torch.device("cpu") if generator is None else generator.device
            draws = torch.empty(M, M, dtype=torch.float32, device=device).uniform_(generator=generator)
        elif draws.shape != (M, M):
            raise ValueError(f"{op}: draws must have shape ({M}, {M}), got draws.shape={tuple(draws.shape)}")
        device = draws.device
        rows = torch.arange(M, device=device)[:, None]
        reach = num_local // 2
        local = rows + torch.arange(-reach, reach + num_local % 2, device=device)
        if wrap:
            local = local % M if M > 0 else local
            random = _largest(draws.scatter(1, local, 0.0), num_random)
            columns = torch.cat([local, random], 1)
            offsets = torch.arange(M + 1, device=device) * columns.shape[1]
        else:
            near = (rows - rows.T).abs() < reach + num_local % 2
            random = _largest(draws.masked_fill(near, 0.0), num_random)
            outside = 2 * sum(min(r, M) for r in range(1, reach + 1))
            columns, offsets = _drop_outside(torch.cat([local, random], 1), outside)
        return cls(num_tokens, block_size, offsets, columns.view(-1), num_global=num_global, check_values=False)

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
        blocks = _grid_of_blocks(op, grid, block_size)
        _checks.integer(op, "num_local_blocks", num_local_blocks, least=0)
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

    @classmethod
    def dense(cls, num_tokens: int, block_size: int, *, num_global: int = 0) -> Self:
        """Every block reads every block; on the CPU."""
        M = count_blocks("BlockLayout.dense", num_tokens, block_size, num_global)
        blocks = torch.arange(M + 1, device="cpu")
        offsets, columns = blocks * M, blocks[:M].repeat(M)
        return cls(num_tokens, block_size, offsets, columns, num_global=num_global, check_values=False)


def _largest(draws: Tensor, count: int) -> Tensor:
    """The places of the `count` largest numbers of each row, ascending."""
    return draws.topk(count).indices.sort().values


def _drop_outside(columns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows ``(M, slots)`` without the `count` entries that are not blocks, as columns and row offsets.

    The count is known, which indexing with a mask would have to find out.
    """
    inside = (columns >= 0) & (columns < columns.shape[0])
    order = (~inside).view(-1).int().argsort(stable=True)[: columns.numel() - count]
    return columns.view(-1)[order], torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))


def _grid_of_blocks(op: str, grid: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The grid of tokens in blocks: trailing axes are merged until they hold more than a block, and are cut."""
    if not isinstance(grid, (list, tuple)) or not grid:
        raise TypeError(f"{op}: grid must be a tuple of at least one int, got grid={grid!r}")
    for size in grid:
        _checks.integer(op, "an axis of grid", size, least=1)
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
