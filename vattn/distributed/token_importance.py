"""Token importance where the keys lie on several ranks.

    lse[q]         = log sum over the keys of all ranks of exp(scale * q k^T)         merged, as of latent attention
    importance[k]  = mean over heads and queries of exp(scale * q k^T - lse[q])       each rank for its own keys

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import vattn
from vattn import _checks
from vattn.distributed._checks import settings_of, values_of
from vattn.distributed._ranks import Ranks, agree, ranks_of
from vattn.ops.latent_attention import attend, checked_inputs

OP = "distributed.token_importance"


def token_importance(
    query: Tensor,
    key: Tensor,
    *,
    group: Any = None,
    lengths: Sequence[int] | None = None,
    position_bias: None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`vattn.token_importance` of keys that are sharded over the ranks of a process group.

    It has no gradient. A rank sends ``2 * B * H * Lq`` numbers of at least 32 bits, however many keys there are.

    Args:
        query: ``(B, H, Lq, D)``, the same on every rank.
        key: ``(B, H, Lk, D)``: this rank's part of the keys, of any length, 0 too.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        lengths: the sizes of the shards, one for each rank, where they are known. Without them the ranks ask each
            other, and compare their settings.
        position_bias: None. With a bias queries and keys are the same tokens, and the queries are not on every rank.
        key_lengths: ``(B,)`` int32 or int64: sample b reads the first ``key_lengths[b]`` keys of all ranks, and the
            others get 0.
        scale: factor of the scores; None means ``D ** -0.5``.

    Returns:
        ``(B, Lk)`` of this rank's keys, as of :func:`vattn.token_importance`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, dtypes or shapes that differ between ranks.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on node sparsity.

    Example:
        >>> text, video = torch.randn(2, 4, 12, 32), torch.randn(2, 4, 1000, 32)             # video: this rank's part
        >>> token_importance(text, video, group=group).shape
        torch.Size([2, 1000])
    """
    ranks = ranks_of(OP, group)

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        if position_bias is not None:
            raise ValueError(
                f"{OP}: position_bias must be None, for with a bias the queries are the keys, which lie on several "
                f"ranks, got position_bias={type(position_bias).__name__}"
            )
        checked_inputs(OP, query, key, key, key_lengths)
        settings = settings_of(
            OP, "query", query, scale=_checks.scale(OP, scale, query.shape[-1]), key_lengths=values_of(key_lengths),
            **{"number of queries": query.shape[2]},
        )  # fmt: skip
        return settings, [key.shape[2]]

    agreed = agree(OP, ranks, check, None if lengths is None else [lengths])
    begin, total = agreed.begins(ranks.rank), sum(agreed.lengths[0])
    if key_lengths is not None:
        _checks.in_range(OP, "key_lengths", key_lengths, total + 1)
        key_lengths = (key_lengths - begin).clamp(0, key.shape[2])
    query, key = query.detach(), key.detach()
    if ranks.size == 1:
        return vattn.token_importance(query, key, key_lengths=key_lengths, scale=scale)
    _, lse = attend(query, [key], [key], key_lengths, 0.0, None, _checks.scale(OP, scale, query.shape[-1]))
    return vattn.token_importance(query, key, key_lengths=key_lengths, lse=_of_all_keys(lse, ranks), scale=scale)


def _of_all_keys(lse: Tensor, ranks: Ranks) -> Tensor:
    """The log-sum-exp over the keys of all ranks, from that over those of each."""
    peak = ranks.wait(ranks.start_all_reduce(lse.contiguous(), "max"))
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    return peak + ranks.wait(ranks.start_all_reduce(torch.exp(lse - peak), "sum")).log()
