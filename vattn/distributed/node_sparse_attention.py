"""Node-sparse attention where the keys lie on several ranks.

    keys      rank 0: 0 1 2 3      rank 1: 4 5 6 7        kept = [1, 6, 4]
                        x                  x   x
    queries   the same everywhere; each rank reads those of the kept keys that it has, and (out, lse) are merged exactly

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks
from vattn.distributed._checks import asks, grad_mode, settings_of, values_of
from vattn.distributed._collectives import enter
from vattn.distributed._merge import merge_over_ranks
from vattn.distributed._numbers import with_numbers
from vattn.distributed._ranks import agree, dropout_seed, ranks_of
from vattn.ops.latent_attention import checked_inputs
from vattn.ops.node_sparse_attention import attend, check_kept

OP = "distributed.node_sparse_attention"


def node_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    group: Any = None,
    grad: str = "full",
    lengths: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vattn.node_sparse_attention` of keys that are sharded over the ranks of a process group.

    A rank sends ``B * H * Lq * (D + 2)`` numbers of at least 32 bits forward, and in the backward the gradient of the
    query, however many keys there are and whichever are kept.

    Args:
        query: ``(B, H, Lq, D)``, the same on every rank.
        key, value: ``(B, H, Lk, D)``: this rank's part of the keys, of any length, 0 too.
        kept: ``(B, K)`` int64, the same on every rank: the keys that each sample reads, numbered through all ranks, in
            any order; one that is listed twice counts twice.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        grad: what gradients of query and output are. "full": that of the output must come whole, and equal, on every
            rank; that of the query is whole, and equal. "partial": the loss is the sum of those of the ranks; the query
            gets this rank's share of its gradient, and the sum over the ranks is whole.
        lengths: the sizes of the shards, one for each rank, where they are known. Without them the ranks ask each
            other, and compare their settings.
        dropout_p: probability of dropping an attention weight. The mask is that of one device with the seed that rank
            0 draws; all ranks draw one.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, Lq, D)``, and with `return_lse` also lse ``(B, H, Lq)``, the same on every rank: as of
        :func:`vattn.node_sparse_attention`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, dtypes or shapes that differ between ranks;
            on a CPU, a kept index that no rank has.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died. On a GPU, a kept
            index that no rank has: the device asserts it, and the error comes where the host next waits for it.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on node sparsity.

    Example:
        >>> text, video = torch.randn(2, 4, 12, 32), torch.randn(2, 4, 1000, 32)             # video: this rank's part
        >>> kept = torch.rand(2, 1000).topk(100).indices
        >>> node_sparse_attention(text, video, video, kept, group=group).shape
        torch.Size([2, 4, 12, 32])
    """
    ranks = ranks_of(OP, group)

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        grad_mode(OP, grad)
        checked_inputs(OP, query, key, value, None)
        check_kept(OP, kept, query)
        settings = settings_of(
            OP, "query", query, grad=grad, dropout_p=_checks.dropout(OP, dropout_p),
            scale=_checks.scale(OP, scale, query.shape[-1]), kept=values_of(kept),
            requires_grad=asks(query) if grad == "full" else asks(query, key, value),
            **{"number of queries": query.shape[2]},
        )  # fmt: skip
        return settings, [key.shape[2]]

    seed = dropout_seed(group, query, dropout_p)
    agreed = agree(OP, ranks, check, None if lengths is None else [lengths], seed)
    begin, total = agreed.begins(ranks.rank), sum(agreed.lengths[0])
    end = begin + key.shape[2]
    _check_range(kept, total)

    own = (kept >= begin) & (kept < end)
    first_own = (~own).int().argsort(dim=1, stable=True)
    here, count = kept.gather(1, first_own) - begin, own.sum(1)
    B, H, Lq, _ = query.shape
    seeds = with_numbers(agreed.seed, B, H, [range(Lq)], [range(begin, end)])
    out, lse = attend(
        enter(query, ranks, grad), key, value, here, count, float(dropout_p), seeds,
        _checks.scale(OP, scale, query.shape[-1]),
    )  # fmt: skip
    out, lse = merge_over_ranks(out, lse, ranks, grad)
    return (out, lse) if return_lse else out


def _check_range(kept: Tensor, total: int) -> None:
    """All of `kept` are keys of some rank: a rank alone cannot tell those of others from those of none."""
    if kept.device.type == "cpu" and not torch.compiler.is_compiling():
        _checks.in_range(OP, "kept", kept, total)
    elif not kept.is_meta:
        torch._assert_async(((kept >= 0) & (kept < total)).all(), f"{OP}: kept must be between 0 and {total - 1}")
