"""Heads: channels are split among them before an attention, and merged after it, both without a copy.

(B, tokens, H * D)  -> split_heads ->  (B, H, tokens, D)  -> merge_heads ->  (B, tokens, H * D)
"""

from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, ..., H * D)`` to ``(B, H, ..., D)``, a view; `...` are the tokens, on one axis or on a grid.

    Example:
        >>> split_heads(torch.randn(2, 7, 12), num_heads=3).shape
        torch.Size([2, 3, 7, 4])
    """
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).movedim(-2, 1)


def merge_heads(out: Tensor) -> Tensor:
    """``(B, H, ..., D)`` to ``(B, ..., H * D)``, a view of what :func:`split_heads` or an operator gives.

    Example:
        >>> merge_heads(torch.randn(2, 3, 7, 4)).shape
        torch.Size([2, 7, 12])
    """
    return out.movedim(1, -2).flatten(-2)
