"""Patterns of attention as constructors of :class:`vattn.BlockLayout`: random, of highest score, dense, per head."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vattn import _checks
from vattn._layout_checks import blocks_of_order, check_order, count_blocks
from vattn._layout_grids import GridPatterns
from vattn._layout_tiles import ends, row_starts
from vattn._library import AUTOCAST_DEVICES

if TYPE_CHECKING:
    from vattn.layout import BlockLayout

AT_ONCE = 2**24
"""How many scores of pairs of blocks, and numbers of tokens in an order, `top_k` holds at a time: 64 MiB in float32."""


class Patterns(GridPatterns):
    """What :class:`vattn.BlockLayout` inherits."""

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

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

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
        _checks.boolean(op, "wrap", wrap)
        if generator is not None:
            _checks.generator(op, "generator", generator)
        if draws is None:
            device = torch.device("cpu") if generator is None else generator.device
            draws = torch.empty(M, M, dtype=torch.float32, device=device).uniform_(generator=generator)
        elif not isinstance(draws, Tensor):
            raise TypeError(f"{op}: draws must be a torch.Tensor, got draws={draws!r}")
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
    def top_k(
        cls,
        query: Tensor,
        key: Tensor,
        block_size: int,
        k: int,
        *,
        own: bool = False,
        num_global: int = 0,
        order: Tensor | None = None,
        check_values: bool = True,
    ) -> Self:
        """Each block of queries reads the k blocks of keys with the highest pooled score, per head and per sample.

        The score of two blocks is the product of the mean of the queries of the one with the mean of the keys of the
        other, in float32. The choice has no gradient. A NaN ranks with the largest numbers, and a block without tokens
        last.

        Args:
            query, key: ``(B, H, G+N, D)``, float32, bfloat16, float16 or float64, any strides.
            block_size: tokens per block.
            k: how many blocks each reads, at most as many as there are; at least 1 with `own`.
            own: whether a block is always among those that it reads.
            num_global: G, how many of the first tokens are global, and in no block.
            order: ``(M * block_size,)`` int32 or int64 for blocks that are not consecutive tokens, as of a layout, such
                as :meth:`tile_order` makes it; on the device of `query`.
            check_values: False leaves out the checks of what `order` holds, which wait for its device, and which
                ``torch.compile`` cannot trace.

        Returns:
            A layout on the device of `query`, whose rows list blocks in ascending order: ``(B, H, M + 1)`` of them, or
            ``(H, M + 1)`` for a batch of 1.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

        Source:
            The block selection of Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", and,
            with `own`, of Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", which pools keys only.

        Example:
            >>> query, key, value = torch.randn(3, 2, 4, 8 * 8 * 8, 16)            # a batch of 2, 4 heads
            >>> order = vattn.BlockLayout.tile_order((8, 8, 8), (4, 4, 4))
            >>> layout = vattn.BlockLayout.top_k(query, key, block_size=64, k=2, order=order)
            >>> layout.num_samples, layout.num_heads, layout.num_blocks, layout.density
            (2, 4, 8, 0.25)
            >>> vattn.edge_sparse_attention(query, key, value, layout).shape
            torch.Size([2, 4, 512, 16])
        """
        op = "BlockLayout.top_k"
        _checks.alike(op, "(B, H, G+N, D)", query=query, key=key)
        for name, x in (("query", query), ("key", key)):
            _checks.dense(op, name, x)
        B, H, length, _ = query.shape
        if B * H == 0:
            raise ValueError(f"{op}: query must have samples and heads, got query.shape={tuple(query.shape)}")
        _checks.boolean(op, "own", own)
        _checks.integer(op, "num_global", num_global, least=0)
        if num_global > length:
            raise ValueError(f"{op}: num_global must be at most the number of tokens ({length}), got {num_global=}")
        N = length - num_global
        M = count_blocks(op, N, block_size, num_global)
        if order is not None:
            M = blocks_of_order(op, order, block_size)
            if order.device != query.device:
                raise ValueError(
                    f"{op}: order must be on the device of query ({query.device}), got order.device={order.device}"
                )
            if check_values:
                check_order(op, order, N, block_size)
        _checks.integer(op, "k", k, least=int(bool(own) and M > 0))
        if k > M:
            raise ValueError(f"{op}: k must be at most the number of blocks ({M}), got k={k}")
        queries, keys = (_pooled(x.detach()[:, :, num_global:], block_size, order) for x in (query, key))
        empty = None if order is None else (order.view(-1, block_size) < 0).all(1)
        columns = _highest(queries, keys, k, own, empty)
        offsets = (row_starts(B * H, M, query.device) * k).view(B, H, M + 1)
        return cls(N, block_size, offsets, columns.view(-1), num_global=num_global, order=order, check_values=False)

    @classmethod
    def dense(cls, num_tokens: int, block_size: int, *, num_global: int = 0) -> Self:
        """Every block reads every block; on the CPU."""
        M = count_blocks("BlockLayout.dense", num_tokens, block_size, num_global)
        blocks = torch.arange(M + 1, device="cpu")
        offsets, columns = blocks * M, blocks[:M].repeat(M)
        return cls(num_tokens, block_size, offsets, columns, num_global=num_global, check_values=False)

    @classmethod
    def per_head(cls, layouts: Sequence["BlockLayout"]) -> Self:
        """A layout with the rows of each of `layouts` for one head: windows of other sizes, say, or other patterns.

        Args:
            layouts: one per head, each for all heads and samples, of the same tokens in the same blocks.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.

        Example:
            >>> near = vattn.BlockLayout.sliding_tile((8, 8, 8), tile=(4, 4, 4), window=(1, 1, 1))
            >>> far = vattn.BlockLayout.sliding_tile((8, 8, 8), tile=(4, 4, 4), window=(2, 2, 1))
            >>> layout = vattn.BlockLayout.per_head([near, far])
            >>> layout.num_heads, layout.row_offsets.diff()[:, 0]          # blocks that the first block reads
            (2, tensor([1, 4], dtype=torch.int32))
        """
        op = "BlockLayout.per_head"
        if not isinstance(layouts, (list, tuple)) or not all(isinstance(layout, cls) for layout in layouts):
            raise TypeError(f"{op}: layouts must be a list or tuple of layouts, got layouts={layouts!r}")
        if not layouts:
            raise ValueError(f"{op}: layouts must have at least one element, got len(layouts)=0")
        first, starts = layouts[0], [0]
        for i, layout in enumerate(layouts):
            if layout.num_heads != 1 or layout.num_samples != 1:
                raise ValueError(f"{op}: layouts must be for all heads and samples, got layouts[{i}]={layout}")
            if not _have_the_same_blocks(first, layout):
                raise ValueError(f"{op}: layouts must have the blocks of layouts[0]={first}, got layouts[{i}]={layout}")
            starts.append(starts[-1] + layout.columns.numel())
        return cls(
            first.num_tokens,
            first.block_size,
            torch.stack([layout.row_offsets[0] + start for layout, start in zip(layouts, starts, strict=False)]),
            torch.cat([layout.columns for layout in layouts]),
            num_global=first.num_global,
            order=first.order,
            check_values=False,
        )


def _have_the_same_blocks(first: "BlockLayout", second: "BlockLayout") -> bool:
    if any(getattr(first, x) != getattr(second, x) for x in ("num_tokens", "block_size", "num_global", "device")):
        return False
    if first.order is None or second.order is None:
        return first.order is second.order
    return torch.equal(first.order, second.order)


def _highest(queries: Tensor, keys: Tensor, k: int, own: bool, empty: Tensor | None) -> Tensor:
    """``(B, H, M, k)``, ascending: for each of `queries` the k `keys` of highest product, both ``(B, H, M, D)``.

    What is not finite ranks with the largest numbers, so that it is not hidden; `empty` blocks rank last.
    """
    B, H, M, _ = queries.shape
    chosen = torch.empty(B, H, M, k, dtype=torch.int64, device=queries.device)
    at_once = max(1, AT_ONCE // max(1, B * H * M))
    device_type = queries.device.type
    autocast = torch.autocast(device_type, enabled=False) if device_type in AUTOCAST_DEVICES else nullcontext()
    with autocast:
        for first in range(0, M, at_once):
            scores = queries[:, :, first : first + at_once] @ keys.mT
            most = torch.finfo(scores.dtype).max
            scores = scores.nan_to_num(most, most, -most)
            if empty is not None:
                scores = scores.masked_fill(empty, -math.inf)
            if own:
                scores.diagonal(first, -2, -1).fill_(math.inf)
            chosen[:, :, first : first + at_once] = scores.topk(k, sorted=False).indices.sort().values
    return chosen


def _largest(draws: Tensor, count: int) -> Tensor:
    """The places of the `count` largest numbers of each row, ascending."""
    return draws.topk(count).indices.sort().values


def _drop_outside(columns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows ``(M, slots)`` without the `count` entries that are not blocks, as columns and row offsets.

    The count is known, which indexing with a mask would have to find out.
    """
    inside = (columns >= 0) & (columns < columns.shape[0])
    order = (~inside).view(-1).int().argsort(stable=True)[: columns.numel() - count]
    return columns.view(-1)[order], ends(inside.sum(1))


def _pooled(x: Tensor, block_size: int, order: Tensor | None) -> Tensor:
    """``(B, H, N, D)`` to the mean of each block ``(B, H, M, D)``, in float32 or float64; 0 for one without tokens."""
    B, H, N, D = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if order is None:
        whole = N // block_size
        means = x[:, :, : whole * block_size].unflatten(2, (whole, block_size)).mean(3, dtype=dtype)
        rest = x[:, :, whole * block_size :]
        return means if rest.shape[2] == 0 else torch.cat([means, rest.mean(2, keepdim=True, dtype=dtype)], 2)
    slots = order.view(-1, block_size)
    means = x.new_zeros(B, H, slots.shape[0], D, dtype=dtype)
    if N == 0:
        return means
    at_once = max(1, AT_ONCE // max(1, B * H * block_size * D))
    for part, mean in zip(slots.split(at_once), means.split(at_once, 2), strict=True):
        empty = part < 0
        tokens = x.index_select(2, part.clamp(min=0).view(-1)).unflatten(2, part.shape)  # (B, H, blocks, block_size, D)
        tokens.masked_fill_(empty[..., None], 0)
        mean.copy_(tokens.sum(3, dtype=dtype) / (~empty).sum(1, keepdim=True).clamp(min=1))
    return means
