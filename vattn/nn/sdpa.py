"""PyTorch's own attention, where an operator would do no more, with a tangent."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, in forward mode as the plain formula.

    Its fused kernels have no forward-mode derivative, and raise.
    """
    if forward_ad._current_level >= 0:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, *args, **settings)
    return F.scaled_dot_product_attention(query, key, value, *args, **settings)
