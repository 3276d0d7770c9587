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

from torch import Tensor

from vattn import _checks, reference
from vattn._attention import Attention
from vattn._library import run_reference, runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh
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
    dropout_p, scale = _check(query, key, value, dim, dropout_p, scale)
    seed = random_seed(query.device) if dropout_p > 0 else None
    out, lse = attend(query, key, value, dim, dropout_p, seed, scale)
    return (out, lse) if return_lse else out


@once
def _check(
    query: Tensor, key: Tensor, value: Tensor, dim: int, dropout_p: float, scale: float | None
) -> tuple[float, float]:
    """dropout_p and scale of a call that is right."""
    op = "axial_attention"
    _checks.alike(op, "(B, H, *grid, D)", query=query, key=key, value=value)
    _checks.head_dim(op, query)
    axes = query.dim() - 3
    _checks.integer(op, "dim", dim, least=-axes)
    if dim >= axes:
        raise ValueError(f"{op}: dim must be less than the axes of the grid ({axes}), got dim={dim}")
    return _checks.dropout(op, dropout_p), _checks.scale(op, scale, query.shape[-1])


def attend(
    query: Tensor, key: Tensor, value: Tensor, dim: int, dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Out and lse of arguments that have been checked; for `seed`, see :func:`vattn.reference.dropout.numbered`."""
    if on_mesh(query, key, value):
        return over_mesh(
            "axial_attention", query=query, key=key, value=value, dim=dim, dropout_p=dropout_p, seed=seed, scale=scale
        )
    if runs_reference(query, "axial_attention"):
        return run_reference(
            reference.axial_attention, query, key, value, dim, dropout_p=dropout_p, scale=scale, return_lse=True,
            seed=seed,
        )  # fmt: skip
    return _attend(query, key, value, int(dim) % (query.dim() - 3), dropout_p, seed, scale)


def _pairs(query: Tensor, dim: int, **others: Any) -> int:
    return math.prod(query.shape[:-1]) * query.shape[2 + dim]


def _check_dim(query: Tensor, dim: int, **others: Any) -> None:
    if dim >= query.dim() - 3:
        raise ValueError(f"axial_attention: dim must be less than the axes of the grid, got dim={dim}")


_attend = Attention(
    "axial_attention(Tensor query, Tensor key, Tensor value, SymInt dim, float dropout_p, Tensor? seed, float scale) "
    "-> (Tensor out, Tensor lse)",
    takes={**dict.fromkeys(("query", "key", "value"), "B H ... D"), "dim": ">= 0"},
    also=_check_dim,
    tokens="...+...",
    pairs=_pairs,
    autocast=("query", "key", "value"),
)
