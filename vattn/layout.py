"""Which blocks of tokens a block of tokens reads: the edges of :func:`vattn.edge_sparse_attention`.

A sequence is G global tokens, then N others in M blocks of `block_size`, of which the last may be short. Row i of the
layout lists the blocks that block i reads; global tokens read everything, and everything reads them::

    num_global=1, 4 blocks        g 0 1 2 3
                              g   x x x x x
                              0   x x . x .        row 0: [0, 2]
                              1   x . x . .        row 1: [1]
                              2   x . . x x        row 2: [2, 3]
                              3   x . . . .        row 3: []

Blocks are consecutive tokens, or, with an order of tokens, any: here tiles of 2 x 2 of a grid of 3 x 4, of which the
lower two have two tokens and two slots without one::

     0  1 |  2  3        order = [0, 1, 4, 5,   2, 3, 6, 7,   8, 9, -1, -1,   10, 11, -1, -1]
     4  5 |  6  7                 block 0       block 1       block 2         block 3
    ------+------
     8  9 | 10 11
"""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vattn import _checks, _layout_plot
from vattn._layout_checks import blocks_of_order, check_order, check_rows, check_tensors, count_blocks
from vattn._layout_patterns import Patterns
from vattn._layout_tiles import row_starts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Found:
    """What was found out, as attributes: of a dict, a trace finds those entries only that were there when it began."""


class BlockLayout(Patterns):
    """Compressed rows of blocks: for all samples and heads, or a set of rows per head, or per sample and head.

    A layout is immutable: whatever changes it makes another one. Two are equal if they list the same blocks in the same
    order.

    Args:
        num_tokens: N, how many tokens are not global.
        block_size: how many tokens a block has; the last one has the rest.
        row_offsets: ``(M + 1,)``, ``(L, M + 1)`` or ``(S, L, M + 1)`` int32 or int64. L is 1 for all heads or one per
            head, S is 1 for all samples or one per sample: row i of head l of sample s is
            ``columns[row_offsets[s, l, i] : row_offsets[s, l, i + 1]]``.
        columns: ``(nnz,)`` int32 or int64, the blocks that are read. A block that is listed twice counts twice.
        num_global: G, how many global tokens come first.
        order: None for blocks of consecutive tokens, M = ceil(N / block_size). Or ``(M * block_size,)`` int32 or int64:
            slot s of block i holds the token ``order[i * block_size + s]``, counted without the global ones, or -1 for
            none. Every token stands in one slot, -1 at the end of its block; a block may have no token at all. This is
            all that is ordered: queries, keys, values and outputs keep the caller's order, as do positions.
        check_values: False leaves out the checks of what the tensors hold, which wait for their device.

    Attributes:
        row_offsets: int32 ``(L, M + 1)``, or ``(S, L, M + 1)`` if S > 1.
        columns: ``(nnz,)`` int32.
        order: ``(M * block_size,)`` int32, or None.

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
        >>> even_and_odd = torch.tensor([0, 2, 4, 1, 3, -1])       # two blocks, each of which reads itself
        >>> layout = BlockLayout(5, 3, torch.tensor([0, 1, 2]), torch.tensor([0, 1]), order=even_and_odd)
        >>> layout.to_mask()[:2].int()
        tensor([[1, 0, 1, 0, 1],
                [0, 1, 0, 1, 0]], dtype=torch.int32)
    """

    num_tokens: int
    block_size: int
    num_global: int
    row_offsets: Tensor
    columns: Tensor
    order: Tensor | None = None
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
        order: Tensor | None = None,
        check_values: bool = True,
    ) -> None:
        op = "BlockLayout"
        blocks = count_blocks(op, num_tokens, block_size, num_global)
        if order is not None:
            blocks = blocks_of_order(op, order, block_size)
        check_tensors(op, row_offsets, columns, order, blocks)
        if row_offsets.dim() == 1:
            row_offsets = row_offsets[None]
        elif row_offsets.dim() == 3 and row_offsets.shape[0] == 1:
            row_offsets = row_offsets[0]
        if check_values:
            check_rows(op, row_offsets, columns)
            if order is not None:
                check_order(op, order, num_tokens, block_size)

        # What was checked must stay so, whatever the caller writes into the tensors later: hence the copy. What was not
        # must not wrap to a number that is right.
        def kept(x: Tensor, least: int) -> Tensor:
            # A layout that is made there serves in training later.
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                with torch.inference_mode(False):
                    return kept(x.clone(), least)
            return x.clamp(least, 2**31 - 1).to(torch.int32, copy=check_values).contiguous()

        for name, value in (
            ("num_tokens", num_tokens),
            ("block_size", block_size),
            ("num_global", num_global),
            ("row_offsets", kept(row_offsets, -1)),
            ("columns", kept(columns, -1)),
            ("order", None if order is None else kept(order, -2)),
            ("_plans", Found()),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_mask(cls, mask: Tensor, block_size: int, num_global: int = 0) -> "BlockLayout":
        """The layout of a mask: the inverse of :meth:`to_mask`.

        Args:
            mask: bool ``(G+N, G+N)``, ``(H, G+N, G+N)`` for a layout per head, or ``(B, 1 or H, G+N, G+N)`` for one per
                sample: who reads whom. Within a block of queries and a block of keys it is constant, and it is True for
                global tokens on either side.
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
        if mask.dim() not in (2, 3, 4) or mask.shape[-1] != mask.shape[-2] or 0 in mask.shape[:-2]:
            raise ValueError(
                f"{op}: mask must have shape (G+N, G+N), (H, G+N, G+N) or (B, H, G+N, G+N), "
                f"got mask.shape={tuple(mask.shape)}"
            )
        _checks.integer(op, "num_global", num_global, least=0)
        if num_global > mask.shape[-1]:
            raise ValueError(
                f"{op}: num_global must be at most the tokens of mask ({mask.shape[-1]}), got num_global={num_global}"
            )
        N = mask.shape[-1] - num_global
        M = count_blocks(op, N, block_size, num_global)
        if not (mask[..., :num_global, :].all() and mask[..., :num_global].all()):
            raise ValueError(f"{op}: mask must be True for global tokens, got num_global={num_global}")
        local = mask[..., num_global:, num_global:]
        size = min(block_size, max(N, 1))
        blocks = (*(mask.shape[:-2] or (1,)), M, size, M, size)
        rest = M * size - N
        some, every = (
            torch.nn.functional.pad(local, (0, rest, 0, rest), value=value).view(blocks) for value in (False, True)
        )
        reads = some.any(-1).any(-2)
        if not torch.equal(reads, every.all(-1).all(-2)):
            raise ValueError(f"{op}: mask must be constant within blocks, got a block of {block_size} that is not")
        return cls._from_blocks(N, block_size, reads, num_global)

    @classmethod
    def from_block_mask(cls, block_mask: "BlockMask") -> "BlockLayout":
        """The blocks of a mask of FlexAttention.

        Blocks of which its `mask_mod` leaves a part are read whole: what is left of a causal mask,
        ``edge_sparse_attention(..., causal=True)`` does.

        Args:
            block_mask: with square blocks, and as many queries as keys.

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
        reads = _listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            reads |= _listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        return cls._from_blocks(block_mask.seq_lengths[0], block_mask.BLOCK_SIZE[0], reads)

    @classmethod
    def _from_blocks(cls, num_tokens: int, block_size: int, reads: Tensor, num_global: int = 0) -> "BlockLayout":
        """The layout of a bool ``(L, M, M)`` or ``(S, L, M, M)``: which block reads which, in ascending order."""
        *sets, M, _ = reads.shape
        ends = torch.nn.functional.pad(reads.sum(-1).view(-1).cumsum(0), (1, 0))
        offsets = ends[row_starts(math.prod(sets), M, reads.device)].view(*sets, M + 1)
        columns = reads.nonzero()[:, -1]
        return cls(num_tokens, block_size, offsets, columns, num_global=num_global, check_values=False)

    @property
    def _look(self) -> tuple[Any, ...]:
        """See :mod:`vattn._looks`."""
        rows = self.row_offsets
        return self.num_tokens, self.block_size, self.num_global, rows.shape, rows.device, self.order is None

    @property
    def num_blocks(self) -> int:
        """M, the number of blocks."""
        return self.row_offsets.shape[-1] - 1

    @property
    def num_heads(self) -> int:
        """L: 1 where all heads share their rows, else the number of heads."""
        return self.row_offsets.shape[-2]

    @property
    def num_samples(self) -> int:
        """S: 1 where all samples share their rows, else the number of samples."""
        return self.row_offsets.shape[0] if self.row_offsets.dim() == 3 else 1

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
        queries = sizes[self._row_of_each_entry() % max(self.num_blocks, 1)]
        pairs = float(queries @ sizes[self.columns.long()]) / (self.num_samples * self.num_heads)
        return (pairs + total**2 - self.num_tokens**2) / total**2

    def transpose(self) -> "BlockLayout":
        """The layout whose row j lists the blocks that read block j, each as often as it reads it; built once."""
        if self._transposed is None:
            object.__setattr__(self, "_transposed", self._transpose())
        return self._transposed  # type: ignore[return-value]

    def _transpose(self) -> "BlockLayout":
        M = self.num_blocks
        row = self._row_of_each_entry()
        first = row // max(M, 1) * M  # row of its sample and head
        keys, by_column = (first + self.columns).sort(stable=True)
        starts = row_starts(self.row_offsets.numel() // (M + 1), M, self.device).view_as(self.row_offsets)
        return self._with_rows(torch.searchsorted(keys, starts), (row - first)[by_column], self.order)

    def to(self, device: torch.device | str) -> "BlockLayout":
        """This layout on `device`; itself if it is there."""
        columns = self.columns.to(device)
        if columns is self.columns:
            return self
        return self._with_rows(
            self.row_offsets.to(device), columns, None if self.order is None else self.order.to(device)
        )

    def _with_rows(self, row_offsets: Tensor, columns: Tensor, order: Tensor | None) -> "BlockLayout":
        """A layout of the same sizes with rows that are known to be right."""
        return BlockLayout(
            self.num_tokens, self.block_size, row_offsets, columns, num_global=self.num_global, order=order,
            check_values=False,
        )  # fmt: skip

    def block_counts(self) -> Tensor:
        """int64 ``(L, M, M)``, or ``(S, L, M, M)`` if S > 1: how many times each block reads each block."""
        *sets, _ = self.row_offsets.shape
        M = self.num_blocks
        entries = self._row_of_each_entry() * M + self.columns
        counts = torch.zeros(math.prod(sets) * M * M, dtype=torch.int64, device=self.device)
        return counts.index_add_(0, entries, torch.ones_like(entries)).view(*sets, M, M)

    def token_counts(self) -> Tensor:
        """int64 ``(L, G+N, G+N)``, or ``(S, L, G+N, G+N)`` if S > 1: how many times each token reads each token.

        Dense: for looking and for tests.
        """
        block, G = self._block_of_tokens(), self.num_global
        return torch.nn.functional.pad(self.block_counts()[..., block[:, None], block], (G, 0, G, 0), value=1)

    def to_mask(self) -> Tensor:
        """Who reads whom. Dense, as above.

        Returns:
            Bool ``(G+N, G+N)``, ``(H, G+N, G+N)`` for a layout per head, or ``(B, 1 or H, G+N, G+N)`` for a layout per
            sample, so that it broadcasts to the scores ``(B, H, G+N, G+N)``.
        """
        mask = self.token_counts() > 0
        return mask[0] if self.num_heads == self.num_samples == 1 else mask

    def plot(
        self, path: str | os.PathLike[str], *, grid: Sequence[int] | None = None, query: int | None = None
    ) -> None:
        """Draw who reads whom into the picture `path`. Needs matplotlib.

        Without a `grid`, a panel per set of rows, samples below each other and heads beside; tokens stand in the order
        of the layout. Of more than 512 blocks several share a cell, coloured by the mean.

        With one, what the block of one query reads, in the first set of rows: a panel per frame and a cell per token,
        dark in the block of the query, which has a dot. Global tokens are left out.

        Args:
            grid: the axes of the tokens, up to three: (T, H, W), (H, W) or (W,).
            query: the raster index of the query in `grid`; None for the middle.

        Raises:
            TypeError, ValueError: a `grid` or a `query` that is not of the layout's tokens.
        """
        _layout_plot.plot(self, path, grid, query)

    def _block_sizes(self) -> Tensor:
        """``(M,)`` int64: how many tokens each block has."""
        if self.order is not None:
            return (self.order >= 0).view(self.num_blocks, self.block_size).sum(1)
        starts = torch.arange(self.num_blocks, device=self.device) * self.block_size
        return (self.num_tokens - starts).clamp(max=self.block_size)

    def _block_of_tokens(self) -> Tensor:
        """``(N,)`` int64: the block that each token belongs to."""
        if self.order is None:
            return torch.arange(self.num_tokens, device=self.device) // self.block_size
        slots = torch.arange(self.order.numel(), device=self.device)
        token = torch.where(self.order < 0, self.num_tokens, self.order.long())
        blocks = slots.new_empty(self.num_tokens + 1).scatter_(0, token, slots // self.block_size)
        return blocks[: self.num_tokens]

    def _row_of_each_entry(self) -> Tensor:
        """``(nnz,)`` int64: the row of each column, counted through all samples and heads."""
        entries = torch.arange(self.columns.numel(), device=self.device)
        return torch.searchsorted(self.row_offsets[..., 1:].reshape(-1).long(), entries, right=True)

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
            and (self.order is None or other.order is None or torch.equal(self.order, other.order))
        )

    def __hash__(self) -> int:
        return hash(tuple(self._sizes().values()))

    def __repr__(self) -> str:
        plain = {"num_samples": 1, "order": None}
        sizes = (f"{name}={x}" for name, x in self._sizes().items() if name not in plain or x != plain[name])
        return f"BlockLayout({', '.join(sizes)})"

    def _sizes(self) -> dict[str, object]:
        return {
            **{name: getattr(self, name) for name in ("num_tokens", "block_size", "num_global", "num_blocks")},
            **{name: getattr(self, name) for name in ("num_samples", "num_heads")},
            "nnz": self.columns.numel(),
            "order": None if self.order is None else tuple(self.order.shape),
            "device": self.device,
        }


def _listed_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """Bool ``(B, H, M, M)``: the blocks that FlexAttention lists, the first `counts` of each row of `indices`."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    times = torch.zeros_like(indices).scatter_add_(-1, indices.long(), listed.to(indices.dtype))
    return times > 0
