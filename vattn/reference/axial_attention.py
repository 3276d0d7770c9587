"""Axial attention: every token of a grid reads the tokens of its line along one axis.

Ho et al., "Axial Attention in Multidimensional Transformers" (2019); VideoGPT (Yan et al., 2021) uses it in its VQ-VAE.
Along ``dim=1`` of a grid of 3 rows of 4 columns (its columns are A B C D along ``dim=0``)::

    A  A  A  A          each row is a line, and attends to itself
    B  B  B  B
    C  C  C  C
"""

import math

from torch import Tensor

from vattn.reference.attention import attention
from vattn.reference.dropout import dropout_keep, numbered, random_seed


def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dim: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.axial_attention`; `seed` repeats a dropout mask."""
    B, H, *grid, D = query.shape
    axis = dim % len(grid)
    q, k, v = (x.movedim(2 + axis, -2) for x in (query, key, value))
    keep = None
    if dropout_p > 0:
        seed = random_seed(query.device) if seed is None else seed
        seed, bh, *numbers = numbered(seed, B * H, math.prod(grid), math.prod(grid))
        rows, columns = (x.view(grid).movedim(axis, -1) for x in numbers)
        bh = bh.view(B, H, *[1] * (len(grid) + 1))
        keep = dropout_keep(seed, bh, rows[..., :, None], columns[..., None, :], dropout_p)
    scale = D**-0.5 if scale is None else scale
    out, lse = attention(q, k, v, scale=scale, keep=keep, dropout_p=dropout_p)
    out, lse = out.movedim(-2, 2 + axis), lse.movedim(-1, 2 + axis)
    out = out.movedim(1, -2).contiguous().movedim(-2, 1)  # heads beside channels, as every operator returns
    return (out, lse) if return_lse else out
