"""Softmax attention of some queries over some keys, as every operator here uses it.

    s = scale * q k^T + bias,  lse = log sum_k exp(s),  out = sum_k exp(s - lse) v

A query that may read no key at all gives 0, and lse = -inf.
"""

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Args:
        query: ``(..., Lq, D)``. key, value: ``(..., Lk, D)``.
        scale: factor of the scores.
        bias: added to the scaled scores, broadcastable to ``(..., Lq, Lk)``; -inf forbids.
        keep: bool, broadcastable to ``(..., Lq, Lk)``: the weights that dropout keeps.
        dropout_p: kept weights are divided by ``1 - dropout_p``.

    Returns:
        out ``(..., Lq, D)`` in the dtype of `query`; lse ``(..., Lq)`` in float32 (float64 for float64).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2)).to(wide) * scale
    if bias is not None:
        scores = scores + bias
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
        return query * 0, lse
    lse = torch.logsumexp(scores, -1)
    # exp(-inf - 0) is 0 where exp(-inf - -inf) would be NaN.
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    if keep is not None:
        weights = weights * keep / (1 - dropout_p) if dropout_p < 1 else weights * 0
    return weights.to(query.dtype) @ value, lse
