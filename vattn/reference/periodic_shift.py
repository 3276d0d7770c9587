"""Periodic shift: per head, some channels of frame t come from frame t+1, as many from t-1.

LAPS (Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on the
periodic shift)::

    channel   0 .. fold     x[t+1]    (0 at the last frame)
           fold .. 2 fold   x[t-1]    (0 at the first frame)
         2 fold .. D        x[t]
"""

import torch
from torch import Tensor


def periodic_shift(x: Tensor, fold_div: int, transpose: bool = False) -> Tensor:
    """`x (B, H, T, N, D)` shifted along T, ``fold = D // fold_div``; `transpose` gives the adjoint map."""
    fold = x.shape[-1] // fold_div
    later, earlier, still = x[..., :fold], x[..., fold : 2 * fold], x[..., 2 * fold :]
    if transpose:
        later, earlier = _delay(later), _advance(earlier)
    else:
        later, earlier = _advance(later), _delay(earlier)
    shifted = torch.cat([later, earlier, still], -1)
    return shifted.movedim(1, 3).contiguous().movedim(3, 1)  # heads beside channels, as every operator returns


def _advance(x: Tensor) -> Tensor:
    """Frame t becomes frame t+1; the last one 0."""
    return torch.cat([x[:, :, 1:], torch.zeros_like(x[:, :, :1])], 2)


def _delay(x: Tensor) -> Tensor:
    """Frame t becomes frame t-1; the first one 0."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
