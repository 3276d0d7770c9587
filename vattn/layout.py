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

import functools


import torch
from torch import Tensor

from vattn import _checks


class BlockLayout:
    """Compressed rows of blocks, for all heads or one set per head; immutable.

    Args:
        num_tokens: N, how many tokens are not global.
        block_size: how many tokens a block has; the last one has the rest.
        row_offsets: ``(M + 1,)`` or ``(L, M + 1)`` int32 or int64, M = ceil(N / block_size), L = 1 for all heads or
            one per head: row i of head l is ``columns[row_offsets[l, i] : row_offsets[l, i + 1]]``.
        columns: ``(nnz,)`` int32 or int64, the blocks that are read. A block listed twice counts twice.
        num_global: G, how many global tokens come first.
        check_values: False leaves out the checks of what the tensors hold, which wait for their device.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Example:
        >>> layout = BlockLayout(10, 4, torch.tensor([0, 2, 3, 3]), torch.tensor([0, 2, 1]), num_global=1)
        >>> layout.num_blocks, layout.num_heads
        (3, 1)
    """

    num_tokens: int
    block_size: int
    num_global: int
    row_offsets: Tensor
    columns: Tensor

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
        _checks.integer(op, "num_tokens", num_tokens, least=0)
        _checks.integer(op, "block_size", block_size, least=1)
        _checks.integer(op, "num_global", num_global, least=0)
        for name, x in (("row_offsets", row_offsets), ("columns", columns)):
            _checks.index_tensor(op, name, x)
        blocks = -(-num_tokens // block_size)
        if row_offsets.dim() not in (1, 2) or row_offsets.shape[-1] != blocks + 1 or 0 in row_offsets.shape:
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
        if check_values:
            _check_values(op, row_offsets, columns, blocks)
        self.__dict__.update(
            num_tokens=num_tokens,
            block_size=block_size,
            num_global=num_global,
            row_offsets=row_offsets.view(-1, blocks + 1).int(),
            columns=columns.int(),
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"BlockLayout: a layout is immutable, got {name}={value!r}")

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
    ) -> "BlockLayout":
        """SViTT's layout: each block reads its neighbours and some random blocks."""
        M = -(-num_tokens // block_size)
        rows = torch.arange(M)[:, None]
        local = (rows + torch.arange(-(num_local // 2), num_local // 2 + 1)[:num_local]) % max(M, 1)
        draws = torch.rand(M, M, generator=generator).scatter_(1, local, 0.0)
        random = draws.topk(num_random).indices.sort().values
        columns = torch.cat([local, random], 1).int()
        offsets = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=torch.int32)
        return cls(num_tokens, block_size, offsets, columns.view(-1), num_global=num_global, check_values=False)

    @classmethod
    def dense(cls, num_tokens: int, block_size: int, *, num_global: int = 0) -> "BlockLayout":
        """Every block reads every block."""
        M = -(-num_tokens // block_size)
        columns = torch.arange(M, dtype=torch.int32).repeat(M)
        offsets = torch.arange(M + 1, dtype=torch.int32) * M
        return cls(num_tokens, block_size, offsets, columns, num_global=num_global, check_values=False)

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
        return self.columns.device

    def transpose(self) -> "BlockLayout":
        """The layout whose row j lists the blocks that read block j; built once."""
        return self._transposed

    @functools.cached_property
    def _transposed(self) -> "BlockLayout":
        L, M = self.num_heads, self.num_blocks
        row = self._row_of_each_entry()
        head = row // max(M, 1)
        keys, order = (head * M + self.columns).sort(stable=True)
        starts = torch.arange(L, device=self.device)[:, None] * M + torch.arange(M + 1, device=self.device)
        offsets = torch.searchsorted(keys, starts)
        columns = (row - head * M)[order]
        return BlockLayout(
            self.num_tokens, self.block_size, offsets, columns, num_global=self.num_global, check_values=False
        )

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The same layout on `device`."""
        return BlockLayout(
            self.num_tokens,
            self.block_size,
            self.row_offsets.to(device),
            self.columns.to(device),
            num_global=self.num_global,
            check_values=False,
        )

    def block_counts(self) -> Tensor:
        """``(L, M, M)`` int64: how many times block i reads block j."""
        L, M = self.num_heads, self.num_blocks
        entries = self._row_of_each_entry() * M + self.columns
        counts = torch.zeros(L * M * M, dtype=torch.int64, device=self.device)
        return counts.index_add_(0, entries, torch.ones_like(entries)).view(L, M, M)

    def token_counts(self) -> Tensor:
        """``(L, G+N, G+N)`` int64: how many times token i reads token j. Dense: for looking and for tests."""
        block = torch.arange(self.num_tokens, device=self.device) // self.block_size
        counts = self.block_counts()[:, block[:, None], block]
        G = self.num_global
        return torch.nn.functional.pad(counts, (G, 0, G, 0), value=1)

    def to_mask(self) -> Tensor:
        """Bool ``(G+N, G+N)``, or ``(H, G+N, G+N)`` for a layout per head: who reads whom. For looking and for tests."""
        mask = self.token_counts() > 0
        return mask[0] if self.num_heads == 1 else mask

    def _row_of_each_entry(self) -> Tensor:
        """``(nnz,)`` int64: the row of each column, counted through all heads."""
        entries = torch.arange(self.columns.numel(), device=self.device)
        return torch.searchsorted(self.row_offsets[:, 1:].reshape(-1).long(), entries, right=True)


def _check_values(op: str, row_offsets: Tensor, columns: Tensor, blocks: int) -> None:
    """The rows follow each other and end with `columns`, and every column is a block."""
    flat = row_offsets.reshape(-1)
    chained = bool((flat.diff() >= 0).all()) and int(flat[0]) == 0 and int(flat[-1]) == columns.numel()
    if not chained or bool(
        (row_offsets.view(-1, blocks + 1)[1:, 0] != row_offsets.view(-1, blocks + 1)[:-1, -1]).any()
    ):
        raise ValueError(
            f"{op}: row_offsets must grow from 0 to the number of columns ({columns.numel()}), each head's from where "
            f"the last one's ended, got row_offsets={row_offsets.tolist()}"
        )
    outside = (columns < 0) | (columns >= blocks)
    if bool(outside.any()):
        at = int(outside.int().argmax())
        raise ValueError(
            f"{op}: columns must be below the number of blocks ({blocks}), got columns[{at}]={columns[at]}"
        )
