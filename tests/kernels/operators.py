"""The operators under test, as a table of the sizes that the contracts try.

Sizes are what :meth:`Operator.make` takes. The interpreter pays for every tile and program, so they are the smallest
that have several tiles, of which some straddle groups and the last ones are not full.
"""

from collections.abc import Collection, Iterable

import pytest

from tests.kernels.attention_operators import (
    AxialAttention,
    EdgeSparseAttention,
    LatentAttention,
    LeapAttention,
    NodeSparseAttention,
)
from tests.kernels.cases import Operator, Sizes
from tests.kernels.other_operators import MergeAttention, NearestCode, PeriodicShift, TokenImportance
from vattn.kernels import configs
from vattn.kernels.merge_attention import MAX_PARTS

BLOCK_Q, BLOCK_K = configs.INTERPRETER.BLOCK_Q, configs.INTERPRETER.BLOCK_K
CPP_ROWS, CPP_TILE = 16, 64  # csrc/cpu/axial_attention.cpp and flash.h
LONG = 4 * configs.TILES_WORTH_A_SPLIT * BLOCK_K + 5  # four splits of keys, two of queries
LONG_EDGES = 2 * configs.TILES_WORTH_A_SPLIT * BLOCK_K + 5  # two splits of what global tokens read
DECODE_Q, DECODE_K = configs.INTERPRETER_DECODE[:2]
WALK = 9 * DECODE_Q + 3  # queries of one head: programs walk over two tiles, but the last ones over less


def around(*blocks: int) -> list[int]:
    """1, 2, and the sizes of `blocks`, one less and one more."""
    return sorted({1, 2, *(block + i for block in blocks for i in (-1, 0, 1))})


def without(sizes: Sizes, *names: str) -> dict[str, Sizes]:
    """`sizes` with one of `names` set to 0, each in turn."""
    return {f"no {name}": sizes | {name: 0} for name in names}


def one_long(long: str, short: str, lengths: list[int], others: int) -> dict[str, Sizes]:
    """`long` of each of `lengths`, and then `short`, where there are few of the other."""
    return {f"{n} {many}": {many: n, few: others} for many, few in ((long, short), (short, long)) for n in lengths}


def ring_of_blocks(block_size: int) -> Sizes:
    """Every block reads itself and the next one; the last one is short, or there is one and it is larger than all."""
    tokens = 6 if block_size == 1 else min(2 * block_size - 3, 35)
    blocks = -(-tokens // block_size)
    rows = [[i, (i + 1) % blocks] for i in range(blocks)]
    return {"rows": rows, "block_size": block_size, "N": tokens, "G": 2, "window": (5, 7, 1)}


LEAP = LeapAttention(
    narrow={"still": {"N": 17}, "shift": {"N": 7, "fold_div": 4}},  # groups of two frames and of one
    cases={"still": {"N": 19}, "shift": {"N": 11, "leap": 2, "fold_div": 4}},
    paths={
        "all channels shift": {"T": 5, "N": 7, "D": 24, "leap": 2, "fold_div": 1},
        "half of the channels shift each way": {"T": 5, "N": 7, "D": 24, "leap": 2, "fold_div": 2},
        "a fold of no channel": {"T": 5, "N": 7, "D": 24, "leap": 2, "fold_div": 25},
    },
    lengths={f"{n} tokens": {"T": 2, "N": n, "group_size": 1} for n in around(BLOCK_Q, BLOCK_K, CPP_TILE)},
    strided={"shift": {"B": 2, "H": 2, "N": 6, "leap": 2, "fold_div": 4}},
    far={"B": 2, "H": 2, "T": 2, "N": 2, "fold_div": 4},
    empty=without({"T": 2, "N": 2, "fold_div": 4}, "B", "H", "T", "N"),
    axes=("B", "H", "T", "N"),
)

SHORT_LINES = {"outer": 2, "line": 3, "inner": 3}  # several in a tile
LONG_LINES = {"outer": 1, "line": 20, "inner": 2}  # one in several tiles
AXIAL = AxialAttention(
    narrow={"short lines": SHORT_LINES, "a long line": {"outer": 1, "line": BLOCK_Q + 5, "inner": 1}},
    cases={"short lines": SHORT_LINES, "long lines": LONG_LINES},
    lengths={
        f"lines of {n}": {"outer": 2, "line": n, "inner": 3} if n <= CPP_ROWS else {"outer": 1, "line": n, "inner": 2}
        for n in sorted({3, 5, 8, *around(CPP_ROWS, BLOCK_K, CPP_TILE)})
    },
    strided={"short lines": {"B": 2, "H": 2} | SHORT_LINES, "long lines": {"B": 2, "H": 2} | LONG_LINES},
    far={"B": 2, "H": 2, "outer": 2, "line": 2, "inner": 2},
    empty=without({"B": 2, "H": 2} | SHORT_LINES, "B", "H", "outer", "line", "inner"),
    axes=("B", "H", "outer", "line", "inner"),
)

LATENT = LatentAttention(
    narrow={"keys": {"queries": 19, "keys": (37,)}},
    cases={"segments": {"queries": 19, "keys": (5, 30)}},
    paths={
        "an empty segment": {"queries": 20, "keys": (0, 37)},
        "no keys": {"queries": 20, "keys": (0,)},
        "few queries": {"queries": 3, "keys": (LONG,)},
        "few keys": {"queries": LONG // 2, "keys": (3,)},
        "one tile of keys": {"queries": WALK, "keys": (200, 9)},
    },
    lengths={f"{n} keys": {"queries": 3, "keys": (n,)} for n in around(BLOCK_Q, BLOCK_K, CPP_TILE)}
    | {f"{n} queries": {"queries": n, "keys": (3,)} for n in around(BLOCK_Q, BLOCK_K, CPP_TILE)},
    strided={"segments": {"B": 2, "H": 2, "queries": 9, "keys": (9, 28)}},
    far={"B": 2, "H": 2, "queries": 2, "keys": (2,)},
    empty=without({"B": 2, "H": 2, "queries": 3, "keys": (4, 0)}, "B", "H", "queries"),
)

NODES = NodeSparseAttention(
    narrow={"kept": {"queries": 5, "keys": 30, "count": 11}},
    head_dims=(21, 64, 80, 256),
    cases={"duplicates": {"queries": 18, "keys": 40, "count": 33, "duplicates": True}},
    paths={
        "few queries": {"queries": 3, "keys": LONG + 10, "count": LONG},
        "few keys": {"queries": LONG // 2, "keys": 40, "count": 7, "duplicates": True},
        "one tile of keys": {"B": 2, "queries": 40, "keys": 300, "count": 201, "duplicates": True},
    },
    strided={"kept": {"B": 2, "H": 2, "queries": 20, "keys": 20, "count": 9}},
    far={"B": 2, "H": 2, "queries": 2, "keys": 2, "count": 2},
    empty=without({"queries": 3, "keys": 4, "count": 2}, "B", "H", "queries")
    | {"no keys": {"queries": 3, "keys": 0, "count": 0}},
)

EDGES = EdgeSparseAttention(
    narrow={"a block": {"rows": [[0, 0]], "block_size": 11, "N": 11}},
    cases={
        "bias": {"rows": [[0, 1], [1, 1]], "block_size": 7, "N": 13},
        "plain": {"rows": [[0, 1], [1]], "block_size": 7, "N": 13, "window": ()},
    },
    paths={
        "causal": {"rows": [[1, 0], [1]], "block_size": 7, "N": 13, "B": 2, "causal": True},
        "global tokens alone": {"rows": [[], []], "block_size": 7, "N": 13, "window": (1, 1, 13)},
        "splits": {"rows": [[], []], "G": 2, "window": (1, 9, 29), "block_size": LONG_EDGES - 20, "N": LONG_EDGES - 2},
    },
    lengths={f"blocks of {size}": ring_of_blocks(size) for size in around(BLOCK_Q, BLOCK_K) if size != 2},
    strided={"bias": {"B": 2, "H": 2, "rows": [[0], [0]], "block_size": 5, "N": 8}},
    far={"B": 2, "H": 2, "rows": [[0]], "block_size": 2, "N": 1},
    empty=without({"rows": [[0]], "N": 4}, "B", "H") | {"no tokens": {"rows": [], "N": 0, "G": 0}},
    repeatable={"deterministic": True},
)

MERGE = MergeAttention(
    narrow={"two parts": {"H": 3, "N": 7}},
    cases={f"{n} parts": {"count": n, "B": 2, "N": 7} for n in (1, 2, 3, 8)},
    paths={"more parts than one kernel takes": {"count": 2 * MAX_PARTS + 3, "H": 3, "N": 7}},
    lengths={
        "one row": {"shape": ()},
        "one number": {"shape": (1,), "D": 1},
        "wide rows": {"shape": (5,), "D": 256},
        "many rows": {"shape": (130,), "D": 64},
        "many axes": {"shape": (2, 3, 4, 5), "D": 24},
    },
    strided={"two parts": {"B": 2, "H": 2, "N": 5}},
    far={"B": 2, "H": 2, "N": 2},
    empty={"no row": {"shape": (0,), "D": 8}, "no row of a head": {"shape": (2, 0), "D": 8}},
)

SHIFT = PeriodicShift(
    narrow={"shift": {"T": 3, "N": 2}},
    cases={"shift": {"fold_div": 4}, "transpose": {"fold_div": 4, "transpose": True}},
    strided={"shift": {"B": 2, "H": 3, "fold_div": 4}},
    far={"B": 2, "H": 2, "T": 2, "N": 2},
    empty=without({"B": 2, "H": 2, "T": 2, "N": 2, "D": 8, "fold_div": 2}, "B", "H", "T", "N", "D"),
    axes=("B", "H", "T", "N"),
)

IMPORTANCE = TokenImportance(
    narrow={"keys": {"B": 2, "H": 2, "queries": 18, "keys": 37}},
    head_dims=(1, 64, 80, 256),
    cases={"plain": {"queries": 20, "keys": 20}, "bias": {"queries": 20, "keys": 20, "G": 1, "window": (1, 1, 19)}},
    paths={"few queries": {"queries": 9, "keys": LONG}, "few keys": {"queries": LONG, "keys": 3}},
    lengths=one_long("keys", "queries", [0, *around(BLOCK_Q, BLOCK_K)], 3),
    strided={"plain": {"B": 2, "H": 2, "queries": 20, "keys": 20}},
    far={"B": 2, "H": 2, "queries": 2, "keys": 2},
    empty=without({"queries": 3, "keys": 4}, "B", "H", "queries", "keys"),
)

CODES = NearestCode(
    narrow={"codes": {"B": 19, "codes": 37}},
    head_dims=(1, 3, 16, 33, 64, 200, 256, 257, 1024),
    cases={"codes": {"B": 67, "D": 24, "codes": 70}},
    lengths=one_long("B", "codes", around(BLOCK_Q, BLOCK_K, CPP_TILE), 5),
    strided={"codes": {"B": 2, "H": 35, "D": 24, "codes": 30}},
    far={"B": 2, "H": 2},
    empty=without({"D": 8}, "B", "H"),
    axes=("B", "H"),
)

OPERATORS: list[Operator] = [LEAP, AXIAL, LATENT, NODES, EDGES, MERGE, SHIFT, IMPORTANCE, CODES]


def over(
    field: str, operators: Iterable[Operator] = OPERATORS, marks: Collection[pytest.MarkDecorator] = ()
) -> pytest.MarkDecorator:  # fmt: skip
    """Parametrize by the named sizes of `field` of `operators`."""
    return pytest.mark.parametrize(
        ("operator", "sizes"),
        [
            pytest.param(op, sizes, id=f"{op.name}-{name}", marks=marks)
            for op in operators
            for name, sizes in getattr(op, field).items()
        ],
    )
