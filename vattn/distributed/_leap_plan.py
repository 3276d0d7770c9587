"""Which rank computes which leap groups, and which frames it needs for that: from the lengths of the shards alone.

    leap=2, group_size=2      span 0       span 1       span 2
    frame                   0  1  2  3 | 4  5  6  7 | 8  9 10 11
    group                   A  B  A  B   C  D  C  D   E  F  E  F
    rank                    0  0  0  0   0  0  0  1   1  1  1  1        D needs frames of both ranks

Spans that lie whole on a rank are its own, as they lie. Of the others, groups that lie whole on a rank are its own,
too. A group of several ranks has an owner, which gets the frames of the others; or each of these ranks gets all frames
of some heads. A frame that moves costs its query, key and value on the way there, and its output on the way back.

An owner has most frames of its group, so that owners never need more bytes in total than heads. But the owner of one
large group would be sent nearly all of it, and compute alone, while by heads all ranks send and compute the same
amount. So the busiest link decides, because the others wait for it.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

Range = tuple[int, int]
"""From the first to behind the last one."""
MOST_PLANS = 1024
"""That are remembered."""


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Leap groups of one span and of one size, of some heads, which one rank computes."""

    rank: int
    heads: Range
    size: int
    first: int
    """The first of the frames, which with the heads tells this work from others."""
    runs: dict[int, tuple[Range, ...]]
    """Of each rank that has any of these frames, in runs. In order they are frame j of each group, for j < size."""

    def count(self, rank: int) -> int:
        """How many frames of a rank it needs."""
        return sum(map(length, self.runs.get(rank, ())))

    @property
    def frames(self) -> int:
        return sum(map(self.count, self.runs))

    @property
    def groups(self) -> int:
        return self.frames // self.size

    @property
    def moves(self) -> bool:
        """Whether another rank has any of the frames."""
        return any(rank != self.rank for rank in self.runs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all ranks compute. Frames have the numbers of one device."""

    leap: int
    group_size: int
    heads: int
    whole: tuple[Range, ...]
    """Of each rank, the frames of the spans that lie whole on it."""
    work: tuple[Work, ...]
    """The groups of all other spans."""

    @property
    def moves(self) -> bool:
        """Whether any rank sends anything."""
        return any(work.moves for work in self.work)

    def pieces(self, rank: int) -> dict[Range, list[Range]]:
        """The frames of a rank in runs, in order, and of each run the heads that are computed together."""
        pieces: dict[Range, list[Range]] = {}
        for work in self.work:
            for run in work.runs.get(rank, ()):
                pieces.setdefault(run, []).append(work.heads)
        if self.whole[rank][0] < self.whole[rank][1]:
            pieces[self.whole[rank]] = [(0, self.heads)]
        return {run: sorted(pieces[run]) for run in sorted(pieces)}


class _Plans:
    """Plans as attributes: a trace would find those of a dict alone that were there when it first looked."""


_plans = _Plans()


def plan_leap(lengths: tuple[int, ...], leap: int, group_size: int, heads: int) -> Plan:
    """The plan of all ranks, which each of them makes for itself.

    Args:
        lengths: the frames of each rank.
        leap, group_size: as of :func:`vattn.leap_attention`; beyond the clip they mean the same as its length.
        heads: how many there are.
    """
    return getattr(_plans, _name_of(lengths, leap, group_size, heads))


@torch.compiler.assume_constant_result
def _name_of(*case: Any) -> str:
    """The name under which a plan is known. What is constant in a trace must be found again where it is guarded."""
    name = str(case)
    known = vars(_plans)
    if name not in known:
        if len(known) >= MOST_PLANS:
            known.clear()
        known[name] = _new_plan(*case)
    return name


def _new_plan(lengths: tuple[int, ...], leap: int, group_size: int, heads: int) -> Plan:
    ends = list(itertools.accumulate(lengths))
    begins = [end - length for end, length in zip(ends, lengths, strict=True)]
    total = ends[-1]
    leap, group_size = min(leap, max(total, 1)), min(group_size, max(total, 1))
    if group_size == 1:
        leap = 1  # it says nothing then, and no span is cut
    span = leap * group_size
    whole = []
    for begin, end in zip(begins, ends, strict=True):
        first, last = -(-begin // span) * span, end if end == total else end // span * span
        whole.append((first, last) if first < last else (begin, begin))
    work: list[Work] = []
    for start in dict.fromkeys(cut // span * span for cut in ends[:-1] if cut % span and cut < total):
        work += _work_of_span(range(start, min(start + span, total)), leap, ends, heads, work)
    return Plan(leap, group_size, heads, tuple(whole), tuple(work))


def _work_of_span(span: range, leap: int, ends: Sequence[int], heads: int, before: Sequence[Work]) -> list[Work]:
    """Who computes the groups of a span that several ranks have; `before` it others were given."""
    groups = [span[i::leap] for i in range(min(leap, len(span)))]
    counts = [_counts(group, ends) for group in groups]
    ranks = sorted({rank for held in counts for rank in held})

    def of(rank: int, some: Iterable[range], share: Range) -> list[Work]:
        by_size: dict[int, list[int]] = {}
        for group in some:
            by_size.setdefault(len(group), []).extend(group)
        return [Work(rank, share, size, min(frames), _runs(frames, ends)) for size, frames in by_size.items()]

    alone = [len(held) == 1 for held in counts]
    own = [
        work
        for rank in ranks
        for work in of(rank, (g for g, a, c in zip(groups, alone, counts, strict=True) if a and rank in c), (0, heads))
    ]
    shared = [group for group, one in zip(groups, alone, strict=True) if not one]
    owners = _owners([(len(g), c) for g, c in zip(groups, counts, strict=True) if len(c) > 1], len(ends), heads, before)
    by_owner = [
        work
        for rank in ranks
        for work in of(rank, (g for g, owner in zip(shared, owners, strict=True) if owner == rank), (0, heads))
    ]
    shares = [(heads * i // len(ranks), heads * (i + 1) // len(ranks)) for i in range(len(ranks))]
    by_heads = [
        work
        for rank, share in zip(ranks, shares, strict=True)
        if share[0] < share[1]
        for work in of(rank, shared, share)
    ]
    return own + min(by_owner, by_heads, key=_busiest)  # the first one of equals


def _owners(groups: Sequence[tuple[int, dict[int, int]]], ranks: int, heads: int, before: Sequence[Work]) -> list[int]:
    """Of groups, of which size and frames of each rank are given, the owner: one that has most of its frames."""
    load = [0] * ranks
    for work in before:
        load[work.rank] += work.frames * length(work.heads) if work.moves else 0
    owners: list[int] = []
    for (size, held), alike in itertools.groupby(groups):
        most = max(held.values())
        able = [rank for rank in held if held[rank] == most]
        chosen = []
        for _ in alike:
            chosen.append(min(able, key=load.__getitem__))
            load[chosen[-1]] += size * heads
        owners += sorted(chosen)  # so that what a rank owns are few runs of frames
    return owners


def _busiest(works: Sequence[Work]) -> int:
    """The most that any rank sends or receives, in frames of one head of query, key, value or output."""
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for work in works:
        for rank in work.runs:
            if rank != work.rank:
                moved = work.count(rank) * length(work.heads)
                for number, source, target in ((3, rank, work.rank), (1, work.rank, rank)):
                    sent[source] = sent.get(source, 0) + number * moved
                    received[target] = received.get(target, 0) + number * moved
    return max([*sent.values(), *received.values()], default=0)


def _counts(frames: Iterable[int], ends: Sequence[int]) -> dict[int, int]:
    """How many of these frames each rank has that has any."""
    counts: dict[int, int] = {}
    for frame in frames:
        rank = bisect.bisect_right(ends, frame)
        counts[rank] = counts.get(rank, 0) + 1
    return counts


def _runs(frames: Iterable[int], ends: Sequence[int]) -> dict[int, tuple[Range, ...]]:
    """These frames by their ranks, in runs without gaps."""
    runs: dict[int, list[Range]] = {}
    for frame in sorted(frames):
        of_rank = runs.setdefault(bisect.bisect_right(ends, frame), [])
        if of_rank and of_rank[-1][1] == frame:
            of_rank[-1] = (of_rank[-1][0], frame + 1)
        else:
            of_rank.append((frame, frame + 1))
    return {rank: tuple(of_rank) for rank, of_rank in runs.items()}


def length(run: Range) -> int:
    return run[1] - run[0]
