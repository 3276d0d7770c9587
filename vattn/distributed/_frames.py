"""Sends frames to the ranks that compute their leap groups, and outputs back."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vattn.distributed._collectives import start_exchange
from vattn.distributed._leap_plan import Plan, Range, Work, length
from vattn.distributed._ranks import Ranks

Pieces = dict[tuple[Range, Range], Tensor]
"""Of runs of frames, and heads, tensors ``(B, heads, frames, N, D)``."""

Key = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Block:
    """Frames of one rank, `holder`, that a work needs. `partner` is the other rank, seen from either of both."""

    partner: int
    work: Work
    holder: int

    @property
    def key(self) -> Key:
        """What tells it from the other blocks of a plan; a key for Dynamo, which hashes no objects of ours."""
        return self.work.first, self.work.heads[0], self.holder

    @property
    def runs(self) -> tuple[Range, ...]:
        return self.work.runs[self.holder]

    @property
    def frames(self) -> int:
        return self.work.count(self.holder)

    @property
    def heads(self) -> int:
        return length(self.work.heads)

    def taken(self, pieces: Pieces) -> Tensor:
        """The frames of the block, ``(B, heads, frames, N, D)``, of all pieces of the rank that holds them."""
        parts = [pieces[run, self.work.heads] for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def pieces(self, x: Tensor) -> Pieces:
        """The inverse."""
        parts = x.split([*map(length, self.runs)], 2)
        return {(run, self.work.heads): part for run, part in zip(self.runs, parts, strict=True)}


def lent_blocks(plan: Plan, rank: int) -> list[Block]:
    """Frames of this rank that others need, in the order of those."""
    lent = [Block(work.rank, work, rank) for work in plan.work if work.rank != rank and rank in work.runs]
    return sorted(lent, key=lambda block: block.partner)


def needed_blocks(plan: Plan, rank: int) -> list[Block]:
    """Frames of others that this rank needs, in the order of those."""
    computed = [work for work in plan.work if work.rank == rank]
    return [
        Block(holder, work, holder)
        for holder in range(len(plan.whole))
        for work in computed
        if rank != holder and holder in work.runs
    ]


class Moving:
    """Blocks on their way, of the same number of tensors each; `wait` gives those that come.

    Every rank takes part, in the backward too: `nothing`, which has no frames, ties what is sent to what it is made of.
    """

    def __init__(
        self, ranks: Ranks, sent: Sequence[Block], tensors: Mapping[Key, Sequence[Tensor]], received: Sequence[Block],
        times: int, nothing: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """A block is `times` tensors ``(B, heads, frames, N, D)``, and `nothing` are such ``(B, H, 0, N, D)``."""
        self._nothing, self._received, self._times = nothing[0].shape, received, times
        parts = [*nothing, *(x for block in sent for x in tensors[block.key])]
        rows = torch.cat([x.movedim((2, 1), (0, 3)).reshape(-1, x.shape[-1]) for x in parts])
        self._pending = start_exchange(rows, ranks, self._of_ranks(sent, ranks), self._of_ranks(received, ranks))

    def _of_ranks(self, blocks: Iterable[Block], ranks: Ranks) -> list[int]:
        rows = [0] * ranks.size
        for block in blocks:
            rows[block.partner] += self._times * self._rows(block)
        return rows

    def _rows(self, block: Block) -> int:
        return block.frames * self._nothing[0] * self._nothing[3] * block.heads

    def wait(self) -> tuple[dict[Key, list[Tensor]], Tensor]:
        """The blocks that came; and nothing, which is tied to them."""
        B, _, _, N, D = self._nothing
        sizes = [self._rows(block) for block in self._received for _ in range(self._times)]
        nothing, *parts = self._pending.wait().split([0, *sizes])
        came, left = {}, iter(parts)
        for block in self._received:
            tensors = (next(left).view(block.frames, B, N, block.heads, D) for _ in range(self._times))
            came[block.key] = [x.movedim((0, 3), (2, 1)) for x in tensors]
        return came, nothing.view(self._nothing)


def cut(x: Tensor, plan: Plan, rank: int) -> tuple[Pieces, Tensor]:
    """The pieces of ``x (B, H, T_r, N, D)``, this rank's frames, and no frames of it, ``(B, H, 0, N, D)``.

    These are splits and not slices, because their backward writes a gradient once.
    """
    runs = plan.pieces(rank)
    nothing, *of_runs = x.split([0, *map(length, runs)], 2)
    pieces: Pieces = {}
    for (run, shares), piece in zip(runs.items(), of_runs, strict=True):
        pieces.update(zip(((run, share) for share in shares), piece.split([*map(length, shares)], 1), strict=True))
    return pieces, nothing


def joined(pieces: Pieces, plan: Plan, rank: int, nothing: Sequence[Tensor]) -> Tensor:
    """The inverse, in memory as (B, T_r, N, H, D); `nothing` is ``(B, H, 0, N, D)``."""
    frames = [x.movedim(1, 3) for x in nothing]
    for run, shares in plan.pieces(rank).items():
        heads = [pieces[run, share].movedim(1, 3) for share in shares]
        frames.append(torch.cat(heads, 3) if len(heads) > 1 else heads[0])
    return torch.cat(frames, 1).movedim(3, 1)
