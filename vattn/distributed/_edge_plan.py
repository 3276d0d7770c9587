"""What edge-sparse attention sends, and which blocks a rank reads where, from the layout of all blocks.

Blocks lie in the order of ranks. A rank's queries read its own blocks, and those of other ranks that its rows of the
layout name, each of which comes once::

    layout          0: [0 2]   1: [1]   2: [1 3]   3: [3]
    rank 0          blocks 0 and 1      its own: 0: [0]  1: [1]      fetched: 0: [2]
    rank 1          blocks 2 and 3      its own: 2: [3]  3: [3]      fetched: 2: [1]
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from vattn.distributed._checks import crc
from vattn.layout import BlockLayout, Found


@dataclasses.dataclass
class Plan:
    """The part of one rank.

    Attributes:
        exchanges: whether any rank reads blocks of another one: if so, all take part in the exchange.
        sent: how many tokens go to each rank.
        sent_tokens: ``(sum(sent),)`` int64, which of this rank's tokens, in the order in which they go.
        received: how many tokens come from each rank: in the end the fetched blocks in ascending order.
        local: who reads whom among the blocks of this rank, and the global tokens.
        fetched: which of its queries read which fetched block, as a layout of a sequence of blocks, or None if nothing
            is fetched. Rows of the sequence are queries from 0 on, and keys from `first_key` on.
        first_key: the row of that sequence where the fetched keys begin.
        query_tokens, key_tokens: int64, the number of the token in each row of that sequence, as a query and as a key;
            0 where there is none.
    """

    exchanges: bool
    sent: list[int]
    sent_tokens: Tensor
    received: list[int]
    local: BlockLayout
    fetched: BlockLayout | None = None
    first_key: int = 0
    query_tokens: Tensor | None = None
    key_tokens: Tensor | None = None


def make_plan(
    layout: BlockLayout, lengths: Sequence[int], rank: int, *, past_only: bool = False, apart: bool = False,
    device: torch.device | str = "cpu",
) -> Plan:  # fmt: skip
    """The plan of `rank`.

    Args:
        layout: of the blocks of all ranks. Waits for its device.
        lengths: how many tokens each rank has: whole blocks, but for the last one of all.
        past_only: leave out the blocks of later ranks.
        apart: queries and fetched keys have rows of their own, which have one position for both. Otherwise they share
            rows, so that there are fewer.
        device: where the tensors of the plan go.
    """
    size, M, sets = layout.block_size, layout.num_blocks, layout.row_offsets.shape[:-1]
    columns = layout.columns.long().cpu()
    counts = layout.row_offsets.long().cpu().diff().flatten()
    rows = torch.arange(len(counts)).repeat_interleave(counts)  # of each entry, through all samples and heads
    of_sets, readers = rows // max(M, 1), rows % max(M, 1)
    sizes = (layout.num_tokens - torch.arange(M) * size).clamp(max=size)
    blocks = [-(-length // size) for length in lengths]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(blocks))
    reads, has = owner[readers], owner[columns]

    own = (reads == rank) & (has == rank)
    first, mine = sum(blocks[:rank]), blocks[rank]
    local = _layout(
        lengths[rank], size, layout.num_global, sets, of_sets[own], readers[own] - first, columns[own] - first
    )

    missing = (has < reads) if past_only else (has != reads)
    needed = torch.unique(reads[missing] * M + columns[missing])  # a block once for each rank, in that order
    to, block = needed // max(M, 1), needed % max(M, 1)
    leaves, comes = owner[block] == rank, to == rank
    none = torch.zeros(len(lengths), dtype=torch.int64)
    fetched = block[comes]
    plan = Plan(
        exchanges=needed.numel() > 0,
        sent=none.index_add(0, to[leaves], sizes[block[leaves]]).tolist(),
        sent_tokens=(_tokens(block[leaves], sizes, size) - first * size).to(device),
        received=none.index_add(0, owner[fetched], sizes[fetched]).tolist(),
        local=local.to(device),
    )
    if fetched.numel() == 0:
        return plan
    tokens = _tokens(fetched, sizes, size)
    is_short = int(sizes[fetched[-1]]) < size  # a block that is short must be the last of the sequence
    before = mine if apart else max(mine + 1 - fetched.numel(), 0) if is_short else 0
    length = before * size + tokens.numel()
    length = length if apart or is_short else max(length, lengths[rank])
    which = missing & (reads == rank)
    there = before + torch.searchsorted(fetched, columns[which])
    queries = torch.arange(first * size, first * size + lengths[rank])
    plan.fetched = _layout(length, size, 0, sets, of_sets[which], readers[which] - first, there).to(device)
    plan.first_key = before * size
    plan.query_tokens = _padded(queries, 0, length).to(device)
    plan.key_tokens = _padded(tokens, plan.first_key, length).to(device)
    return plan


def _layout(
    num_tokens: int, size: int, num_global: int, sets: Sequence[int], of_set: Tensor, row: Tensor, columns: Tensor
) -> BlockLayout:
    """The layout of entries in the order of `of_set`, their set of rows, and `row`; `sets` is (L,) or (S, L)."""
    M, count = -(-num_tokens // size), math.prod(sets)
    ends = torch.nn.functional.pad(torch.bincount(of_set * M + row, minlength=count * M).cumsum(0), (1, 0))
    offsets = ends[torch.arange(count)[:, None] * M + torch.arange(M + 1)].view(*sets, M + 1)
    return BlockLayout(num_tokens, size, offsets, columns, num_global=num_global, check_values=False)


def _tokens(blocks: Tensor, sizes: Tensor, size: int) -> Tensor:
    """The tokens of blocks, one after the other."""
    counts = sizes[blocks]
    begins = (blocks * size - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    return begins + torch.arange(begins.numel())


def _padded(numbers: Tensor, before: int, length: int) -> Tensor:
    return torch.nn.functional.pad(numbers, (before, length - before - numbers.numel()))


def plan_of(
    layout: BlockLayout, lengths: Sequence[int], rank: int, past_only: bool, apart: bool, device: torch.device
) -> Plan:
    """:func:`make_plan`, made once for a layout. In a trace it holds for these lengths alone."""
    fixed = [operator.index(length) for length in lengths]
    return getattr(layout._plans, _planned(layout, fixed, rank, past_only, apart, device))


@torch.compiler.assume_constant_result
def _planned(
    layout: BlockLayout, lengths: Sequence[int], rank: int, past_only: bool, apart: bool, device: torch.device
) -> str:
    """Under which name the plan is found. In a trace it holds for this layout alone."""
    name = f"{lengths} {rank} {past_only} {apart} {device}"
    known = _known(layout)
    if name not in known:
        with _outside():
            known[name] = make_plan(layout, lengths, rank, past_only=past_only, apart=apart, device=device)
    return name


@torch.compiler.assume_constant_result
def fingerprint(layout: BlockLayout) -> str:
    """What tells one layout from another; waits for its device, once."""
    known = _known(layout)
    if "fingerprint" not in known:
        sizes = layout.num_tokens, layout.block_size, layout.num_global, tuple(layout.row_offsets.shape)
        with _outside():
            known["fingerprint"] = f"{sizes} {crc(layout.row_offsets.cpu())} {crc(layout.columns.cpu())}"
    return known["fingerprint"]


def _known(layout: BlockLayout) -> dict[str, Any]:
    """What was found out about the layout. One that a trace makes has no blocks yet, and nothing else."""
    if not hasattr(layout, "_plans"):
        must = "be made before the function that torch.compile traces, since its blocks say what is sent"
        raise RuntimeError(f"edge_sparse_attention: layout must {must}, got one made in a trace")
    return vars(layout._plans)


_dense = Found()


def dense_layout(num_tokens: int, block_size: int, device: torch.device) -> BlockLayout:
    """That of blocks which all read all, and one global token: made once, and outside of a trace."""
    return getattr(_dense, _name_of_dense(num_tokens, block_size, device))


@torch.compiler.assume_constant_result
def _name_of_dense(num_tokens: int, block_size: int, device: torch.device) -> str:
    name = f"{num_tokens} {block_size} {device}"
    if not hasattr(_dense, name):
        with _outside():
            setattr(_dense, name, BlockLayout.dense(num_tokens, block_size, num_global=1).to(device))
    return name


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Whatever transforms and modes are active now: what is made here will be used when they are not."""
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        yield
