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

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._library import define, empty_rows, library, no_second_derivatives, runs_reference
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
    op = "leap_attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(op, name, x)
        _checks.rank(op, name, x, "(B, H, T, N, D)")
        _checks.same(op, "query", query, name, x)
    _checks.head_dim(op, query)
    _checks.integer(op, "leap", leap, least=1)
    _checks.integer(op, "group_size", group_size, least=1)
    _checks.integer(op, "fold_div", fold_div, least=0)
    _checks.dropout(op, dropout_p)
    scale = _checks.scale(op, scale, query.shape[-1])

    seed = random_seed(query.device) if dropout_p > 0 else None
    # Beyond the clip, distances and sizes mean the same as its length: a leap of 10**18 must not overflow.
    frames = max(query.shape[2], 1)
    leap, group_size = min(leap, frames), min(group_size, frames)
    if runs_reference(query):
        out, lse = reference.leap_attention(
            query, key, value, leap, group_size=group_size, fold_div=fold_div, dropout_p=dropout_p, scale=scale,
            return_lse=True, seed=seed,
        )  # fmt: skip
    else:
        out, lse = torch.ops.vattn.leap_attention(query, key, value, leap, group_size, fold_div, dropout_p, seed, scale)
    return (out, lse) if return_lse else out


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from vattn.kernels import leap_attention as kernels

    return kernels.forward(*args)


def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from vattn.kernels import leap_attention as kernels

    return kernels.backward(*args)


def _cuda_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    from vattn.kernels import leap_attention as kernels

    return kernels.jvp(*args)


define(
    "leap_attention(Tensor query, Tensor key, Tensor value, SymInt leap, SymInt group_size, int fold_div, "
    "float dropout_p, Tensor? seed, float scale) -> (Tensor out, Tensor lse)",
    cuda=_cuda,
    autocast=3,
)
define(
    "leap_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor lse, SymInt leap, SymInt group_size, int fold_div, float dropout_p, Tensor? seed, "
    "float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    cuda=_cuda_backward,
)
define(
    "leap_attention_jvp(Tensor query_tangent, Tensor key_tangent, Tensor value_tangent, Tensor query, "
    "Tensor key, Tensor value, Tensor out, Tensor lse, SymInt leap, SymInt group_size, int fold_div, "
    "float dropout_p, Tensor? seed, float scale) -> (Tensor out_tangent, Tensor lse_tangent)",
    cuda=_cuda_jvp,
)
no_second_derivatives("leap_attention_backward", "leap_attention_jvp")


@torch.library.register_fake("vattn::leap_attention", lib=library)
def _fake(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("vattn::leap_attention_backward", lib=library)
def _fake_backward(grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_rows(query), empty_rows(query), empty_rows(query)


@torch.library.register_fake("vattn::leap_attention_jvp", lib=library)
def _fake_jvp(query_tangent: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(query_tangent), query_tangent.new_empty(query_tangent.shape[:-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.settings, seed, scale = inputs
    ctx.scale = scale
    ctx.save_for_backward(query, key, value, *output, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.vattn.leap_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, *ctx.settings, seed, ctx.scale
    )
    return *grads, None, None, None, None, None, None


torch.library.register_autograd("vattn::leap_attention", _backward, setup_context=_setup_context, lib=library)
