"""Which frames of the queue the denoiser reads together, and which of them it writes.

Without lookahead, `partitions` windows of f frames lie side by side. With lookahead, there are twice as many, half a
window apart, and each writes only its second half: the first half is cleaner context. For f = 4 and 2 partitions, where
``r`` is read and ``W`` read and written (the two leftmost frames have left the queue already):

    queue        . . 0 1 2 3 4 5 6 7        cleanest frame first
    window 0     r r W W
    window 1         r r W W
    window 2             r r W W
    window 3                 r r W W

Kim et al., "FIFO-Diffusion" (NeurIPS 2024, arXiv:2405.11473), sections 3.2 (latent partitioning) and 3.3 (lookahead).
"""

from typing import NamedTuple


class Window(NamedTuple):
    """Frames ``[start, stop)`` are read, ``[write, stop)`` are written; numbers count from the front of the queue."""

    start: int
    write: int
    stop: int


def context_frames(frames: int, lookahead: bool) -> int:
    """How many frames that are done stay in front of the queue, as context."""
    return frames // 2 if lookahead else 0


def windows_of(frames: int, partitions: int, lookahead: bool) -> list[Window]:
    """The windows, from the noisiest to the cleanest, which is the official order.

    With lookahead and an odd `frames`, halves of ``frames // 2`` and ``frames // 2 + 1`` frames take turns.

    Example:
        >>> windows_of(3, 1, True)
        [Window(start=1, write=3, stop=4), Window(start=0, write=1, stop=3)]
    """
    if not lookahead:
        return [Window(i * frames, i * frames, (i + 1) * frames) for i in reversed(range(partitions))]
    windows = []
    for i in reversed(range(2 * partitions)):
        start = i // 2 * frames + i % 2 * (frames // 2)
        write = start + frames // 2 + (i % 2) * (frames % 2)
        if write < start + frames:  # one frame has no second half
            windows.append(Window(start, write, start + frames))
    return windows
