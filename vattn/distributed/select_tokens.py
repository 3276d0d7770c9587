"""Selection of the most important tokens of all ranks: each rank keeps its own of them.

    importance    rank 0: .1 .4 .2      rank 1: .4 .3         keep=3 of 5: tokens 1, 3 and 4
    kept          rank 0: token 1       rank 1: tokens 3, 4

Every rank gets the importance of all tokens, but no rank sends a token.

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023), on node sparsity.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import vattn
from vattn import _checks
from vattn.distributed._ranks import Ranks, agree, ranks_of
from vattn.ops.select_tokens import check_inputs, count

OP = "distributed.select_tokens"


def select_tokens(
    tokens: Tensor,
    importance: Tensor,
    keep: float,
    *,
    group: Any = None,
    lengths: Sequence[int] | None = None,
    positions: Tensor | None = None,
    num_global: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`vattn.select_tokens` of tokens that are sharded over the ranks of a process group.

    Which tokens are kept is what one device would keep, ties and NaN included. A rank sends the importance of its
    tokens, of 32 bits each (64 for float64), padded to the longest shard: ``B * max(lengths)`` numbers. Nothing is sent
    in the backward. As what is kept on a rank depends on values, the host waits for the device.

    Args:
        tokens: ``(B, G+N, C)``: G = `num_global` tokens that always stay, the same on every rank, then this rank's part
            of the others, of any length, 0 too. The gradient flows to the tokens that are kept; that of the global ones
            is what comes to this rank.
        importance: ``(B, N)``, of this rank's part, without gradient.
        keep: how many of the tokens of all ranks stay: an int, or a float between 0 and 1 for that share, rounded up.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        lengths: the sizes of the shards without global tokens, one for each rank, where they are known. Without them
            the ranks ask each other, and compare their settings.
        positions: ``(M,)`` or ``(B, M)`` int64, the positions of the M tokens of all ranks, or of this rank's N tokens;
            None for their numbers through all ranks.
        num_global: G.

    Returns:
        The kept tokens ``(B, G+K, C)`` of this rank, the positions ``(B, K)`` int64 of those that are not global, and
        how many each sample keeps here, ``(B,)`` int64. K is the most that a sample keeps here; behind what another one
        keeps, tokens are 0 and positions -1.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, dtypes or shapes that differ between ranks.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on node sparsity.

    Example:
        >>> tokens = torch.arange(6.0).view(1, 6, 1)                            # a global token and 5 others
        >>> importance = torch.tensor([[0.1, 0.4, 0.2, 0.4, 0.3]])
        >>> kept, positions, lengths = select_tokens(tokens, importance, keep=0.6, group=group)
        >>> kept.flatten(), positions, lengths
        (tensor([0., 2., 4., 5.]), tensor([[1, 3, 4]]), tensor([3]))
    """
    ranks = ranks_of(OP, group)

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        own = check_inputs(OP, tokens, importance, num_global)
        if not isinstance(keep, float):
            _checks.integer(OP, "keep", keep, least=0)
        settings = {
            "dtype": tokens.dtype, "device type": tokens.device.type, "batch": tokens.shape[0],
            "channels": tokens.shape[2], "dtype of importance": importance.dtype, "keep": keep,
            "num_global": num_global,
        }  # fmt: skip
        if positions is not None:
            _checks.index_tensor(OP, "positions", positions)
            some = positions.shape[-1] if positions.dim() else 0
            _checks.positions(OP, positions, tokens, tokens.shape[0], some)
            if lengths is None:  # whether these are as many as tokens, is seen when all ranks have told how many
                return settings, [own, some]
        return settings, [own] if lengths is not None else [own, own]

    of_ranks = agree(OP, ranks, check, None if lengths is None else [lengths])
    begin, total = of_ranks.begins(ranks.rank), sum(of_ranks.lengths[0])
    B, own = importance.shape
    for rank, counts in enumerate(zip(*of_ranks.lengths, strict=True)):
        if counts[-1] not in (counts[0], total):
            raise ValueError(
                f"{OP}: positions must be those of all tokens ({total}) or of the rank's ({counts[0]}), "
                f"got on rank {rank} positions.shape[-1]={counts[-1]}"
            )
    if positions is not None and positions.shape[-1] != own:
        _checks.positions(OP, positions, tokens, B, total)
        positions = positions[..., begin : begin + own]

    all_kept = count(OP, keep, total)
    everyone = _gathered(importance.detach(), of_ranks.lengths[0], ranks)
    _, kept = vattn.select_tokens(everyone.new_empty(B, total, 0), everyone, all_kept, num_global=0)
    # (B, K of all), ascending: a rank's own lie together
    behind = (kept < begin).sum(1)
    kept_lengths = (kept < begin + own).sum(1) - behind
    if kept.is_meta:  # on paper no values are known
        most = min(own, all_kept)
    else:
        most = int(kept_lengths.max()) if B > 0 else 0

    place = torch.arange(most, device=tokens.device)
    is_kept = place < kept_lengths[:, None]
    kept = kept.gather(1, (behind[:, None] + place).clamp(max=all_kept - 1)) - begin
    kept = torch.where(is_kept, kept, 0)
    rows = tokens.gather(1, (num_global + kept)[..., None].expand(-1, -1, tokens.shape[2]))
    kept_tokens = torch.cat([tokens[:, :num_global], torch.where(is_kept[..., None], rows, 0)], 1)
    kept_positions = begin + kept if positions is None else positions.expand(B, own).gather(1, kept)
    return kept_tokens, torch.where(is_kept, kept_positions, -1), kept_lengths


def _gathered(importance: Tensor, lengths: Sequence[int], ranks: Ranks) -> Tensor:
    """The importance ``(B, N)`` of the tokens of all ranks, in the dtype that tokens are selected by."""
    importance = importance if importance.dtype == torch.float64 else importance.float()
    if ranks.size == 1:
        return importance
    longest = max(lengths)
    padded = torch.nn.functional.pad(importance, (0, longest - importance.shape[1]))
    of_ranks = ranks.wait(ranks.start_all_gather(padded[None].contiguous()))
    return torch.cat([one[:, :length] for one, length in zip(of_ranks, lengths, strict=True)], 1)
