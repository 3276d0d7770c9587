"""Attention over a union of key sets from attention over its parts.

With part i giving out_i and lse_i::

    lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

which is exact: it is the online softmax, applied to whole parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vattn.reference.attention import softmax


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.merge_attention`."""
    weights, lse = softmax(torch.stack(list(lses)), 0)
    out = sum(o.to(w.dtype) * w[..., None] for o, w in zip(outs, weights, strict=True))
    return out.to(outs[0].dtype), lse
