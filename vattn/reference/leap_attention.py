"""Leap attention: every token reads all tokens of the frames of its leap group.

LAPS (Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on leap attention),
for any group size and any number of frames. With ``leap=2, group_size=2`` and 7 frames::

    frame   0  1  2  3  4  5  6
    group   A  B  A  B  C  D  C         D lost its partner, and is smaller
"""

import torch
from torch import Tensor

from vattn.reference.attention import attention
from vattn.reference.dropout import dropout_keep, numbered, random_seed
from vattn.reference.periodic_shift import periodic_shift


def leap_groups(num_frames: int, leap: int, group_size: int = 2) -> list[list[int]]:
    """The frames of each leap group, in the order of their first frame."""
    groups: dict[int, list[int]] = {}
    for t in range(num_frames):
        span = leap * group_size
        groups.setdefault(t // span * span + t % leap, []).append(t)
    return list(groups.values())


def leap_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    leap: int,
    *,
    group_size: int = 2,
    fold_div: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of :func:`vattn.leap_attention`; `seed` repeats a dropout mask."""
    B, H, T, N, D = query.shape
    scale = D**-0.5 if scale is None else scale
    if dropout_p > 0:
        seed = random_seed(query.device) if seed is None else seed
        seed, bh, *numbers = numbered(seed, B * H, T * N, T * N)
        of_queries, of_keys = (x.view(T, N) for x in numbers)
    groups = leap_groups(T, leap, group_size)
    outs = [query[:, :, :0] + key[:, :, :0] + value[:, :, :0]]  # all have a gradient, also of no frames
    lses = [outs[0].sum(-1, dtype=torch.promote_types(query.dtype, torch.float32))]
    for frames in groups:
        keep = None
        if seed is not None and dropout_p > 0:
            rows, columns = of_queries[frames].flatten(), of_keys[frames].flatten()
            keep = dropout_keep(seed, bh.view(B, H, 1, 1), rows[:, None], columns, dropout_p)
        q, k, v = (x[:, :, frames].flatten(2, 3) for x in (query, key, value))
        o, group_lse = attention(q, k, v, scale=scale, keep=keep, dropout_p=dropout_p)
        outs.append(o.unflatten(2, (len(frames), N)))
        lses.append(group_lse.unflatten(2, (len(frames), N)))
    place = torch.tensor([t for frames in groups for t in frames], dtype=torch.int64, device=query.device).argsort()
    out, lse = (torch.cat(parts, 2)[:, :, place] for parts in (outs, lses))
    out = out.movedim(1, -2).contiguous().movedim(-2, 1)
    if fold_div > 0:
        out = periodic_shift(out, fold_div)
    return (out, lse) if return_lse else out
