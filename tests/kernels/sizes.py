"""Sizes around those of tiles.

The interpreter pays for every tile and program, so they are the smallest that have several tiles, of which some
straddle groups and the last ones are not full.
"""

from tests.kernels.cases import Sizes
from vattn.kernels import configs

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
