"""Orders of the tokens of a video: raster, or along a curve that keeps neighbours in space and time together.

A block of edge-sparse attention is a run of tokens in this order: part of a frame's lines in raster order, a small
box of the video along a curve. For a grid of 4 x 4::

    raster                zcurve                hilbert
     0  1  2  3           0  2  8 10           0  1 14 15
     4  5  6  7           1  3  9 11           3  2 13 12
     8  9 10 11           4  6 12 14           4  7  8 11
    12 13 14 15           5  7 13 15           5  6  9 10
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vattn import _checks


def token_order(order: str, window: Sequence[int]) -> Tensor | None:
    """The raster indices of the tokens of a grid, in the order in which a curve meets them.

    Args:
        order: "raster", "zcurve" (bits of the coordinates interlaced, the first axis running fastest) or "hilbert"
            (consecutive tokens are neighbours, in a cube whose side is a power of two).
        window: ``(T, H, W)``, the grid; any number of axes.

    Returns:
        ``(N,)`` int64 on the CPU; None for "raster", which leaves everything where it is.

    Raises:
        TypeError: a size that is not an int.
        ValueError: an unknown order, or a size below 1.

    Source:
        Morton, "A Computer Oriented Geodetic Data Base and a New Technique in File Sequencing" (1966); Skilling,
        "Programming the Hilbert curve" (2004).

    Example:
        >>> token_order("zcurve", (2, 2, 2))
        tensor([0, 4, 2, 6, 1, 5, 3, 7])
        >>> token_order("hilbert", (1, 2, 2))
        tensor([0, 2, 3, 1])
    """
    if order not in TOKEN_ORDERS:
        raise ValueError(f"token_order: order must be one of {', '.join(TOKEN_ORDERS)}, got order={order!r}")
    for size in window:
        _checks.integer("token_order", "window", size, least=1)
    if order == "raster":
        return None
    raster = torch.arange(math.prod(window), device="cpu")
    coordinates = torch.unravel_index(raster, tuple(window))
    bits = max(window).bit_length()
    return (_morton if order == "zcurve" else _hilbert)(list(coordinates), bits).argsort()


TOKEN_ORDERS = ("raster", "zcurve", "hilbert")


def _interlaced(axes: Sequence[Tensor], bits: int) -> Tensor:
    """One number from the bits of several: of each bit, that of the first axis is the highest."""
    number = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            number = 2 * number + (axis >> bit & 1)
    return number


def _morton(axes: Sequence[Tensor], bits: int) -> Tensor:
    """How far along the z-curve a place is."""
    return _interlaced(axes[::-1], bits)


def _hilbert(axes: list[Tensor], bits: int) -> Tensor:
    """How far along the Hilbert curve a place is.

    From the largest cubes down, each cube's curve is turned and mirrored to the pose of the whole one: what is left is
    the Gray code of the distance.
    """
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for i, axis in enumerate(axes):
            is_set = (axis >> bit & 1).bool()
            swapped = (axes[0] ^ axis) & below
            axes[0] = axes[0] ^ torch.where(is_set, below, swapped)
            if i:
                axes[i] = axis ^ swapped.masked_fill(is_set, 0)
    distance = _interlaced(axes, bits)
    shift = 1
    while shift < len(axes) * bits:
        distance = distance ^ distance >> shift
        shift *= 2
    return distance
