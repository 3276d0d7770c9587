"""Periodic shift: per head, ``D // fold_div`` channels come from the next frame, as many from the last one.

    channel   0 .. fold     x[t+1]    (0 at the last frame)
           fold .. 2 fold   x[t-1]    (0 at the first frame)
         2 fold .. D        x[t]

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022),
on the periodic shift.
"""

from torch import Tensor

from vattn import _checks, reference
from vattn._library import empty_rows, run_reference, runs_reference
from vattn._meshes import on_mesh, over_mesh
from vattn._operator import Operator


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
    if on_mesh(x):
        return over_mesh(op, x=x, fold_div=fold_div)
    return shift(x, fold_div)


def shift(x: Tensor, fold_div: int, transpose: bool = False) -> Tensor:
    """The shift of arguments that have been checked, or its transpose, which is its backward."""
    if runs_reference(x, "periodic_shift"):
        return run_reference(reference.periodic_shift, x, fold_div, transpose)
    return _shift(x, fold_div, transpose)


# The map is linear: its tangent is itself, and its backward its transpose, the same with the directions exchanged.
_shift: Operator = Operator(
    "periodic_shift(Tensor x, SymInt fold_div, bool transpose) -> Tensor out",
    takes={"x": "B H T N C", "fold_div": ">= 1"},
    fake=lambda x, fold_div, transpose: empty_rows(x),
    backward=lambda saved, grads: {"x": _shift(grads[0], saved["fold_div"], not saved["transpose"])},
    jvp=lambda saved, tangents: (_shift(tangents["x"], saved["fold_div"], saved["transpose"]),),
    autocast=("x",),
)
