"""Tile sizes: a checked-in table by architecture, pass and row width, never a search at run time.

Chosen from ``benchmarks/kernel_report.py``, which compiles every kernel for every architecture here: large tiles
whose state fits the registers, where there are such, with the warps that the matrix instructions want. They have
been compiled for that, and few have been timed.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vattn.kernels import flash, launch


class Tiles(NamedTuple):
    """Rows of a query tile and of a key tile, and how a program runs them."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# Architecture -> pass -> widest row in bytes -> tiles. A row of head dim 80 in bfloat16 is 64 + 16 columns: 160.
# Where a program owns rows of one group, such as a block of 56 tokens, more than 64 would stay empty.
TABLE: dict[str, dict[str, dict[int, Tiles]]] = {
    "sm80": {
        "forward": {
            128: Tiles(128, 64, 8, 3), 192: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2),
            384: Tiles(64, 32, 8, 2), 512: Tiles(64, 32, 8, 1), 1024: Tiles(32, 16, 4, 1),
        },
        "backward_query": {
            128: Tiles(128, 64, 8, 2), 192: Tiles(64, 64, 8, 2), 256: Tiles(128, 32, 8, 1),
            384: Tiles(32, 32, 4, 1), 512: Tiles(32, 32, 4, 1), 1024: Tiles(32, 16, 8, 1),
        },
        "backward_key": {
            128: Tiles(64, 64, 8, 2), 192: Tiles(32, 64, 8, 2), 256: Tiles(32, 64, 8, 2),
            384: Tiles(16, 64, 8, 1), 512: Tiles(16, 64, 8, 1), 1024: Tiles(16, 32, 8, 1),
        },
        "forward_group": {
            128: Tiles(64, 64, 4, 2), 192: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 4, 2),
            384: Tiles(64, 32, 4, 2), 512: Tiles(64, 32, 8, 2), 1024: Tiles(32, 16, 4, 1),
        },
        "backward_query_group": {
            128: Tiles(64, 32, 4, 2), 192: Tiles(64, 32, 8, 2), 256: Tiles(64, 32, 8, 2),
            384: Tiles(64, 32, 8, 2), 512: Tiles(64, 32, 8, 1), 1024: Tiles(32, 16, 8, 1),
        },
        "jvp_group": {
            128: Tiles(64, 32, 4, 2), 192: Tiles(64, 32, 8, 2), 256: Tiles(64, 32, 8, 2),
            384: Tiles(64, 32, 8, 2), 512: Tiles(32, 32, 4, 1), 1024: Tiles(32, 16, 8, 1),
        },
        "backward_key_group": {
            128: Tiles(16, 64, 4, 2), 192: Tiles(16, 64, 4, 2), 256: Tiles(32, 64, 8, 2),
            384: Tiles(32, 64, 8, 2), 512: Tiles(16, 64, 8, 1), 1024: Tiles(16, 32, 8, 1),
        },
    },
    "sm90": {
        "forward": {
            128: Tiles(128, 64, 8, 3), 192: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 4, 3),
            384: Tiles(64, 32, 4, 3), 512: Tiles(64, 32, 4, 2), 1024: Tiles(32, 32, 8, 1),
        },
        "backward_query": {
            128: Tiles(128, 64, 8, 3), 192: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 4, 3),
            384: Tiles(64, 32, 4, 3), 512: Tiles(64, 16, 4, 2), 1024: Tiles(32, 32, 8, 1),
        },
        "jvp": {
            128: Tiles(128, 32, 8, 3), 192: Tiles(128, 32, 8, 3), 256: Tiles(64, 16, 4, 3),
            384: Tiles(64, 16, 4, 2), 512: Tiles(64, 16, 4, 1), 1024: Tiles(32, 16, 8, 1),
        },
        "backward_key": {
            128: Tiles(32, 64, 4, 3), 160: Tiles(64, 64, 4, 3), 192: Tiles(32, 64, 4, 3), 256: Tiles(32, 64, 4, 3),
            384: Tiles(16, 64, 4, 3), 512: Tiles(32, 64, 8, 2), 1024: Tiles(16, 32, 8, 1),
        },
        "forward_group": {
            128: Tiles(64, 32, 4, 3), 192: Tiles(64, 32, 4, 3), 256: Tiles(64, 32, 4, 3),
            384: Tiles(64, 32, 4, 3), 512: Tiles(64, 32, 8, 2), 1024: Tiles(64, 16, 8, 2),
        },
        "backward_query_group": {
            128: Tiles(64, 32, 4, 3), 192: Tiles(64, 32, 4, 3), 256: Tiles(64, 32, 4, 3),
            384: Tiles(64, 16, 4, 3), 512: Tiles(64, 16, 8, 2), 1024: Tiles(64, 16, 8, 2),
        },
        "forward_bias": {128: Tiles(64, 16, 4, 3)},
        "backward_query_bias": {128: Tiles(64, 16, 4, 3), 192: Tiles(64, 16, 4, 3), 256: Tiles(32, 32, 4, 2)},
        "jvp_bias": {
            128: Tiles(64, 16, 4, 3), 192: Tiles(64, 16, 4, 2), 256: Tiles(16, 32, 4, 1), 384: Tiles(16, 32, 4, 1),
        },
        "backward_key_bias": {
            128: Tiles(32, 64, 4, 3), 192: Tiles(16, 64, 4, 2), 256: Tiles(32, 32, 4, 2), 384: Tiles(32, 32, 4, 1),
        },
        "jvp_group": {
            128: Tiles(64, 32, 4, 3), 192: Tiles(64, 16, 4, 3), 256: Tiles(64, 16, 4, 3),
            384: Tiles(64, 16, 4, 2), 512: Tiles(64, 16, 8, 2), 1024: Tiles(64, 16, 8, 2),
        },
        "backward_key_group": {
            128: Tiles(32, 64, 4, 3), 160: Tiles(32, 64, 4, 3), 192: Tiles(16, 64, 4, 3), 256: Tiles(16, 64, 4, 3),
            384: Tiles(16, 64, 4, 2), 512: Tiles(16, 64, 8, 2), 1024: Tiles(16, 64, 8, 2),
        },
    },
    "sm100": {
        "forward": {
            128: Tiles(128, 128, 8, 2), 192: Tiles(128, 64, 8, 2), 256: Tiles(128, 64, 8, 2),
            384: Tiles(64, 64, 8, 2), 512: Tiles(64, 64, 8, 2), 1024: Tiles(32, 32, 8, 1),
        },
        "backward_query": {
            128: Tiles(128, 64, 8, 2), 192: Tiles(128, 64, 8, 2), 256: Tiles(128, 64, 8, 2),
            384: Tiles(128, 32, 8, 1), 512: Tiles(128, 32, 8, 1), 1024: Tiles(32, 32, 8, 1),
        },
        "backward_key": {
            128: Tiles(64, 128, 8, 2), 192: Tiles(32, 128, 8, 2), 256: Tiles(32, 128, 8, 2),
            384: Tiles(32, 64, 8, 1), 512: Tiles(32, 64, 8, 1), 1024: Tiles(16, 32, 8, 1),
        },
        "forward_group": {
            128: Tiles(64, 32, 4, 3), 192: Tiles(64, 32, 4, 3), 256: Tiles(64, 32, 4, 3),
            384: Tiles(64, 32, 4, 2), 512: Tiles(64, 32, 8, 2), 1024: Tiles(32, 32, 8, 1),
        },
        "backward_query_group": {
            128: Tiles(64, 32, 4, 2), 192: Tiles(64, 32, 8, 2), 256: Tiles(64, 32, 8, 2),
            384: Tiles(64, 32, 8, 2), 512: Tiles(64, 32, 8, 1), 1024: Tiles(32, 32, 8, 1),
        },
        "backward_key_group": {
            128: Tiles(32, 64, 4, 2), 192: Tiles(32, 64, 4, 2), 256: Tiles(16, 64, 4, 2),
            384: Tiles(16, 64, 4, 2), 512: Tiles(16, 64, 4, 2), 1024: Tiles(16, 32, 8, 1),
        },
    },
    "gfx942": {
        "forward": {
            128: Tiles(128, 64, 4, 2), 192: Tiles(128, 64, 8, 1), 256: Tiles(128, 64, 8, 1),
            384: Tiles(64, 32, 8, 1), 512: Tiles(64, 32, 8, 1), 1024: Tiles(32, 16, 4, 1),
        },
        "backward_query": {
            128: Tiles(64, 64, 4, 1), 192: Tiles(64, 32, 4, 1), 256: Tiles(64, 32, 4, 1),
            384: Tiles(64, 32, 8, 1), 512: Tiles(32, 32, 8, 1), 1024: Tiles(32, 16, 4, 1),
        },
        "backward_key": {
            128: Tiles(64, 64, 4, 1), 192: Tiles(32, 64, 4, 1), 256: Tiles(32, 64, 4, 1),
            384: Tiles(32, 64, 8, 1), 512: Tiles(16, 64, 8, 1), 1024: Tiles(16, 32, 4, 1),
        },
        "forward_group": {
            128: Tiles(64, 32, 4, 1), 192: Tiles(64, 16, 4, 1), 256: Tiles(64, 16, 4, 1),
            384: Tiles(64, 16, 4, 1), 512: Tiles(64, 16, 4, 1), 1024: Tiles(32, 16, 4, 1),
        },
        "backward_query_group": {
            128: Tiles(64, 16, 4, 1), 192: Tiles(64, 16, 4, 1), 256: Tiles(64, 16, 4, 1),
            384: Tiles(64, 16, 4, 1), 512: Tiles(64, 16, 4, 1), 1024: Tiles(32, 16, 4, 1),
        },
        "backward_key_group": {
            128: Tiles(16, 64, 4, 1), 192: Tiles(16, 64, 4, 1), 256: Tiles(16, 64, 4, 1),
            384: Tiles(16, 64, 4, 1), 512: Tiles(16, 64, 4, 1), 1024: Tiles(16, 32, 4, 1),
        },
    },
}  # fmt: skip

# The same of float32 on NVIDIA, each of whose factors is two tf32 numbers: those of the own rows stay in registers, and
# more warps do not help. Groups take the same tiles.
FLOAT32: dict[str, dict[str, dict[int, Tiles]]] = {
    "sm80": {
        "forward": {
            256: Tiles(64, 16, 4, 2), 384: Tiles(64, 16, 4, 2), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
        "backward_query": {
            256: Tiles(64, 16, 4, 2), 384: Tiles(16, 16, 4, 1), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
        "backward_key": {
            256: Tiles(16, 32, 4, 2), 384: Tiles(16, 16, 4, 1), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
    },
    "sm90": {
        "forward": {
            256: Tiles(64, 32, 4, 2), 384: Tiles(64, 16, 4, 2), 512: Tiles(64, 16, 4, 2), 1024: Tiles(16, 16, 8, 1),
        },
        "backward_query": {
            256: Tiles(64, 16, 4, 2), 384: Tiles(64, 16, 4, 2), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
        "backward_key": {
            256: Tiles(16, 32, 4, 2), 384: Tiles(16, 64, 4, 2), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
    },
    "sm100": {
        "forward": {
            256: Tiles(64, 16, 4, 2), 384: Tiles(64, 16, 4, 2), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
        "backward_query": {
            256: Tiles(64, 16, 4, 2), 384: Tiles(16, 16, 4, 1), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
        "backward_key": {
            256: Tiles(16, 32, 4, 2), 384: Tiles(16, 16, 4, 1), 512: Tiles(16, 16, 4, 1), 1024: Tiles(16, 16, 8, 1),
        },
    },
}  # fmt: skip

# Where all keys fill one tile, and stay on chip with their values: by architecture and widest row of 16-bit elements.
# The shared memory of gfx942 has no room for them, nor have the registers for those of float32.
DECODE: dict[str, dict[int, Tiles]] = {
    "sm80": {128: Tiles(64, 256, 8, 1)},
    "sm90": {128: Tiles(64, 256, 4, 3), 256: Tiles(64, 256, 4, 1)},
    "sm100": {128: Tiles(128, 256, 8, 1), 256: Tiles(64, 256, 8, 1)},
    "gfx942": {},
}

# Where a program owns whole lines: by architecture and pass the tiles from the smallest on, for rows up to a width. A
# backward has three accumulators beside two tiles of scores, and does best with few rows.
LINES: dict[str, dict[str, tuple[Tiles, ...]]] = {
    "sm90": {
        "forward": (Tiles(32, 32, 4, 1), Tiles(64, 64, 4, 1)),
        "backward": (Tiles(32, 32, 4, 1), Tiles(64, 64, 4, 1)),
        "jvp": (Tiles(32, 32, 4, 1), Tiles(64, 64, 4, 1)),
    },
}
LINES_WIDEST = 256

# The interpreter pays for each tile, not for its size, and tests want several tiles of unequal sides.
INTERPRETER = Tiles(16, 32, 4, 1)
INTERPRETER_DECODE = Tiles(16, 256, 4, 1)
INTERPRETER_MULTIPROCESSORS = 4

MATRIX_ROWS = 16  # the fewest that a matrix instruction takes

PROGRAMS_OF_MULTIPROCESSOR = 2  # that it has room for, whatever their kernel
MAX_SPLITS = 16
TILES_WORTH_A_SPLIT = 4  # fewer are read sooner than partial results are merged


@functools.cache
def architecture(device: torch.device) -> str:
    """The name in the table of the architecture nearest to `device`."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x, a small Blackwell, has the shared memory and the matrix instructions of Ampere.
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def tiles(phase: str, like: Tensor, extras: int, kind: str = "") -> dict[str, int]:
    """Tile sizes, warps and stages for `phase` on rows of the last axis of `like`.

    `extras` counts what wants registers beside the rows, as half as wide rows again do: the hash of dropout, a bias.
    `kind` is "group" where a program owns some of a group of gathered rows, and "bias" where such rows have a bias.
    """
    if like.device.type == "cpu":
        return INTERPRETER._asdict()
    return _tiles(phase, architecture(like.device), like.element_size(), like.shape[-1], extras, kind)._asdict()


@functools.cache
def _tiles(phase: str, place: str, element_size: int, head_dim: int, extras: int, kind: str) -> Tiles:
    table = TABLE[place]
    if element_size == 4 and place in FLOAT32:
        table, extras, kind = FLOAT32[place], extras + (kind == "bias"), ""
    names = [(name, more) for name, more in _names(phase, kind) if name in table]
    for name, more in names:
        found = _narrowest(table[name], _width(element_size, head_dim, extras + more))
        if found is not None:
            return found
    widest = table[names[-1][0]]
    return widest[max(widest)]


def _names(phase: str, kind: str) -> Iterator[tuple[str, int]]:
    """Where to look for tiles, the most special first, and the extras that count there in addition.

    A tangent takes what the gradient of queries takes; a bias counts like dropout, unless the table has its own entry.
    """
    for name in (phase, "backward_query") if phase == "jvp" else (phase,):
        if kind == "bias":
            yield f"{name}_bias", 0
        yield (f"{name}_group" if kind else name), int(kind == "bias")


def decode_tiles(like: Tensor, dropout: bool, keys: int) -> dict[str, int] | None:
    """:func:`tiles` whose key tile is that of all `keys` rows; None if there is none, or half of it would be empty.

    The hash of dropout for so many keys wants registers as rows twice as wide do.
    """
    if like.device.type == "cpu":
        found = INTERPRETER_DECODE
    elif like.element_size() == 2:
        width = _width(like.element_size(), like.shape[-1], extras=2 * dropout)
        found = _narrowest(DECODE[architecture(like.device)], width)
    else:
        found = None
    return found._asdict() if found is not None and found.BLOCK_K // 2 < keys <= found.BLOCK_K else None


def _narrowest(table: dict[int, Tiles], width: int) -> Tiles | None:
    """The entry of the narrowest rows that are `width` bytes wide."""
    return next((found for widest, found in table.items() if width <= widest), None)


def _width(element_size: int, head_dim: int, extras: int) -> int:
    """The bytes of a row of so many elements of so many bytes, with its `extras`."""
    width = flash.shape(head_dim, alignment=1).width * element_size
    return width + extras * width // 2


def group_tiles(phase: str, like: Tensor, extras: int, rows: int, kind: str = "group") -> dict[str, int]:
    """:func:`tiles` where a program owns some of a group of `rows` rows, which may be few."""
    found = tiles(phase, like, extras, kind)
    if like.device.type != "cpu":
        side = "BLOCK_K" if phase == "backward_key" else "BLOCK_Q"
        found[side] = min(found[side], max(MATRIX_ROWS, flash.next_power_of_2(rows)))
    return found


def line_tiles(phase: str, like: Tensor, extras: int, line: int) -> dict[str, int] | None:
    """Tiles for whole lines of `line` tokens, with as many keys as queries, and no loop to be staged; or None.

    `phase` is "forward", "backward" or "jvp".
    """
    table = {} if like.device.type == "cpu" else LINES.get(architecture(like.device), {})
    if phase in table and _width(like.element_size(), like.shape[-1], extras) <= LINES_WIDEST:
        squares = [found._asdict() for found in table[phase]]
    else:
        found = tiles(phase.replace("backward", "backward_query"), like, extras)
        block = min(found["BLOCK_Q"], found["BLOCK_K"])
        squares = [found | {"BLOCK_Q": block, "BLOCK_K": block, "num_stages": 1}]
    return next((square for square in squares if line <= square["BLOCK_Q"]), None)


def own_and_other(phase: str, tiles: dict[str, int]) -> tuple[int, int]:
    """Rows of a tile that a program owns, and of those that it reads."""
    blocks = tiles["BLOCK_Q"], tiles["BLOCK_K"]
    return blocks[::-1] if phase == "backward_key" else blocks


def splits(programs: int, reads: int, like: Tensor) -> int:
    """Among how many programs to share out the `reads` tiles that each of `programs` would read, to fill a device.

    A power of two: the kernel that merges partial results is compiled for their number.
    """
    room = _room(like) // max(programs, 1)
    return 1 << max(1, min(room, reads // TILES_WORTH_A_SPLIT, MAX_SPLITS)).bit_length() - 1


def walk(tiles: int, like: Tensor) -> int:
    """How many of `tiles` tiles, one after the other, are left for each program that a device has room for."""
    return max(1, launch.cdiv(tiles, _room(like)))


def _room(like: Tensor) -> int:
    """The programs that the device of `like` has room for."""
    return PROGRAMS_OF_MULTIPROCESSOR * (_multiprocessors(like.device) if like.is_cuda else INTERPRETER_MULTIPROCESSORS)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
