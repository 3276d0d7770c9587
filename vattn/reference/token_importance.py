"""Token importance: the probability that a key receives, averaged over heads and queries.

SViTT (Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers"), on node sparsity.
"""

import torch
from torch import Tensor

from vattn.position_bias import RelativePositionBias3D
from vattn.reference.attention import softmax


@torch.no_grad()
def token_importance(
    query: Tensor,
    key: Tensor,
    *,
    position_bias: RelativePositionBias3D | None = None,
    positions: Tensor | None = None,
    key_lengths: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition of :func:`vattn.token_importance`."""
    B, H, Lq, D = query.shape
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * (D**-0.5 if scale is None else scale)
    if position_bias is not None:
        if positions is None:
            positions = torch.arange(Lq - position_bias.num_global, device=query.device)
        scores = scores + position_bias(positions)
    behind = None
    if key_lengths is not None:
        behind = torch.arange(key.shape[2], device=key.device) >= key_lengths.view(B, 1, 1, 1)
        scores = scores.masked_fill(behind, -torch.inf)
    if lse is None:
        weights = softmax(scores, -1)[0]
    else:
        lse = lse[..., None]
        weights = torch.exp(scores - lse).masked_fill(lse == -torch.inf, 0)  # a query without keys
    if behind is not None:
        weights = weights.masked_fill(behind, 0)
    return weights.sum((1, 2)) / max(H * Lq, 1)
