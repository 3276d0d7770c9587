"""Softmax attention of some queries over some keys, as every operator here uses it.

    s = scale * q k^T + bias,  lse = log sum_k exp(s),  out = sum_k exp(s - lse) v

A query that may read no key at all gives 0, and lse = -inf. What is not finite reaches what this formula, over the keys
that a query reads, lets it reach, and nothing else.
"""

import torch
from torch import Tensor

from vattn.reference.products import pair_products, sums_over_pairs


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    read: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Args:
        query: ``(..., Lq, D)``. key, value: ``(..., Lk, D)``.
        scale: factor of the scores.
        bias: added to the scaled scores, broadcastable to ``(..., Lq, Lk)``.
        read: bool, broadcastable to ``(..., Lq, Lk)``: which query reads which key; None: each reads all.
        keep: bool, broadcastable to ``(..., Lq, Lk)``: the weights that dropout keeps.
        dropout_p: kept weights are divided by ``1 - dropout_p``.

    Returns:
        out ``(..., Lq, D)`` in the dtype of `query`; lse ``(..., Lq)`` in float32 (float64 for float64).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = pair_products(query, key, read).to(wide) * scale
    if bias is not None:
        scores = scores + bias
    if read is not None:
        scores = torch.where(read, scores, -torch.inf)
    weights, lse = softmax(scores, -1)
    if keep is not None:
        weights = weights * keep / (1 - dropout_p) if dropout_p < 1 else weights * 0
    return sums_over_pairs(weights.to(query.dtype), value, read), lse


def softmax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The softmax of `x` along `dim` and its log-sum-exp; where all of `x` is -inf, 0 and -inf, without NaN.

    (torch.logsumexp has a NaN gradient there, and torch.softmax a NaN value.)
    """
    if x.shape[dim] == 0:
        return x, x.sum(dim) - torch.inf
    peak = x.detach().amax(dim, keepdim=True)
    powers = torch.exp(x - torch.where(peak == -torch.inf, 0.0, peak))
    total = powers.sum(dim, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, total.log() + peak)
    return powers / total, lse.squeeze(dim)
