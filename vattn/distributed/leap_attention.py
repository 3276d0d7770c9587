"""Leap attention of frames that lie on several ranks: groups that lie whole on a rank are computed where they are.

    start    frames of groups that several ranks have go to the rank that computes the group, or heads of them
    meanwhile the spans that lie whole on this rank: the local operator on a view of the frames
    then     the groups that have come; what came out goes back
    meanwhile the groups of other spans that lie whole on this rank

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
:mod:`vattn.distributed._leap_plan` says who computes what.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks
from vattn._library import compute_dtype
from vattn.distributed._checks import asks, settings_of
from vattn.distributed._frames import Block, Key, Moving, Pieces, cut, joined, lent_blocks, needed_blocks
from vattn.distributed._leap_plan import Plan, Range, length, plan_leap
from vattn.distributed._numbers import with_numbers
from vattn.distributed._ranks import Ranks, agree, dropout_seed, ranks_of
from vattn.distributed.periodic_shift import shift
from vattn.ops.leap_attention import attend

OP = "distributed.leap_attention"


def leap_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    leap: int,
    *,
    group: Any = None,
    group_size: int = 2,
    fold_div: int = 0,
    lengths: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vattn.leap_attention` with frames sharded over the ranks of a process group.

    A leap group that lies whole on a rank is computed there, and nothing of it is sent. Other groups are computed by a
    rank with most of their frames, or each of their ranks computes some of the heads: for each span of
    ``leap * group_size`` frames the one with fewer bytes on the busiest link. A rank sends

        3 * B * h * N * D    numbers of each of its frames of which another rank computes h heads: query, key and value
        B * h * N * D        numbers of each frame of others of which it computes h heads: the output; for `return_lse`
                             also B * h * N numbers of 32 bits (64 for float64)

    and in the backward as many as it gets forward. `fold_div` adds what :func:`periodic_shift` of the output sends. A
    group that is exchanged by heads is computed by as many ranks as there are heads, at most.

    Args:
        query, key, value: ``(B, H, T_r, N, D)``: this rank's frames of N tokens each, any number of them, 0 too.
        leap: distance in frames of the clip, which all ranks have together, between the members of a group.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        group_size: how many frames form a group, at least 1.
        fold_div: if positive, the output is shifted as by :func:`periodic_shift` with this divisor.
        lengths: the frames of each rank, where they are known; otherwise the ranks ask each other, and compare their
            settings.
        dropout_p: probability of dropping an attention weight. The mask is that of one device with the seed that rank
            0 draws; all ranks draw one.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, T_r, N, D)`` of this rank's frames, in memory as ``(B, T_r, N, H, D)``, and with
        `return_lse` also lse ``(B, H, T_r, N)``: as of :func:`vattn.leap_attention`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, dtypes or shapes that differ between ranks.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on leap attention
        and on the periodic shift; for the exchange of heads Jacobs et al., "DeepSpeed Ulysses: System Optimizations for
        Enabling Training of Extreme Long Sequence Transformer Models".

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 8, 49, 16)               # (B, H, T, N, D), this rank's part of the clip
        >>> leap_attention(q, k, v, leap=4, group=group).shape
        torch.Size([2, 4, 8, 49, 16])
    """
    ranks = ranks_of(OP, group)
    found: dict[str, Any] = {}

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        _checks.alike(OP, "(B, H, T, N, D)", query=query, key=key, value=value)
        _checks.head_dim(OP, query)
        _checks.integer(OP, "leap", leap, least=1)
        _checks.integer(OP, "group_size", group_size, least=1)
        _checks.integer(OP, "fold_div", fold_div, least=0)
        found.update(dropout_p=_checks.dropout(OP, dropout_p), scale=_checks.scale(OP, scale, query.shape[-1]))
        settings = settings_of(
            OP, "query", query, leap=int(leap), group_size=int(group_size), fold_div=int(fold_div),
            return_lse=bool(return_lse), N=query.shape[3], requires_grad=asks(query, key, value), **found,
        )  # fmt: skip
        return settings, [query.shape[2]]

    seed = dropout_seed(group, query, dropout_p)
    agreed = agree(OP, ranks, check, None if lengths is None else [lengths], seed)
    dropout_p, scale = found["dropout_p"], found["scale"]
    if ranks.size == 1:
        out, lse = attend(query, key, value, leap, group_size, fold_div, dropout_p, agreed.seed, scale)
        return (out, lse) if return_lse else out
    frames = agreed.lengths[0]
    plan = plan_leap(tuple(frames), int(leap), int(group_size), query.shape[1])
    inputs = [x.to(compute_dtype(x)) for x in (query, key, value)]
    results = _attend_planned(inputs, plan, ranks, _Operator(query, agreed.seed, dropout_p, scale, bool(return_lse)))
    out = shift(results[0], fold_div, ranks, frames) if fold_div else results[0]
    return (out, results[1].squeeze(-1)) if return_lse else out


class _Operator:
    """The operator on this rank."""

    def __init__(self, query: Tensor, seed: Tensor | None, dropout_p: float, scale: float, return_lse: bool) -> None:
        self._batch, self._heads, _, self._tokens, _ = query.shape
        self._settings, self._seed, self._return_lse = (dropout_p, scale), seed, return_lse
        self.results = 1 + return_lse

    def __call__(
        self, inputs: Sequence[Tensor], runs: Sequence[Range], heads: Range, leap: int, group_size: int
    ) -> list[Tensor]:
        """Out, and if asked for lse with a last axis of 1, of frames and heads that have these numbers in the clip."""
        tokens = [range(first * self._tokens, last * self._tokens) for first, last in runs]
        seed = with_numbers(
            self._seed, self._batch, length(heads), tokens, tokens, first_head=heads[0], all_heads=self._heads
        )
        query, key, value = inputs
        dropout_p, scale = self._settings
        out, lse = attend(query, key, value, leap, group_size, 0, dropout_p, seed, scale)
        return [out, lse[..., None]] if self._return_lse else [out]


def _attend_planned(inputs: Sequence[Tensor], plan: Plan, ranks: Ranks, operator: _Operator) -> list[Tensor]:
    """What `operator` gives for this rank's frames of query, key and value."""
    rank, whole, all_heads = ranks.rank, plan.whole[ranks.rank], (0, plan.heads)
    if length(whole) == inputs[0].shape[2] and not plan.moves:
        return operator(inputs, [whole], all_heads, plan.leap, plan.group_size)
    work = [each for each in plan.work if each.rank == rank]
    lent, needed = lent_blocks(plan, rank), needed_blocks(plan, rank)
    pieces, nothing = zip(*(cut(x, plan, rank) for x in inputs), strict=True)
    if plan.moves:
        sent = {block.key: [block.taken(x) for x in pieces] for block in lent}
        there = Moving(ranks, lent, sent, needed, len(inputs), nothing)

    results: list[Pieces] = [{} for _ in range(operator.results)]
    if length(whole):
        found = operator([x[whole, all_heads] for x in pieces], [whole], all_heads, plan.leap, plan.group_size)
        for result, x in zip(results, found, strict=True):
            result[whole, all_heads] = x

    if plan.moves:
        came, tie = there.wait()
        returned: list[dict[Key, list[Tensor]]] = [{} for _ in results]
        for each in (each for each in work if each.moves):
            blocks = [Block(holder, each, holder) for holder in each.runs]
            frames = [
                torch.cat([came[b.key][i] if b.key in came else b.taken(x) for b in blocks], 2)
                for i, x in enumerate(pieces)
            ]
            found = operator(frames, [run for b in blocks for run in b.runs], each.heads, each.groups, each.size)
            for result, others, x in zip(results, returned, found, strict=True):
                for block, part in zip(blocks, x.split([b.frames for b in blocks], 2), strict=True):
                    if block.holder == rank:
                        result.update(block.pieces(part))
                    else:
                        others[block.key] = [part]
        back = [Moving(ranks, needed, others, lent, 1, [_like_result(tie, i)]) for i, others in enumerate(returned)]

    for each in (each for each in work if not each.moves):
        block = Block(rank, each, rank)
        found = operator([block.taken(x) for x in pieces], block.runs, each.heads, each.groups, each.size)
        for result, x in zip(results, found, strict=True):
            result.update(block.pieces(x))

    ends = [[_like_result(x, i) for x in nothing] for i in range(len(results))]
    if plan.moves:
        for result, end, moving in zip(results, ends, back, strict=True):
            came, tie = moving.wait()
            end.append(tie)
            for block in lent:
                result.update(block.pieces(came[block.key][0]))
    return [joined(result, plan, rank, end) for result, end in zip(results, ends, strict=True)]


def _like_result(nothing: Tensor, index: int) -> Tensor:
    """``(B, H, 0, N, D)`` as of out (0) or of lse (1): with the last axis and the dtype of those."""
    return nothing if index == 0 else nothing[..., :1].to(torch.promote_types(nothing.dtype, torch.float32))
