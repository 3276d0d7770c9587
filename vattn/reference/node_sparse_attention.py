"""Node-sparse attention: every query reads the same few keys of its sample, listed by `kept`.

SViTT (Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers"): text tokens read the video tokens that
were kept.
"""

import torch
from torch import Tensor

from vattn.reference.attention import attention
from vattn.reference.dropout import dropout_keep, numbered, random_seed


def node_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    kept_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.node_sparse_attention`; `seed` repeats a dropout mask."""
    B, H, Lq, D = query.shape
    keep = read = None
    if kept_lengths is not None:
        listed = torch.arange(kept.shape[1], device=query.device) < kept_lengths.view(B, 1)
        kept, read = torch.where(listed, kept, 0), listed[:, None, None]
        if key.shape[2] == 0:  # there is nothing to gather in place of what is not listed
            kept, read = kept[:, :0], read[..., :0]
    gathered = kept[:, None, :, None].expand(B, H, -1, D)
    if dropout_p > 0:
        seed = random_seed(query.device) if seed is None else seed
        seed, bh, rows, columns = numbered(seed, B * H, Lq, key.shape[2])
        keep = dropout_keep(seed, bh.view(B, H, 1, 1), rows[:, None], columns[kept][:, None, None, :], dropout_p)
    key, value = key.gather(2, gathered), value.gather(2, gathered)
    scale = D**-0.5 if scale is None else scale
    out, lse = attention(query, key, value, scale=scale, read=read, keep=keep, dropout_p=dropout_p)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # heads beside channels, as every operator returns
    return (out, lse) if return_lse else out
