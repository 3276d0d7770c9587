"""Which blocks of tokens a block of tokens reads: the edges of :func:`vattn.edge_sparse_attention`.

A sequence is G global tokens, then N others in M blocks of `block_size`, of which the last may be short. Row i of the
layout lists the blocks that block i reads; global tokens read everything, and everything reads them::

    num_global=1, 4 blocks        g 0 1 2 3
                              g   x x x x x
                              0   x x . x .        row 0: [0, 2]
                              1   x . x . .        row 1: [1]
                              2   x . . x x        row 2: [2, 3]
                              3   x . . . .        row 3: []
"""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vattn import _checks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Found:
    """What was found out, as attributes: of a dict, a trace finds those entries only that were there when it began."""


class BlockLayout:
    """Compressed rows of blocks, for all heads or one set per head.

    A layout is immutable: whatever changes it makes another one. Two are equal if they list the same blocks in the same
    order.

    Args:
        num_tokens: N, how many tokens are not global.
        block_size: how many tokens a block has; the last one has the rest.
        row_offsets: ``(M + 1,)`` or ``(L, M + 1)`` int32 or int64, M = ceil(N / block_size), L = 1 for all heads or
            one per head: row i of head l is ``columns[row_offsets[l, i] : row_offsets[l, i + 1]]``.
        columns: ``(nnz,)`` int32 or int64, the blocks that are read. A block that is listed twice counts twice.
        num_global: G, how many global tokens come first.
        check_values: False leaves out the checks of what the tensors hold, which wait for their device.

    Attributes:
        row_offsets: ``(L, M + 1)`` int32.
        columns: ``(nnz,)`` int32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Example:
        >>> layout = BlockLayout(10, 4, torch.tensor([0, 2, 3, 3]), torch.tensor([0, 2, 1]))
        >>> layout
        BlockLayout(num_tokens=10, block_size=4, num_global=0, num_blocks=3, num_heads=1, nnz=3, device=cpu)
        >>> layout.to_mask()[::4].int()                            # the first query of each block
        tensor([[1, 1, 1, 1, 0, 0, 0, 0, 1, 1],
                [0, 0, 0, 0, 1, 1, 1, 1, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """

    num_tokens: int
    block_size: int
    num_global: int
    row_offsets: Tensor
    columns: Tensor
    _transposed: "BlockLayout | None" = None
    _plans: Found
    """What :mod:`vattn.distributed` has found out about this layout; it is not copied, nor saved."""

    def __init__(
        self,
        num_tokens: int,
        block_size: int,
        row_offsets: Tensor,
        columns: Tensor,
        *,
        num_global: int = 0,
        check_values: bool = True,
    ) -> None:
        op = "BlockLayout"
        blocks = _count_blocks(op, num_tokens, block_size, num_global)
        _checks.index_tensor(op, "row_offsets", row_offsets)
        _checks.index_tensor(op, "columns", columns)
        if row_offsets.dim() not in (1, 2) or row_offsets.shape[-1] != blocks + 1 or row_offsets.shape[0] == 0:
            raise ValueError(
                f"{op}: row_offsets must have shape ({blocks + 1},) or (L, {blocks + 1}), "
                f"got row_offsets.shape={tuple(row_offsets.shape)}"
            )
        if columns.dim() != 1:
            raise ValueError(f"{op}: columns must have shape (nnz,), got columns.shape={tuple(columns.shape)}")
        if columns.device != row_offsets.device:
            raise ValueError(
                f"{op}: columns must be on the device of row_offsets ({row_offsets.device}), "
                f"got columns.device={columns.device}"
            )
        row_offsets = row_offsets.reshape(-1, blocks + 1)
        if check_values:
            _check_values(op, row_offsets, columns, blocks)
        # What was checked must stay so, whatever the caller writes into the tensors later: hence the copy. What was not
        # must not wrap to a number that is right.
        row_offsets, columns = (
            x.clamp(-1, 2**31 - 1).to(torch.int32, copy=check_values).contiguous() for x in (row_offsets, columns)
        )
        for name, value in (
            ("num_tokens", num_tokens),
            ("block_size", block_size),
            ("num_global", num_global),
            ("row_offsets", row_offsets),
            ("columns", columns),
            ("_plans", Found()),
        ):
            object.__setattr__(self, name, value)

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
    ) -> "BlockLayout":
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
            >>> layout = BlockLayout.local_random(8 * 196, 56)
            >>> layout.num_blocks, round(layout.density, 3)
            (28, 0.144)
        """
        op = "BlockLayout.local_random"
        M = _count_blocks(op, num_tokens, block_size, num_global)
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
    def strided(
        cls, grid: Sequence[int], block_size: int, *, num_local_blocks: int = 4, causal: bool = True
    ) -> "BlockLayout":
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
            >>> BlockLayout.strided((4, 4, 4), 8, num_local_blocks=1).to_mask()[::8, ::8].int()
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
    def dense(cls, num_tokens: int, block_size: int, *, num_global: int = 0) -> "BlockLayout":
        """Every block reads every block; on the CPU."""
        M = _count_blocks("BlockLayout.dense", num_tokens, block_size, num_global)
        blocks = torch.arange(M + 1, device="cpu")
        offsets, columns = blocks * M, blocks[:M].repeat(M)
        return cls(num_tokens, block_size, offsets, columns, num_global=num_global, check_values=False)

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int, num_global: int = 0) -> "BlockLayout":
        """The layout of a mask: the inverse of :meth:`to_mask`.

        Args:
            mask: bool ``(G+N, G+N)``, or ``(H, G+N, G+N)`` for a layout per head: who reads whom. Within a block of
                queries and a block of keys it is constant, and it is True for global tokens on either side.
            block_size, num_global: as of the layout.

        Example:
            >>> tokens = torch.arange(12)
            >>> window = (tokens[:, None] // 4 - tokens // 4).abs() <= 1
            >>> BlockLayout.from_mask(window, block_size=4).columns
            tensor([0, 1, 0, 1, 2, 1, 2], dtype=torch.int32)
        """
        op = "BlockLayout.from_mask"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"mask.dtype={mask.dtype}" if isinstance(mask, Tensor) else f"mask={type(mask).__name__}"
            raise TypeError(f"{op}: mask must be a bool tensor, got {got}")
        per_head = mask[None] if mask.dim() == 2 else mask
        if per_head.dim() != 3 or mask.shape[-1] != mask.shape[-2] or per_head.shape[0] == 0:
            raise ValueError(
                f"{op}: mask must have shape (G+N, G+N) or (H, G+N, G+N), got mask.shape={tuple(mask.shape)}"
            )
        N = mask.shape[-1] - num_global
        M = _count_blocks(op, N, block_size, num_global)
        if not (mask[..., :num_global, :].all() and mask[..., :num_global].all()):
            raise ValueError(f"{op}: mask must be True for global tokens, got num_global={num_global}")
        local = per_head[:, num_global:, num_global:]
        size = min(block_size, max(N, 1))
        blocks = (local.shape[0], M, size, M, size)
        rest = M * size - N
        some, every = (
            torch.nn.functional.pad(local, (0, rest, 0, rest), value=value).view(blocks) for value in (False, True)
        )
        reads = some.any(4).any(2)
        if not torch.equal(reads, every.all(4).all(2)):
            raise ValueError(f"{op}: mask must be constant within blocks, got a block of {block_size} that is not")
        return cls._from_blocks(N, block_size, reads, num_global)

    @classmethod
    def from_block_mask(cls, block_mask: "BlockMask") -> "BlockLayout":
        """The blocks of a mask of FlexAttention, for all samples alike.

        Blocks of which its `mask_mod` leaves a part are read whole: what is left of a causal mask,
        ``edge_sparse_attention(..., causal=True)`` does.

        Args:
            block_mask: with square blocks, as many queries as keys, and a batch of 1.

        Example:
            >>> from torch.nn.attention.flex_attention import create_block_mask
            >>> mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 300, 300, device="cpu")
            >>> layout = BlockLayout.from_block_mask(mask)
            >>> layout.num_tokens, layout.block_size, layout.columns
            (300, 128, tensor([0, 0, 1, 0, 1, 2], dtype=torch.int32))
        """
        from torch.nn.attention.flex_attention import BlockMask

        op = "BlockLayout.from_block_mask"
        if not isinstance(block_mask, BlockMask):
            raise TypeError(f"{op}: block_mask must be a BlockMask, got block_mask={type(block_mask).__name__}")
        for name, (of_queries, of_keys) in (
            ("BLOCK_SIZE", block_mask.BLOCK_SIZE),
            ("seq_lengths", block_mask.seq_lengths),
        ):
            if of_queries != of_keys:
                raise ValueError(
                    f"{op}: block_mask.{name} must be the same for queries and keys, "
                    f"got block_mask.{name}={(of_queries, of_keys)}"
                )
        if block_mask.kv_num_blocks.shape[0] != 1:
            raise ValueError(f"{op}: block_mask must be for a batch of 1, got block_mask.shape={block_mask.shape}")
        reads = _listed_blocks(block_mask.kv_num_blocks[0], block_mask.kv_indices[0])
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            reads |= _listed_blocks(block_mask.full_kv_num_blocks[0], block_mask.full_kv_indices[0])
        return cls._from_blocks(block_mask.seq_lengths[0], block_mask.BLOCK_SIZE[0], reads)

    @classmethod
    def _from_blocks(cls, num_tokens: int, block_size: int, reads: Tensor, num_global: int = 0) -> "BlockLayout":
        """The layout of a bool ``(L, M, M)``: which block reads which, in ascending order."""
        L, M = reads.shape[:2]
        ends = reads.sum(2).view(-1).cumsum(0)
        offsets = torch.nn.functional.pad(ends, (1, 0))[_row_starts(L, M, reads.device)]
        return cls(num_tokens, block_size, offsets, reads.nonzero()[:, 2], num_global=num_global, check_values=False)

    @property
    def _look(self) -> tuple[Any, ...]:
        """See :mod:`vattn._looks`."""
        rows = self.row_offsets
        return self.num_tokens, self.block_size, self.num_global, rows.shape, rows.device

    @property
    def num_blocks(self) -> int:
        """M, the number of blocks."""
        return self.row_offsets.shape[1] - 1

    @property
    def num_heads(self) -> int:
        """L: 1 where all heads share their rows, else the number of heads."""
        return self.row_offsets.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.columns.device

    @property
    def density(self) -> float:
        """How many pairs of tokens are computed, a block that is listed twice counted twice, per pair that there is."""
        total = self.num_global + self.num_tokens
        if total == 0:
            return 0.0
        sizes = self._block_sizes().double()
        local = float(sizes @ self.block_counts().double().mean(0) @ sizes)
        return (local + total**2 - self.num_tokens**2) / total**2

    def transpose(self) -> "BlockLayout":
        """The layout whose row j lists the blocks that read block j, each as often as it reads it; built once."""
        if self._transposed is None:
            object.__setattr__(self, "_transposed", self._transpose())
        return self._transposed  # type: ignore[return-value]

    def _transpose(self) -> "BlockLayout":
        L, M = self.num_heads, self.num_blocks
        row = self._row_of_each_entry()
        head = row // max(M, 1)
        keys, order = (head * M + self.columns).sort(stable=True)
        return BlockLayout(
            self.num_tokens,
            self.block_size,
            torch.searchsorted(keys, _row_starts(L, M, self.device)),
            (row - head * M)[order],
            num_global=self.num_global,
            check_values=False,
        )

    def to(self, device: torch.device | str) -> "BlockLayout":
        """This layout on `device`; itself if it is there."""
        rows, columns = self.row_offsets.to(device), self.columns.to(device)
        if columns is self.columns:
            return self
        return BlockLayout(
            self.num_tokens, self.block_size, rows, columns, num_global=self.num_global, check_values=False
        )

    def block_counts(self) -> Tensor:
        """``(L, M, M)`` int64: how many times each block reads each block."""
        L, M = self.num_heads, self.num_blocks
        entries = self._row_of_each_entry() * M + self.columns
        counts = torch.zeros(L * M * M, dtype=torch.int64, device=self.device)
        return counts.index_add_(0, entries, torch.ones_like(entries)).view(L, M, M)

    def token_counts(self) -> Tensor:
        """``(L, G+N, G+N)`` int64: how many times each token reads each token. Dense: for looking and for tests."""
        block = torch.arange(self.num_tokens, device=self.device) // self.block_size
        G = self.num_global
        return torch.nn.functional.pad(self.block_counts()[:, block[:, None], block], (G, 0, G, 0), value=1)

    def to_mask(self) -> Tensor:
        """Bool ``(G+N, G+N)``, or ``(H, G+N, G+N)`` for a layout per head: who reads whom. Dense, as above."""
        mask = self.token_counts() > 0
        return mask[0] if self.num_heads == 1 else mask

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw who reads whom into the picture `path`, a panel per set of rows. Needs matplotlib."""
        from matplotlib.figure import Figure

        counts = self.block_counts().cpu()
        edges = [0, *range(self.num_global, self.num_global + self.num_tokens, self.block_size)]
        edges = sorted({*edges, self.num_global + self.num_tokens})
        if self.num_global > 0:
            counts = torch.nn.functional.pad(counts, (1, 0, 1, 0), value=1)
        most = counts.max() if counts.numel() > 0 else 1
        figure = Figure(figsize=(4 * self.num_heads, 4), layout="constrained")
        for head, axes in enumerate(figure.subplots(1, self.num_heads, squeeze=False)[0]):
            axes.pcolormesh(
                edges, edges, counts[head].numpy(), cmap="Blues", vmin=0, vmax=most, edgecolors="white", linewidth=0.3
            )
            axes.set(xlabel="key", aspect="equal", title=f"head {head}" if self.num_heads > 1 else "")
            axes.invert_yaxis()
            axes.set_ylabel("query" if head == 0 else "")
        figure.savefig(path)

    def _block_sizes(self) -> Tensor:
        """``(M,)`` int64: how many tokens each block has."""
        starts = torch.arange(self.num_blocks, device=self.device) * self.block_size
        return (self.num_tokens - starts).clamp(max=self.block_size)

    def _row_of_each_entry(self) -> Tensor:
        """``(nnz,)`` int64: the row of each column, counted through all heads."""
        entries = torch.arange(self.columns.numel(), device=self.device)
        return torch.searchsorted(self.row_offsets[:, 1:].reshape(-1).long(), entries, right=True)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"BlockLayout: a layout is immutable, got {name}={value!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"BlockLayout: a layout is immutable, cannot delete {name}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_plans"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _plans=Found())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return (
            self._sizes() == other._sizes()
            and torch.equal(self.row_offsets, other.row_offsets)
            and torch.equal(self.columns, other.columns)
        )

    def __hash__(self) -> int:
        return hash(self._sizes())

    def __repr__(self) -> str:
        names = ("num_tokens", "block_size", "num_global", "num_blocks", "num_heads", "nnz", "device")
        return f"BlockLayout({', '.join(f'{n}={x}' for n, x in zip(names, self._sizes(), strict=True))})"

    def _sizes(self) -> tuple[object, ...]:
        return (
            *(self.num_tokens, self.block_size, self.num_global),
            *(self.num_blocks, self.num_heads, self.columns.numel(), self.device),
        )


def _count_blocks(op: str, num_tokens: int, block_size: int, num_global: int) -> int:
    """How many blocks the tokens that are not global have."""
    _checks.integer(op, "num_tokens", num_tokens, least=0)
    _checks.integer(op, "block_size", block_size, least=1)
    _checks.integer(op, "num_global", num_global, least=0)
    if block_size >= 2**63:
        raise ValueError(f"{op}: block_size must be less than 2**63, got block_size={block_size}")
    return -(-num_tokens // block_size)


def _check_values(op: str, row_offsets: Tensor, columns: Tensor, blocks: int) -> None:
    """The rows follow each other and end with `columns`, and every column is a block."""
    flat = row_offsets.view(-1)
    chained = int(flat[0]) == 0 and int(flat[-1]) == columns.numel() and bool((flat.diff() >= 0).all())
    if not chained or not torch.equal(row_offsets[1:, 0], row_offsets[:-1, -1]):
        raise ValueError(
            f"{op}: row_offsets must grow from 0 to the number of columns ({columns.numel()}), each head's from where "
            f"the last one's ended, got row_offsets={row_offsets.tolist()}"
        )
    outside = (columns < 0) | (columns >= blocks)
    if bool(outside.any()):
        at = int(outside.int().argmax())
        raise ValueError(
            f"{op}: columns must be below the number of blocks ({blocks}), got columns[{at}]={int(columns[at])}"
        )


def _row_starts(heads: int, blocks: int, device: torch.device) -> Tensor:
    """``(L, M + 1)``: the rows of each head, counted through all heads, and the one behind its last."""
    return torch.arange(heads, device=device)[:, None] * blocks + torch.arange(blocks + 1, device=device)


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


def _listed_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """Bool ``(H, M, M)``: the blocks that FlexAttention lists, the first `counts` of each row of `indices`."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    times = torch.zeros_like(indices).scatter_add_(-1, indices.long(), listed.to(indices.dtype))
    return times > 0
