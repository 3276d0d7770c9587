"""Axial attention: the tokens of a grid attend along one of its axes.

    out[.., i, ..] = softmax(scale * q[.., i, ..] k[.., :, ..]^T) v[.., :, ..]

Ho et al., "Axial Attention in Multidimensional Transformers" (2019). The VQ-VAE of VideoGPT (Yan et al., "VideoGPT:
Video Generation using VQ-VAE and Transformers", 2021) attends along width, height and time, and adds the three. In a
grid of 2 frames of 3 x 4 tokens, letters name the lines::

    dim=2 (width)         dim=1 (height)        dim=0 (time)
    AAAA  DDDD            ABCD  EFGH            ABCD  ABCD
    BBBB  EEEE            ABCD  EFGH            EFGH  EFGH
    CCCC  FFFF            ABCD  EFGH            IJKL  IJKL
"""

import math
from typing import Any

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._library import define, empty_rows, library, no_second_derivatives, runs_reference
from vattn.reference.dropout import random_seed


def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dim: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention along one axis of a grid: every token reads the tokens that differ from it in that axis only.

    Lines may be short and very many; they are read where they lie, without a permutation and without padding.

    Args:
        query, key, value: ``(B, H, *grid, D)``: a grid of one axis or more, such as ``(T, height, width)``, float32,
            bfloat16, float16 or float64. D is at most 256. Any strides with which the axes before `dim` are a view of
            one, and those behind it too, as they are where the tokens lie in raster order; any others, and a last
            axis that is not contiguous, cost one copy.
        dim: the axis of the grid along which tokens attend: 0 is the first one, and -1 the last one.
        dropout_p: probability of dropping an attention weight; the seed comes from torch's generator.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, *grid, D)``, in memory as ``(B, *grid, H, D)``, so that merging heads with
        ``out.movedim(1, -2).flatten(-2)`` is a view. With `return_lse` also lse ``(B, H, *grid)`` in float32 (float64
        for float64 inputs), natural logarithm.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Source:
        Ho et al., "Axial Attention in Multidimensional Transformers"; Yan et al., "VideoGPT: Video Generation using
        VQ-VAE and Transformers", on the encoder and the decoder.

    Example:
        >>> x = torch.randn(1, 4, 8, 8, 2, 3, 16)                           # (B, T, height, width, H, 3, D)
        >>> q, k, v = (part.movedim(-2, 1) for part in x.unbind(-2))        # three (B, H, T, height, width, D) views
        >>> out = sum(axial_attention(q, k, v, dim) for dim in range(3))
        >>> out.movedim(1, -2).flatten(-2).shape                            # (B, T, height, width, H * D), no copy
        torch.Size([1, 4, 8, 8, 32])
    """
    op = "axial_attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(op, name, x)
        if x.dim() < 4:
            raise ValueError(f"{op}: {name} must have shape (B, H, *grid, D), got {name}.shape={tuple(x.shape)}")
        _checks.same(op, "query", query, name, x)
    _checks.head_dim(op, query)
    grid = query.shape[2:-1]
    _checks.integer(op, "dim", dim, least=-len(grid))
    if dim >= len(grid):
        raise ValueError(f"{op}: dim must be less than the axes of the grid ({len(grid)}), got dim={dim}")
    _checks.dropout(op, dropout_p)
    scale = _checks.scale(op, scale, query.shape[-1])

    seed = random_seed(query.device) if dropout_p > 0 else None
    if runs_reference(query, op):
        out, lse = reference.axial_attention(
            query, key, value, dim, dropout_p=dropout_p, scale=scale, return_lse=True, seed=seed
        )
    else:
        axis = int(dim) % len(grid)
        lines = (math.prod(grid[:axis]), grid[axis], math.prod(grid[axis + 1 :]))
        q, k, v = (x.reshape(*x.shape[:2], *lines, x.shape[-1]) for x in (query, key, value))
        out, lse = torch.ops.vattn.axial_attention(q, k, v, dropout_p, seed, scale)
        out, lse = out.view(query.shape), lse.view(query.shape[:-1])
    return (out, lse) if return_lse else out


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from vattn.kernels import axial_attention as kernels

    return kernels.forward(*args)


def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from vattn.kernels import axial_attention as kernels

    return kernels.backward(*args)


def _cuda_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    from vattn.kernels import axial_attention as kernels

    return kernels.jvp(*args)


# The operator sees every grid as (B, H, outer, line, inner, D): the axes before the line are one, and those behind it.
define(
    "axial_attention(Tensor query, Tensor key, Tensor value, float dropout_p, Tensor? seed, float scale) "
    "-> (Tensor out, Tensor lse)",
    cuda=_cuda,
    autocast=3,
)
define(
    "axial_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor lse, float dropout_p, Tensor? seed, float scale) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    cuda=_cuda_backward,
)
define(
    "axial_attention_jvp(Tensor query_tangent, Tensor key_tangent, Tensor value_tangent, Tensor query, "
    "Tensor key, Tensor value, Tensor out, Tensor lse, float dropout_p, Tensor? seed, float scale) "
    "-> (Tensor out_tangent, Tensor lse_tangent)",
    cuda=_cuda_jvp,
)
no_second_derivatives("axial_attention_backward", "axial_attention_jvp")


@torch.library.register_fake("vattn::axial_attention", lib=library)
def _fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("vattn::axial_attention_backward", lib=library)
def _fake_backward(grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_rows(query), empty_rows(query), empty_rows(query)


@torch.library.register_fake("vattn::axial_attention_jvp", lib=library)
def _fake_jvp(query_tangent: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(query_tangent), query_tangent.new_empty(query_tangent.shape[:-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.dropout_p, seed, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.vattn.axial_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, ctx.dropout_p, seed, ctx.scale
    )
    return *grads, None, None, None


torch.library.register_autograd("vattn::axial_attention", _backward, setup_context=_setup_context, lib=library)
