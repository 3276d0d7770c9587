"""Attention over a union of key sets, from attention over its parts.

    lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

With w_i = exp(lse_i - lse) and gradients g of out and g_lse of lse, the backward is

    d out_i = w_i g,   d lse_i = w_i (<g, out_i - out> + g_lse)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._attention import Attention
from vattn._library import run_reference, runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets into attention over their union, exactly.

    Args:
        outs: at least one output, each ``(..., D)``, of equal shapes and dtypes: float32, bfloat16, float16 or
            float64. Each is the attention of the same queries over other keys.
        lses: as many log-sum-exps of the scaled scores, each ``(...)``, float32 (float64 for float64 outs), as
            `return_lse=True` returns them. -inf stands for a part without keys: it adds nothing and has no gradient,
            whatever its output holds, NaN included. An lse that is NaN makes its row of the results NaN.

    Returns:
        out ``(..., D)`` in the dtype of `outs`, and lse ``(...)``. Where every part is -inf: 0 and -inf.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no parts, as many outs as lses do not match, or shapes that do not fit.

    Source:
        Milakov and Gimelshein, "Online normalizer calculation for softmax", section 3; Dao et al.,
        "FlashAttention", section 3.1.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 1, 6, 8)             # (B, H, T, N, D), one frame of 6 tokens
        >>> whole = vattn.leap_attention(q, k, v, leap=1)
        >>> a = vattn.leap_attention(q, k, v, leap=1, return_lse=True)
        >>> out, lse = merge_attention([a[0], a[0]], [a[1], a[1]])      # every key twice: the same weights
        >>> torch.allclose(out, whole, atol=1e-6)
        True
    """
    op = "merge_attention"
    _check(outs, lses)
    outs, lses = list(outs), list(lses)
    if on_mesh(*outs, *lses):
        return over_mesh(op, outs=outs, lses=lses)
    if runs_reference(outs[0], op):
        return run_reference(reference.merge_attention, outs, lses=lses)
    return _merge(outs, lses)


@once
def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[()]:
    op = "merge_attention"
    outs, lses = _checks.sequence(op, "outs", outs), _checks.sequence(op, "lses", lses)
    if len(outs) != len(lses):
        raise ValueError(f"{op}: lses must be as many as outs ({len(outs)}), got len(lses)={len(lses)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _checks.tensor(op, f"outs[{i}]", out)
        _checks.tensor(op, f"lses[{i}]", lse)
        _checks.same(op, "outs[0]", outs[0], f"outs[{i}]", out)
        wide = torch.promote_types(out.dtype, torch.float32)
        if lse.dtype != wide:
            raise TypeError(f"{op}: lses[{i}] must be {wide}, got lses[{i}].dtype={lse.dtype}")
        if lse.device != out.device:
            raise ValueError(
                f"{op}: lses[{i}] must be on the device of outs[0] ({out.device}), got lses[{i}].device={lse.device}"
            )
        if out.dim() == 0 or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"{op}: lses[{i}] must have the shape of outs[{i}] without its last axis, "
                f"got lses[{i}].shape={tuple(lse.shape)}, outs[{i}].shape={tuple(out.shape)}"
            )
    _checks.head_dim(op, outs[0])
    return ()


def _check_width(outs: list[Tensor], **others: Any) -> None:
    if outs[0].shape[-1] > _checks.MAX_HEAD_DIM:  # rows of nothing merge, too
        raise ValueError(f"merge_attention: head_dim must be at most {_checks.MAX_HEAD_DIM}, got {outs[0].shape[-1]}")


_merge = Attention(
    "merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
    takes={"outs": "... C", "lses": "...: float32"},
    also=_check_width,
    inputs=("outs", "lses"),
    fake=lambda outs, lses: (torch.empty_like(outs[0]), lses[0].new_empty(lses[0].shape)),
    like=lambda name, x: x.new_empty(x.shape) if name == "lses" else torch.empty_like(x),
    autocast=("outs",),
    any_axes=True,
)
