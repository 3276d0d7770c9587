"""Leap attention: the tokens of a few frames, `leap` apart, attend to each other.

    base(t)  = t // (leap * group_size) * leap * group_size + t % leap
    group(t) = {base + j * leap : j < group_size, base + j * leap < T}
    out[t]   = softmax(scale * q[t] k[group(t)]^T) v[group(t)]

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
With ``leap=2, group_size=2`` frame 0 attends to itself and to frame 2, frame 1 to itself and to frame 3::

    0  1  2  3 | 4  5  6  7
    A  B  A  B   C  D  C  D
"""

from typing import Any

from torch import Tensor

from vattn import _checks, reference
from vattn._attention import Attention
from vattn._library import run_reference, runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh
from vattn.reference.dropout import random_seed


def leap_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    leap: int,
    *,
    group_size: int = 2,
    fold_div: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within leap groups of frames, with an optional fused periodic shift.

    Frames ``base + j * leap`` for ``j < group_size``, where
    ``base = t // (leap * group_size) * (leap * group_size) + t % leap``, form one group, and every token of a
    group attends to all tokens of that group. ``group_size=2`` is LAPS's leap pair, ``group_size=1`` attention
    within each frame, ``leap=1, group_size=T`` joint space-time attention. A last, incomplete group is simply
    smaller. Level l of the paper is ``leap = T // 2**l``.

    Args:
        query, key, value: ``(B, H, T, N, D)``: T frames of N tokens each, float32, bfloat16, float16 or
            float64, any strides (a last axis that is not contiguous costs one copy). D is at most 256.
        leap: distance in frames between the members of a group, at least 1.
        group_size: how many frames form a group, at least 1.
        fold_div: if positive, :func:`vattn.periodic_shift` with this divisor is applied to the output,
            inside the kernel. Beyond D it shifts no channel.
        dropout_p: probability of dropping an attention weight; the seed comes from torch's generator.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, T, N, D)``, in memory as ``(B, T, N, H, D)``, so that merging heads with
        ``out.movedim(1, -2).flatten(-2)`` is a view. With `return_lse` also lse ``(B, H, T, N)`` in float32
        (float64 for float64 inputs), natural logarithm, not shifted.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on leap attention
        and on the periodic shift.

    Example:
        >>> qkv = torch.randn(2, 8, 49, 3, 4, 16)                   # (B, T, N, 3, H, D), as from a linear layer
        >>> q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)                 # three (B, H, T, N, D) views
        >>> out = leap_attention(q, k, v, leap=4, fold_div=4)
        >>> out.movedim(1, -2).flatten(-2).shape                    # (B, T, N, H * D), no copy
        torch.Size([2, 8, 49, 64])
    """
    dropout_p, scale = _check(query, key, value, leap, group_size, fold_div, dropout_p, scale)
    seed = random_seed(query.device) if dropout_p > 0 else None
    out, lse = attend(query, key, value, leap, group_size, fold_div, dropout_p, seed, scale)
    return (out, lse) if return_lse else out


@once
def _check(
    query: Tensor, key: Tensor, value: Tensor, leap: int, group_size: int, fold_div: int, dropout_p: float,
    scale: float | None,
) -> tuple[float, float]:  # fmt: skip
    """dropout_p and scale of a call that is right."""
    op = "leap_attention"
    _checks.alike(op, "(B, H, T, N, D)", query=query, key=key, value=value)
    _checks.head_dim(op, query)
    _checks.integer(op, "leap", leap, least=1)
    _checks.integer(op, "group_size", group_size, least=1)
    _checks.integer(op, "fold_div", fold_div, least=0)
    return _checks.dropout(op, dropout_p), _checks.scale(op, scale, query.shape[-1])


def attend(
    query: Tensor, key: Tensor, value: Tensor, leap: int, group_size: int, fold_div: int, dropout_p: float,
    seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out and lse of arguments that have been checked; for `seed`, see :func:`vattn.reference.dropout.numbered`."""
    if on_mesh(query, key, value):
        return over_mesh(
            "leap_attention", query=query, key=key, value=value, leap=leap, group_size=group_size, fold_div=fold_div,
            dropout_p=dropout_p, seed=seed, scale=scale,
        )  # fmt: skip
    # Beyond the clip, distances and sizes mean the same as its length: a leap of 10**18 must not overflow.
    frames = max(query.shape[2], 1)
    leap, group_size = min(leap, frames), min(group_size, frames)
    if runs_reference(query, "leap_attention"):
        return run_reference(
            reference.leap_attention, query, key, value, leap, group_size=group_size, fold_div=fold_div,
            dropout_p=dropout_p, scale=scale, return_lse=True, seed=seed,
        )  # fmt: skip
    return _attend(query, key, value, leap, group_size, fold_div, dropout_p, seed, scale)


def _pairs(query: Tensor, leap: int, group_size: int, **others: Any) -> int:
    B, H, T, N, _ = query.shape
    whole, rest = divmod(T, leap * group_size)
    # In the incomplete last stretch, the first frames of `leap` have one companion more than the others.
    most, more = divmod(rest, leap)
    frames = whole * leap * group_size**2 + more * (most + 1) ** 2 + (leap - more) * most**2
    return B * H * frames * N**2


_attend = Attention(
    "leap_attention(Tensor query, Tensor key, Tensor value, SymInt leap, SymInt group_size, SymInt fold_div, "
    "float dropout_p, Tensor? seed, float scale) -> (Tensor out, Tensor lse)",
    takes={
        **dict.fromkeys(("query", "key", "value"), "B H T N D"),
        "leap": ">= 1",
        "group_size": ">= 1",
        "fold_div": ">= 0",
    },
    tokens="T*N+T*N",
    pairs=_pairs,
    autocast=("query", "key", "value"),
)
