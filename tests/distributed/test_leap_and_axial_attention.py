"""Leap attention, the periodic shift and axial attention over ranks are those of one device.

Results, derivatives, masks of dropout, bytes, and what is refused; in processes, and for breadth in threads.
"""

import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.distributed.processes import Found, SentBytes, World, lengths_of, results, run_cases
from tests.distributed.sharded_calls import Call, error
from tests.distributed.simulated import run_ranks
from vattn import axial_attention, distributed, leap_attention, periodic_shift
from vattn.distributed.bytes_sent import bytes_sent

B, H, N, D = 2, 3, 2, 6
FRAMES = (0, 1, 7, 63)
LEAPS = ((1, 1), (1, 2), (3, 2), (2, 3), (16, 2), (100, 100), (1, 63))
"""And group sizes."""
FOLDS = (0, 1, 4, 7)


def leap_call(lengths: Sequence[int], leap: int, *, shape: Sequence[int] = (B, H, N, D), **settings: Any) -> Call:
    B, H, N, D = shape
    whole = B, H, sum(lengths), N, D
    return Call(leap_attention, distributed.leap_attention, whole, 2, lengths, (leap,), **settings)


def shift_call(lengths: Sequence[int], fold_div: int, **settings: Any) -> Call:
    whole = B, H, sum(lengths), N, D
    return Call(periodic_shift, distributed.periodic_shift, whole, 2, lengths, (fold_div,), inputs=1, **settings)


def axial_call(
    lengths: Sequence[int], dim: int, sharded_dim: int, *, grid: Sequence[int] = (4, 3, 5), heads: int = H,
    batch: int = B, **settings: Any,
) -> Call:  # fmt: skip
    whole = list(grid)
    whole[sharded_dim] = sum(lengths)
    return Call(
        axial_attention, distributed.axial_attention, (batch, heads, *whole, D), 2 + sharded_dim % len(grid), lengths,
        (dim,), only_of_ranks={"sharded_dim": sharded_dim}, **settings,
    )  # fmt: skip


def calls(size: int) -> Iterator[tuple[str, Call]]:
    """Calls of all three, with all settings, of which each size of a group makes others."""
    products = itertools.product(FRAMES, LEAPS, FOLDS, (0.0, 0.4), (torch.float64, torch.float32))
    for i, (frames, (leap, group_size), fold_div, dropout_p, dtype) in enumerate(products):
        if i % 7 == size:
            settings: dict[str, Any] = {"dtype": dtype, "return_lse": i % 3 != 0, "told": i % 2 == 0, "seed": i}
            settings |= {"group_size": group_size, "fold_div": fold_div, "dropout_p": dropout_p}
            yield f"leap {i}", leap_call(lengths_of(frames, size, i), leap, **settings)
    for i, (frames, fold_div) in enumerate(itertools.product(FRAMES, FOLDS[1:])):
        yield f"shift {i}", shift_call(lengths_of(frames, size, i), fold_div, told=i % 2 == 0, seed=i)
    for i, (sharded_dim, dim, dropout_p) in enumerate(itertools.product((0, 2, -2), (0, 1, -1), (0.0, 0.4))):
        settings = {"dropout_p": dropout_p, "return_lse": i % 3 != 0, "told": i % 2 == 0, "seed": i}
        settings |= {"heads": (1, 4)[i % 2], "batch": 1 + i % 3}
        yield f"axial {i}", axial_call(lengths_of((0, 1, 6)[i % 3], size, i), dim, sharded_dim, **settings)
    for dtype in (torch.bfloat16, torch.float32):
        yield f"leap {dtype}", leap_call([size, *[3] * (size - 1)], 2, dtype=dtype, return_lse=True)
        yield f"axial {dtype}", axial_call([size, *[3] * (size - 1)], 0, 0, dtype=dtype, return_lse=True)


def errors(world: World) -> dict[str, dict[str, float]]:
    """How far results and gradients are from those of one device, in parts of what they may be."""
    found = {}
    for name, call in calls(world.size):
        of_case = call.errors(world.rank, world.group)
        found[name] = {what: difference / call.bound for what, difference in of_case.items()}
    return found


def tangents(world: World) -> dict[str, float]:
    found = {}
    for i, lengths in enumerate(([5, 2, 0, 6], [1, 1, 1, 1], [0, 9, 0, 3])):
        mine, told = lengths[: world.size], i % 2 == 0
        settings: dict[str, Any] = {"told": told, "dropout_p": 0.3 * i, "return_lse": True}
        found[f"leap {i}"] = leap_call(mine, 2, fold_div=4 * i, **settings).tangent_errors(world.rank, world.group)
        found[f"joint {i}"] = leap_call(mine, 1, group_size=20, **settings).tangent_errors(world.rank, world.group)
        found[f"shift {i}"] = shift_call(mine, 3, told=told).tangent_errors(world.rank, world.group)
        found[f"axial {i}"] = axial_call(mine, 1, i % 2, **settings).tangent_errors(world.rank, world.group)
    return found


def sent(world: World) -> dict[str, tuple[int, int, int]]:
    """For some calls: bytes counted, said, and those of the formula, forward and backward."""
    size, rank = world.size, world.rank
    frame, fold = B * H * N * D, D // 3

    def moved(own: int, others: int, share: float) -> float:
        """Of query, key, value and output: `own` less this rank's share of them, and that share of the others'."""
        return 4 * (own * (1 - share) + others * share)

    share = (H * (rank + 1) // size - H * rank // size) / H
    joint = moved(6, 6 * size - 6, share)
    joint_call: dict[str, Any] = {"group_size": 100, "told": True}
    neighbours = 2 * B * H * N * fold * ((rank > 0) + (rank < size - 1))
    whole_groups = [4 * (i + 1) for i in range(size)]
    one_of_four = [3, 1, *[4] * (size - 2)]
    lines = 12 * D * moved(whole_groups[rank], sum(whole_groups) - whole_groups[rank], 1 / size)
    cases: dict[str, tuple[Call, float]] = {
        "leap, groups whole": (leap_call(whole_groups, 2, told=True), 0),
        "leap, shifted": (leap_call(whole_groups, 2, fold_div=3, told=True), neighbours),
        "leap, to the owner": (leap_call(one_of_four, 1, group_size=4, told=True), 4 * frame * (rank < 2)),
        "leap, by heads": (leap_call([6] * size, 1, **joint_call), frame * joint),
        "leap, with lse": (leap_call([6] * size, 1, return_lse=True, **joint_call), frame * joint * (1 + 1 / D / 4)),
        "shift": (shift_call(whole_groups, 3, told=True), neighbours),
        "axial, lines whole": (axial_call(whole_groups, 1, 0, told=True), 0),
        "axial, lines cut": (axial_call(whole_groups, 0, 0, grid=(1, 1), heads=12, batch=1, told=True), lines),
    }
    ops = {"leap": "leap_attention", "shift": "periodic_shift", "axial": "axial_attention"}
    found = {}
    for name, (call, numbers) in cases.items():
        mine = call.parts(rank)
        with SentBytes() as counted:
            of_rank = call.of_rank(rank, world.group, *mine)
            torch.autograd.backward(of_rank, [torch.ones_like(x) for x in of_rank])
        settings = call.settings | call.only_of_ranks | {"lengths": call.lengths}
        op = ops[name.partition(",")[0]]
        said = bytes_sent(op, *mine, *call.positional, rank=rank, size=size, backward=True, **settings)
        found[name] = counted.total, said, round(8 * numbers)
    return found


def compiled(world: World) -> dict[str, float]:
    """Training steps in one graph, of two ranks."""
    if world.size > 2:
        return {}
    found = {}
    for name, call in {
        "leap": leap_call([3, 2], 2, fold_div=3, told=True, dtype=torch.float32),
        "axial": axial_call([3, 2], 0, 0, told=True, return_lse=True, dtype=torch.float32),
    }.items():

        def step(*parts: Tensor, call: Call = call) -> Tensor:
            return sum(x.square().sum() for x in call.of_rank(world.rank, world.group, *parts))  # type: ignore[return-value]

        expected, mine = call.parts(world.rank), call.parts(world.rank)
        step(*expected).backward()
        torch.compile(step, fullgraph=True, backend="aot_eager")(*mine).backward()
        found[name] = max(error(a.grad, b.grad) for a, b in zip(mine, expected, strict=True))  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    cases = {"errors": errors, "tangents": tangents, "sent": sent, "compiled": compiled}
    return run_cases(cases, tmp_path_factory.mktemp("frames"))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_compute_what_one_device_does(size: int, found: Found) -> None:
    for of_rank in results(found, "errors", size):
        assert len(of_rank) >= 80
        for case, of_case in of_rank.items():
            assert max(of_case.values()) <= 1, (case, of_case)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_forward_mode(size: int, found: Found) -> None:
    for of_rank in results(found, "tangents", size):
        assert max(of_rank.values()) <= 1e-10, of_rank


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_those_said(size: int, found: Found) -> None:
    for of_rank in results(found, "sent", size):
        for case, (counted, said, formula) in of_rank.items():
            assert counted == said == formula, case


def test_training_steps_compile_to_one_graph(found: Found) -> None:
    for of_rank in results(found, "compiled", 2):
        assert max(of_rank.values()) <= 2e-5, of_rank


SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(
    lengths=SHARDS, leap=st.integers(1, 12), group_size=st.integers(1, 7), fold_div=st.integers(0, D + 1),
    shape=st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 3), st.integers(1, 5)),
    dropout_p=st.sampled_from([0.0, 0.5]), return_lse=st.booleans(), told=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
def test_leap_attention_of_any_shards(lengths: list[int], leap: int, **settings: Any) -> None:
    call = leap_call(lengths, leap, **settings)
    for errors in run_ranks(len(lengths), lambda ranks: call.errors(ranks.rank, ranks)):
        assert max(errors.values()) <= call.bound, errors


@given(lengths=SHARDS, fold_div=st.integers(1, D + 1), told=st.booleans(), seed=st.integers(0, 10_000))
def test_periodic_shift_of_any_shards(lengths: list[int], fold_div: int, **settings: Any) -> None:
    call = shift_call(lengths, fold_div, **settings)
    for errors in run_ranks(len(lengths), lambda ranks: call.errors(ranks.rank, ranks)):
        assert max(errors.values()) <= call.bound, errors


@given(
    lengths=SHARDS, data=st.data(), grid=st.lists(st.integers(0, 4), min_size=1, max_size=3), heads=st.integers(0, 4),
    batch=st.integers(0, 3), dropout_p=st.sampled_from([0.0, 0.5]), return_lse=st.booleans(), told=st.booleans(),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_axial_attention_of_any_shards(
    lengths: list[int], data: st.DataObject, grid: list[int], **settings: Any
) -> None:
    axes = st.integers(-len(grid), len(grid) - 1)
    call = axial_call(lengths, data.draw(axes), data.draw(axes), grid=grid, **settings)
    for errors in run_ranks(len(lengths), lambda ranks: call.errors(ranks.rank, ranks)):
        assert max(errors.values()) <= call.bound, errors


def test_tensors_in_any_memory_layout() -> None:
    """Frames that are every second one, channels that are not contiguous, and one tensor as query, key and value."""
    x = torch.randn(4, 10, H, B, N, dtype=torch.float64).permute(3, 2, 1, 4, 0)[:, :, ::2]
    expected: Any = leap_attention(x, x, x, 2)

    def of_rank(ranks: Any) -> Any:
        part = x.split([1, 4], 2)[ranks.rank]
        return distributed.leap_attention(part, part, part, 2, group=ranks)

    assert error(torch.cat(run_ranks(2, of_rank), 2), expected) <= 1e-10


def test_autocast_sends_what_is_computed_with() -> None:
    x = torch.randn(1, 2, 4, 3, 8)
    rounded = x.bfloat16()
    expected: Any = leap_attention(rounded, rounded, rounded, 2)

    def of_rank(ranks: Any) -> tuple[Any, int]:
        part = x[:, :, 2 * ranks.rank :][:, :, :2]
        with torch.autocast("cpu", torch.bfloat16):
            return distributed.leap_attention(part, part, part, 2, group=ranks), ranks.sent

    (first, sent), (second, _) = run_ranks(2, of_rank)
    assert error(torch.cat([first, second], 2), expected) == 0
    assert sent == 4 * 2 * x[0, 0, 0].numel() * 2  # two frames of a head, of 16 bits, four times


SHAPE, OTHER_SHAPE = (1, 2, 3, 2, 4), (1, 2, 3, 3, 4)
LEAP = {"op": distributed.leap_attention, "leap": 2}
AXIAL = {"op": distributed.axial_attention, "dim": 0}


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (LEAP, {"leap": 0}, "leap must be at least 1, got leap=0"),
        (LEAP, {"group_size": 0}, "group_size must be at least 1, got group_size=0"),
        (LEAP, {"fold_div": -1}, "fold_div must be at least 0, got fold_div=-1"),
        (LEAP, {"dropout_p": 2.0}, "dropout_p must be between 0 and 1"),
        (LEAP, {"lengths": [4, 3]}, r"got lengths\[0\]=4, where this rank has 3"),
        (AXIAL, {"dim": 2}, r"dim must be less than the axes of the grid \(2\), got dim=2"),
        (AXIAL, {"dim": -3}, "dim must be at least -2, got dim=-3"),
        (AXIAL, {"sharded_dim": 2}, "sharded_dim must be less than the axes of the grid"),
    ],
)
def test_a_wrong_call_is_refused_by_name(call: dict[str, Any], change: dict[str, Any], message: str) -> None:
    arguments = call | change
    op, x = arguments.pop("op"), torch.randn(SHAPE)
    with pytest.raises(ValueError, match=f"distributed.{op.__name__}: .*{message}"):
        run_ranks(2, lambda ranks: op(x, x, x, group=ranks, **arguments))


@pytest.mark.parametrize(
    ("call", "name", "values"),
    [
        (LEAP, "leap", (2, 3)),
        (LEAP, "group_size", (2, 3)),
        (LEAP, "fold_div", (0, 2)),
        (LEAP, "return_lse", (False, True)),
        (LEAP, "scale", (0.5, 0.25)),
        (LEAP, "dtype", (torch.float32, torch.float64)),
        (LEAP, "N", (2, 3)),
        (AXIAL, "dim", (0, 1)),
        (AXIAL, "sharded_dim", (0, 1)),
        (AXIAL, "the other axes of the grid", ([2], [3])),
    ],
)
def test_ranks_that_differ_are_told_so(call: dict[str, Any], name: str, values: tuple[Any, Any]) -> None:
    def of_rank(ranks: Any) -> Any:
        value, arguments = values[ranks.rank], dict(call)
        op = arguments.pop("op")
        shape = OTHER_SHAPE if value in (3, [3]) and name in ("N", "the other axes of the grid") else SHAPE
        x = torch.randn(shape, dtype=value if name == "dtype" else torch.float32)
        settings = {name: value} if name in inspect.signature(op).parameters else {}
        return op(x, x, x, group=ranks, **arguments | settings)

    told = re.escape(f"{name} must be the same on every rank, got rank 0: {values[0]}, rank 1: {values[1]}")
    with pytest.raises(ValueError, match=told):
        run_ranks(2, of_rank)


def test_a_periodic_shift_that_ranks_make_otherwise_is_refused() -> None:
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"distributed.periodic_shift: fold_div must be at least 1, got fold_div=0"):
        run_ranks(2, lambda ranks: distributed.periodic_shift(x, 0, group=ranks))
    with pytest.raises(ValueError, match="fold_div must be the same on every rank, got rank 0: 1, rank 1: 2"):
        run_ranks(2, lambda ranks: distributed.periodic_shift(x, 1 + ranks.rank, group=ranks))
