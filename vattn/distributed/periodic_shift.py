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
from vattn.distributed._checks import asks, settings_of
from vattn.distributed._ranks import Ranks, agree, ranks_of
from vattn.ops.periodic_shift import shift as shift_here

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
        return settings_of(OP, "x", x, fold_div=int(fold_div), N=x.shape[3], requires_grad=asks(x)), [x.shape[2]]

    agreed = agree(OP, ranks, check, None if lengths is None else [lengths])
    return shift(x, fold_div, ranks, agreed.lengths[0])


def shift(x: Tensor, fold_div: int, ranks: Ranks, lengths: Sequence[int]) -> Tensor:
    """The shift of frames that have been checked; `lengths` are those of all ranks."""
    if x.shape[-1] < fold_div or sum(map(bool, lengths)) < 2:  # nothing crosses
        return shift_here(x, fold_div)
    return _apply(x.to(compute_dtype(x)), int(fold_div), False, ranks, tuple(lengths))


class _Shift(torch.autograd.Function):
    """The map is linear: its tangent is itself, and its backward its transpose, with the directions exchanged.

    One function, and not one of its parts after the other: those would go over all frames again in the backward.
    """

    @staticmethod
    def forward(x: Tensor, fold_div: int, transpose: bool, ranks: Ranks, lengths: tuple[int, ...]) -> Tensor:
        B, H, T, N, D = x.shape
        fold = D // fold_div
        to_before, to_after = slice(0, fold), slice(fold, min(2 * fold, D))
        if transpose:
            to_before, to_after = to_after, to_before
        present = [rank for rank, length in enumerate(lengths) if length and T]
        before = [rank for rank in present if rank < ranks.rank][-1:]  # one neighbour, or none
        after = [rank for rank in present if rank > ranks.rank][:1]
        there, back = (B * H * N * (some.stop - some.start) for some in (to_before, to_after))
        sent, received, borders = [0] * ranks.size, [0] * ranks.size, [x.new_empty(0)]
        for rank in before:
            borders.append(x[:, :, 0, :, to_before].flatten())
            sent[rank], received[rank] = there, back
        for rank in after:
            borders.append(x[:, :, -1, :, to_after].flatten())
            sent[rank], received[rank] = back, there
        started = ranks.start_exchange(torch.cat(borders), sent, received)
        shifted = shift_here(x, fold_div, transpose)
        earlier, later = ranks.wait(started).split([sum(received[: ranks.rank]), sum(received[ranks.rank :])])
        # In the place of the zeros of a clip that ends with this rank's frames.
        if before:
            shifted[:, :, 0, :, to_after] = earlier.view(B, H, N, to_after.stop - to_after.start)
        if after:
            shifted[:, :, -1, :, to_before] = later.view(B, H, N, to_before.stop - to_before.start)
        return shifted

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.fold_div, ctx.transpose, ctx.ranks, ctx.lengths = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _apply(grads[0], ctx.fold_div, not ctx.transpose, ctx.ranks, ctx.lengths), None, None, None, None


class _ShiftWithTangent(_Shift):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _apply(tangents[0], ctx.fold_div, ctx.transpose, ctx.ranks, ctx.lengths)


def _apply(x: Tensor, fold_div: int, transpose: bool, ranks: Ranks, lengths: tuple[int, ...]) -> Tensor:
    # Dynamo refuses a function with a jvp.
    function = _Shift if torch.compiler.is_compiling() else _ShiftWithTangent
    return function.apply(x, fold_div, transpose, ranks, lengths)
