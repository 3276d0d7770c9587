"""The periodic shift of frames that lie on several ranks: neighbours exchange the channels that cross their border.

    rank 0             rank 1
    t=0  t=1  t=2      t=3  t=4
                <------ channels [:fold] of t=3, which frame 2 gets
    channels [fold:2 fold] of t=2, which frame 3 gets ------>

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks
from vattn._library import compute_dtype
from vattn.distributed._checks import settings_of
from vattn.distributed._collectives import start_exchange
from vattn.distributed._ranks import Ranks, agree, ranks_of
from vattn.ops.periodic_shift import periodic_shift as shift_here

OP = "distributed.periodic_shift"


def periodic_shift(x: Tensor, fold_div: int, *, group: Any = None, lengths: Sequence[int] | None = None) -> Tensor:
    """:func:`vattn.periodic_shift` with frames sharded over the ranks of a process group.

    With ``fold = D // fold_div`` a rank sends ``B * H * N * fold`` numbers of its first frame to the last rank before
    it that has any frames, and as many of its last frame to the next one (fewer where ``2 * fold > D``); in the
    backward as many back. Its own frames are shifted meanwhile.

    Args:
        x: ``(B, H, T_r, N, D)``: this rank's frames, any number, 0 too.
        fold_div: the share ``1 / fold_div`` of the channels that comes from each side, at least 1. Beyond D no channel
            moves, and nothing is sent.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        lengths: the frames of each rank, where they are known; otherwise the ranks ask each other, and compare their
            settings.

    Returns:
        ``(B, H, T_r, N, D)``, in memory as ``(B, T_r, N, H, D)``: this rank's frames of the shifted clip.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, dtypes or shapes that differ between ranks.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on the periodic
        shift.

    Example:
        >>> frames = torch.randn(1, 2, 3, 4, 8)                     # this rank's part of the clip
        >>> periodic_shift(frames, fold_div=4, group=group).shape
        torch.Size([1, 2, 3, 4, 8])
    """
    ranks = ranks_of(OP, group)

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        _checks.tensor(OP, "x", x)
        _checks.rank(OP, "x", x, "(B, H, T, N, D)")
        _checks.integer(OP, "fold_div", fold_div, least=1)
        return settings_of(OP, "x", x, fold_div=int(fold_div), N=x.shape[3]), [x.shape[2]]

    agreed = agree(OP, ranks, check, None if lengths is None else [lengths])
    return shift(x, fold_div, ranks, agreed.lengths[0])


def shift(x: Tensor, fold_div: int, ranks: Ranks, lengths: Sequence[int]) -> Tensor:
    """The shift of frames that have been checked; `lengths` are those of all ranks."""
    B, H, T, N, D = x.shape
    fold = D // fold_div
    rest = min(2 * fold, D) - fold
    present = [rank for rank, length in enumerate(lengths) if length]
    if fold == 0 or len(present) < 2:
        return shift_here(x, fold_div)
    x = x.to(compute_dtype(x))
    before = [rank for rank in present if rank < ranks.rank][-1:] if T else []  # one neighbour, or none
    after = [rank for rank in present if rank > ranks.rank][:1] if T else []
    first, *_, last = x.split([1, T - 2, 1] if T > 1 else [T, 0], 2)
    last = first if T == 1 else last
    sent, received, borders = [0] * ranks.size, [0] * ranks.size, []
    for rank in before:
        borders.append(first[..., :fold])
        sent[rank], received[rank] = B * H * N * fold, B * H * N * rest
    for rank in after:
        borders.append(last[..., fold : fold + rest])
        sent[rank], received[rank] = B * H * N * rest, B * H * N * fold
    pending = start_exchange(torch.cat([border.flatten() for border in borders or [x]]), ranks, sent, received)
    shifted = shift_here(x, fold_div)
    came = pending.wait()
    if T == 0:
        return torch.cat([shifted, came.view(x.shape)], 2)
    earlier, later = came.split([sum(received[: ranks.rank]), sum(received[ranks.rank :])])
    # In the place of the zeros of a clip that ends with this rank's frames.
    if before:
        shifted[:, :, 0, :, fold : fold + rest] = earlier.view(B, H, N, rest)
    if after:
        shifted[:, :, -1, :, :fold] = later.view(B, H, N, fold)
    return shifted
