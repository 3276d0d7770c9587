"""Edge-sparse attention: a block of tokens reads the blocks that a layout lists for it.

SViTT (Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers"). Written as dense attention, in which
the count of a pair multiplies its weight: 0 for one that the layout does not have, 2 for a block that is listed twice.
"""

import torch
from torch import Tensor

from vattn.layout import BlockLayout
from vattn.position_bias import BiasTable, RelativePositionBias3D, dense_bias
from vattn.reference.attention import attention, softmax
from vattn.reference.dropout import dropout_keep, numbered, random_seed


def edge_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    position_bias: RelativePositionBias3D | BiasTable | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    return_importance: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The definition of :func:`vattn.edge_sparse_attention`; `seed` repeats a dropout mask."""
    B, H, length, D = query.shape
    G = layout.num_global
    scale = D**-0.5 if scale is None else scale
    if positions is None:
        positions = torch.arange(layout.num_tokens, device=query.device)
    counts = layout.token_counts()  # (L, G+N, G+N) or (S, L, G+N, G+N)
    read, bias = counts > 0, counts.clamp(min=1).log().to(torch.promote_types(query.dtype, torch.float32))
    if position_bias is not None:
        bias = bias + dense_bias(position_bias, G, positions)
    if causal:
        late = positions[..., None, :] > positions[..., :, None]
        late = torch.nn.functional.pad(late, (G, 0, G, 0), value=False).unsqueeze(-3)
        read = read & ~late
    keep = None
    if dropout_p > 0:
        seed = random_seed(query.device) if seed is None else seed
        seed, bh, rows, columns = numbered(seed, B * H, length, length)
        keep = dropout_keep(seed, bh.view(B, H, 1, 1), rows[:, None], columns, dropout_p)
    out, lse = attention(query, key, value, scale=scale, bias=bias, read=read, keep=keep, dropout_p=dropout_p)
    results = [out.transpose(1, 2).contiguous().transpose(1, 2)]  # heads beside channels, as every operator returns
    if return_lse:
        results.append(lse)
    if return_importance:
        scores = (query[:, :, :1] @ key.transpose(-1, -2)).to(lse.dtype) * scale + bias[..., :1, :]
        results.append(softmax(scores.detach(), -1)[0][:, :, 0, G:].mean(1))
    return results[0] if len(results) == 1 else tuple(results)
