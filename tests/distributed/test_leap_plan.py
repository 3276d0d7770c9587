"""Who computes which leap groups, and what moves for that: from lengths alone, without processes."""

import collections

import hypothesis.strategies as st
from hypothesis import given, settings

from vattn.distributed._frames import lent_blocks, needed_blocks
from vattn.distributed._leap_plan import Plan, plan_leap
from vattn.reference.leap_attention import leap_groups

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple)
HEADS = st.integers(1, 5)


def groups_of(plan: Plan, total: int) -> collections.Counter:
    """How often each leap group is computed by each head, of what the plan says that ranks compute."""
    found: collections.Counter = collections.Counter()

    def add(frames: list[int], leap: int, group_size: int, heads: range) -> None:
        for group in leap_groups(len(frames), leap, group_size):
            found.update((tuple(frames[i] for i in group), head) for head in heads)

    for first, last in plan.whole:
        add(list(range(first, last)), plan.leap, plan.group_size, range(plan.heads))
    for work in plan.work:
        frames = [frame for runs in work.runs.values() for first, last in runs for frame in range(first, last)]
        add(frames, work.groups, work.size, range(*work.heads))
    return found


@settings(max_examples=200)
@given(SHARDS, st.integers(1, 12), st.integers(1, 6), HEADS)
def test_every_group_is_computed_once_by_each_head(
    lengths: tuple[int, ...], leap: int, group_size: int, heads: int
) -> None:
    total = sum(lengths)
    expected = {(tuple(group), head): 1 for group in leap_groups(total, leap, group_size) for head in range(heads)}
    assert groups_of(plan_leap(lengths, leap, group_size, heads), total) == expected


@settings(max_examples=200)
@given(SHARDS, st.integers(1, 12), st.integers(1, 6), HEADS)
def test_ranks_have_what_the_plan_takes_from_them(
    lengths: tuple[int, ...], leap: int, group_size: int, heads: int
) -> None:
    plan, begin = plan_leap(lengths, leap, group_size, heads), 0
    for rank, count in enumerate(lengths):
        pieces = plan.pieces(rank)
        assert [frame for run in pieces for frame in range(*run)] == list(range(begin, begin + count))
        assert all(
            [head for share in shares for head in range(*share)] == list(range(heads)) for shares in pieces.values()
        )
        begin += count


@settings(max_examples=200)
@given(SHARDS, st.integers(1, 12), st.integers(1, 6), HEADS)
def test_what_a_rank_sends_another_expects(lengths: tuple[int, ...], leap: int, group_size: int, heads: int) -> None:
    plan = plan_leap(lengths, leap, group_size, heads)
    for source in range(len(lengths)):
        for target in range(len(lengths)):
            sent = [(b.work, b.holder) for b in lent_blocks(plan, source) if b.partner == target]
            expected = [(b.work, b.holder) for b in needed_blocks(plan, target) if b.partner == source]
            assert sent == expected


@settings(max_examples=200)
@given(SHARDS, st.integers(1, 12), st.integers(1, 6), HEADS)
def test_frames_move_exactly_where_a_group_crosses_ranks(
    lengths: tuple[int, ...], leap: int, group_size: int, heads: int
) -> None:
    plan = plan_leap(lengths, leap, group_size, heads)
    rank_of = [rank for rank, count in enumerate(lengths) for _ in range(count)]
    crossing = [group for group in leap_groups(len(rank_of), leap, group_size) if len({rank_of[t] for t in group}) > 1]
    lent = {
        frame
        for rank in range(len(lengths))
        for block in lent_blocks(plan, rank)
        for run in block.runs
        for frame in range(*run)
    }
    assert plan.moves == bool(crossing) == bool(lent)
    assert lent <= {frame for group in crossing for frame in group}
