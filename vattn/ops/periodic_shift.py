"""Periodic shift: per head, ``D // fold_div`` channels come from the next frame, as many from the last one.

    channel   0 .. fold     x[t+1]    (0 at the last frame)
           fold .. 2 fold   x[t-1]    (0 at the first frame)
         2 fold .. D        x[t]

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022),
on the periodic shift.
"""

from typing import Any

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._library import define, empty_rows, library, runs_reference


def periodic_shift(x: Tensor, fold_div: int) -> Tensor:
    """Exchange some channels of every head between neighbouring frames.

    With ``fold = D // fold_div``, in every head: channels ``[:fold]`` of frame t come from frame t+1, channels
    ``[fold : 2 * fold]`` from frame t-1, the rest stay; frames that do not exist are 0. (The plain shift of
    TSM is the same on merged heads, that is with H = 1.) :func:`vattn.leap_attention` fuses this.

    Args:
        x: ``(B, H, T, N, D)``, float32, bfloat16, float16 or float64, any strides.
        fold_div: the share ``1 / fold_div`` of the channels that comes from each side, at least 1. Beyond D no
            channel moves.

    Returns:
        ``(B, H, T, N, D)``, in memory as ``(B, T, N, H, D)``, so that merging heads is a view.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on the
        periodic shift.

    Example:
        >>> x = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 1, 3, 1, 4)    # frames 0, 1, 2
        >>> periodic_shift(x, fold_div=4)[0, 0, :, 0]
        tensor([[1., 0., 0., 0.],
                [2., 0., 1., 1.],
                [0., 1., 2., 2.]])
    """
    op = "periodic_shift"
    _checks.tensor(op, "x", x)
    _checks.rank(op, "x", x, "(B, H, T, N, D)")
    _checks.integer(op, "fold_div", fold_div, least=1)
    if runs_reference(x):
        return reference.periodic_shift(x, fold_div)
    return torch.ops.vattn.periodic_shift(x, fold_div, False)


def _cuda(x: Tensor, fold_div: int, transpose: bool) -> Tensor:
    from vattn.kernels import periodic_shift as kernels

    return kernels.forward(x, fold_div, transpose)


# The map is linear: its backward is its transpose, which is the same operator with the directions exchanged.
define("periodic_shift(Tensor x, int fold_div, bool transpose) -> Tensor", cuda=_cuda, autocast=1)


@torch.library.register_fake("vattn::periodic_shift", lib=library)
def _fake(x: Tensor, fold_div: int, transpose: bool) -> Tensor:
    return empty_rows(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    _, ctx.fold_div, ctx.transpose = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.vattn.periodic_shift(grad, ctx.fold_div, not ctx.transpose), None, None


torch.library.register_autograd("vattn::periodic_shift", _backward, setup_context=_setup_context, lib=library)
