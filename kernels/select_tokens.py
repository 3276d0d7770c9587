"""Selection of tokens on the GPU where its kernel was not compiled: a few operations of PyTorch.

Top-k and a compaction that keeps the order are a matter of counting within a block of threads, for which Triton has no
words; one kernel of CUDA C++ does both: ``csrc/cuda/select_tokens.cuh``. SViTT: Li et al., "SViTT: Temporal Learning of
Sparse Video-Text Transformers" (CVPR 2023).
"""

import torch
from torch import Tensor


def forward(
    tokens: Tensor, importance: Tensor, keep: int, positions: Tensor | None, num_global: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kept_tokens (B, G+K, C), kept_positions and kept_index (B, K); `importance` (B, N) is float32."""
    ranking = importance.sort(dim=1, descending=True, stable=True).indices
    kept_index = ranking[:, :keep].sort(dim=1).values
    kept_tokens = torch.cat([tokens[:, :num_global], tokens[_rows(kept_index, num_global)]], 1)
    if positions is None:
        return kept_tokens, kept_index.clone(), kept_index  # an operator's results share no memory
    return kept_tokens, positions.expand(importance.shape).gather(1, kept_index), kept_index


def backward(grad_kept: Tensor, kept_index: Tensor, num_tokens: int, num_global: int) -> Tensor:
    """The gradient of tokens (B, G+N, C), 0 where they were not kept."""
    B, _, C = grad_kept.shape
    grad = grad_kept.new_zeros(B, num_global + num_tokens, C)
    grad[:, :num_global] = grad_kept[:, :num_global]
    grad[_rows(kept_index, num_global)] = grad_kept[:, num_global:]
    return grad


def _rows(kept_index: Tensor, num_global: int) -> tuple[Tensor, Tensor]:
    """The kept rows of (B, G+N, C), as an index."""
    return torch.arange(kept_index.shape[0], device=kept_index.device)[:, None], num_global + kept_index
