"""Node-sparse attention: every query reads the same few keys of its sample, listed by `kept`.

SViTT (Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers"): text tokens read the video tokens that
were kept.
"""

import torch
from torch import Tensor

from vattn.reference.attention import attention
from vattn.reference.dropout import dropout_keep, random_seed


def node_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.node_sparse_attention`; `seed` repeats a dropout mask."""
    B, H, Lq, D = query.shape
    gathered = kept[:, None, :, None].expand(B, H, -1, D)
    key, value = key.gather(2, gathered), value.gather(2, gathered)
    keep = None
    if dropout_p > 0:
        seed = random_seed(query.device) if seed is None else seed
        bh = torch.arange(B * H, device=query.device).view(B, H, 1, 1)
        rows = torch.arange(Lq, device=query.device)[:, None]
        keep = dropout_keep(seed, bh, rows, kept[:, None, None, :], dropout_p)
    scale = D**-0.5 if scale is None else scale
    out, lse = attention(query, key, value, scale=scale, keep=keep, dropout_p=dropout_p)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # heads beside channels, as every operator returns
    return (out, lse) if return_lse else out
