"""Latent-bottleneck attention: queries read keys that may lie in several tensors.

MeBT (Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers"): a context is read into latents, and latents are read from many positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vattn.reference.attention import attention
from vattn.reference.dropout import dropout_keep, numbered, random_seed


def latent_attention(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.latent_attention`; `seed` repeats a dropout mask."""
    B, H, Lq, D = query.shape
    key, value = (x if isinstance(x, Tensor) else torch.cat(list(x), 2) for x in (key, value))
    keep = read = None
    if key_lengths is not None:
        read = torch.arange(key.shape[2], device=query.device) < key_lengths.view(B, 1, 1, 1)
    if dropout_p > 0:
        seed = random_seed(query.device) if seed is None else seed
        seed, bh, rows, columns = numbered(seed, B * H, Lq, key.shape[2])
        keep = dropout_keep(seed, bh.view(B, H, 1, 1), rows[:, None], columns, dropout_p)
    scale = D**-0.5 if scale is None else scale
    out, lse = attention(query, key, value, scale=scale, read=read, keep=keep, dropout_p=dropout_p)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # heads beside channels, as every operator returns
    return (out, lse) if return_lse else out
