"""Selection of tokens: the most important ones stay, in their old order.

SViTT (Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers"), on node sparsity::

    importance   .1 .4 .2 .4 .3         keep=3: tokens 1, 3 and 4
"""

import math

import torch
from torch import Tensor


def select_tokens(
    tokens: Tensor,
    importance: Tensor,
    keep: float,
    *,
    positions: Tensor | None = None,
    num_global: int = 1,
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.select_tokens`."""
    B, N = importance.shape
    keep = math.ceil(keep * N) if isinstance(keep, float) else keep
    ranking = importance.sort(dim=1, descending=True, stable=True).indices  # NaN first
    kept = ranking[:, :keep].sort(dim=1).values
    rows = (num_global + kept)[..., None].expand(-1, -1, tokens.shape[2])
    kept_tokens = torch.cat([tokens[:, :num_global], tokens.gather(1, rows)], 1)
    return kept_tokens, kept if positions is None else positions.expand(B, N).gather(1, kept)
