"""PyTorch's scaled dot product attention, which is a peer of most operators."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}  # those of a GPU


def attention(backend: SDPBackend | None = None) -> Attend:
    """Scaled dot product attention with `backend`, or with the one that PyTorch picks."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attend
