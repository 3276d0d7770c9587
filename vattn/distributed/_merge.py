"""Attention of the same queries over the keys of all ranks, from attention over those of each.

    m = max_r lse_r,   w_r = exp(lse_r - m),   out = sum_r w_r out_r / sum_r w_r,   lse = m + log sum_r w_r

Two collectives, of one and of D + 1 numbers for each query, however many keys there are.
"""

import torch
from torch import Tensor

from vattn.distributed._collectives import start_sum
from vattn.distributed._ranks import Ranks


class PendingMerge:
    """The merge of each rank's ``out (B, H, L, D)`` and ``lse (B, H, L)`` on its way."""

    def __init__(self, out: Tensor, lse: Tensor, ranks: Ranks, grad: str) -> None:
        self._dtype = out.dtype
        peak = ranks.wait(ranks.start_all_reduce(lse.detach().contiguous(), "max"))
        self._peak = torch.where(peak == -torch.inf, 0.0, peak)
        weight = torch.exp(lse - self._peak)[..., None]
        packed = torch.cat([weight * out.to(lse.dtype), weight], -1)
        self._sums = start_sum(packed.transpose(1, 2), ranks, grad)  # it lies as the output does

    def wait(self) -> tuple[Tensor, Tensor]:
        """Out and lse over the keys of all ranks."""
        sums = self._sums.wait().transpose(1, 2)
        weights = sums[..., -1]
        empty = weights == 0
        whole = torch.where(empty, 1.0, weights)
        out = (sums[..., :-1] / whole[..., None]).to(self._dtype)
        return out, torch.where(empty, -torch.inf, self._peak + whole.log())


def merge_over_ranks(out: Tensor, lse: Tensor, ranks: Ranks, grad: str) -> tuple[Tensor, Tensor]:
    """Each rank's ``out (B, H, L, D)`` and ``lse (B, H, L)`` of its own keys, merged into those of all keys."""
    return (out, lse) if ranks.size == 1 else PendingMerge(out, lse, ranks, grad).wait()
