"""Attention over a union of key sets from attention over its parts.

With part i giving out_i and lse_i::

    lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

which is exact: it is the online softmax, applied to whole parts. A part with an lse of -inf has no keys: whatever its
out is, it has no weight and no gradient. An lse that is NaN makes out and lse NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vattn.reference.attention import softmax


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.merge_attention`."""
    stacked = torch.stack(list(lses))
    read = stacked != -torch.inf
    weights, lse = softmax(torch.where(read, stacked, -torch.inf), 0)
    parts = [torch.where(some[..., None], o.to(lse.dtype), 0.0) for o, some in zip(outs, read, strict=True)]
    out = sum(o * w[..., None] for o, w in zip(parts, weights, strict=True))
    return out.to(outs[0].dtype), lse
