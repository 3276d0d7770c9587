"""Edge-sparse attention whose blocks lie on several ranks: only blocks that the layout names move.

    layout          0: [0 2]   1: [1]   2: [1 3]   3: [3]              rank 0 has blocks 0 and 1, rank 1 has 2 and 3

    rank 0          sends k, v of block 1, and meanwhile attends to blocks 0 and 1; then to block 2, which has come
    rank 1          sends k, v of block 2, and meanwhile attends to block 3; then to block 1

Global tokens are the same on every rank. As queries they read each rank's tokens there, and (out, lse) are merged
exactly; as keys they are read where the queries are.

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import vattn
from vattn import _checks
from vattn._library import compute_dtype
from vattn.distributed._checks import asks, grad_mode, settings_of, values_of
from vattn.distributed._collectives import Pending, enter, enter_rows, start_exchange, tie
from vattn.distributed._edge_plan import Plan, fingerprint, plan_of
from vattn.distributed._merge import PendingMerge
from vattn.distributed._numbers import with_numbers
from vattn.distributed._ranks import Ranks, agree, dropout_seed, ranks_of
from vattn.layout import BlockLayout
from vattn.ops.edge_sparse_attention import attend
from vattn.ops.latent_attention import attend as attend_to_all
from vattn.position_bias import BiasTable, RelativePositionBias3D, check_bias, num_offsets

OP = "distributed.edge_sparse_attention"


def edge_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    group: Any = None,
    grad: str = "full",
    lengths: Sequence[int] | None = None,
    position_bias: RelativePositionBias3D | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    return_importance: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`vattn.edge_sparse_attention` with blocks that are sharded over the ranks of a process group.

    Blocks are consecutive tokens: a layout with an order is refused.

    Each of the G global tokens is the same on every rank. Of the N others of all ranks, rank r has the next
    ``lengths[r]``: whole blocks of the layout, 0 too; only the last token of all may end a block early.

    Forward, a rank sends the keys and the values of those of its blocks that other ranks read, once to each of them:
    ``2 * B * H * D`` numbers in the dtype of the inputs for each token, nothing for a layout that stays within the
    ranks. For the merge of the global tokens it sends ``B * H * G * (D + 2)`` numbers of at least 32 bits. In the
    backward it sends the gradients of what it received; with "full" gradients also those of the global rows of query,
    key and value, and of the table; with "partial" ones those of the merge.

    Who is sent what is found on the host, from the values of the layout: once for a layout, for which the host waits if
    that lies on a GPU. In a compiled function, another layout is compiled again.

    Args:
        query, key, value: ``(B, H, G+N, D)``: the global tokens, then this rank's part of the others.
        layout: of the blocks of all ranks, the same on every rank; on the CPU, or on the device of `query`. Of a layout
            per sample, a block is sent if any sample reads it.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        grad: what gradients of global tokens and of the table are. "full": those of the global tokens' outputs must
            come whole, and equal, on every rank; those of their inputs, and of the table, are whole, and equal.
            "partial": the loss is the sum of those of the ranks; global inputs and the table get this rank's share of
            their gradient, and the sum over the ranks is whole.
        lengths: how many tokens that are not global each rank has, where they are known. Without them the ranks ask
            each other, and compare their settings, layouts among them.
        position_bias: a table of biases that is added to the scaled scores, the same on every rank.
        positions: ``(N,)`` or ``(B, N)`` int64, the raster index in ``position_bias.window`` of each token of all ranks
            that is not global, the same on every rank; or, without a bias, any numbers; None for 0 .. N-1.
        causal: a token reads another only if the position of that one is not greater. With positions of None, blocks of
            later ranks are not sent.
        dropout_p: probability of dropping an attention weight. The mask is that of one device with the seed that rank
            0 draws; all ranks draw one.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled and biased scores.
        return_importance: also return how much the first global token attends to each of this rank's others.

    Returns:
        The output ``(B, H, G+N, D)``. With `return_lse` then lse ``(B, H, G+N)``, and with `return_importance` then
        ``(B, N)``, without gradient: as of :func:`vattn.edge_sparse_attention`, each of this rank's tokens, and of the
        global ones, for which they are the same on every rank.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, layouts, dtypes or shapes that differ between
            ranks; shards that are not whole blocks.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on edge sparsity; for the merge
        Milakov and Gimelshein, "Online normalizer calculation for softmax", section 3.

    Example:
        >>> layout = vattn.BlockLayout.local_random(72, block_size=16)             # of the tokens of all ranks
        >>> q, k, v = torch.randn(3, 2, 4, 1 + 72, 16)                             # a global one, and this rank's
        >>> edge_sparse_attention(q, k, v, layout, group=group).shape
        torch.Size([2, 4, 73, 16])
    """
    ranks = ranks_of(OP, group)
    found: dict[str, Any] = {}

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        grad_mode(OP, grad)
        _checks.alike(OP, "(B, H, G+N, D)", query=query, key=key, value=value)
        _checks.head_dim(OP, query)
        own = _check_tokens(layout, query, position_bias, positions)
        if return_importance and layout.num_global == 0:
            raise ValueError(f"{OP}: return_importance needs a global token, got layout.num_global=0")
        found.update(dropout_p=_checks.dropout(OP, dropout_p), scale=_checks.scale(OP, scale, query.shape[-1]))
        asked = [asks(query), asks(key), asks(value)] if grad == "full" and layout.num_global else [asks(key, value)]
        asked += [asks(query, key, value)] + ([] if position_bias is None else [asks(*position_bias.parameters())])
        settings = settings_of(
            OP, "query", query, grad=grad, layout=fingerprint(layout), causal=causal, positions=values_of(positions),
            return_importance=return_importance, requires_grad=asked, **found,
            **{"window of position_bias": None if position_bias is None else position_bias.window},
        )  # fmt: skip
        return settings, [own]

    seed = dropout_seed(group, query, dropout_p)
    agreed = agree(OP, ranks, check, None if lengths is None else [lengths], seed)
    _check_shards(layout, agreed.lengths[0])

    if position_bias is None and not causal:
        positions = None  # which nothing looks at
    has_bias = position_bias is not None
    plan = plan_of(
        layout, agreed.lengths[0], ranks.rank, causal and positions is None, has_bias or positions is not None,
        query.device,
    )  # fmt: skip
    G, begin = layout.num_global, agreed.begins(ranks.rank)
    query, key, value = (x.to(compute_dtype(x)) for x in (query, key, value))
    query, key, value = enter_rows((query, key, value), G, ranks, grad)
    bias = None
    if position_bias is not None:
        bias = enter(position_bias(as_table=True), ranks, grad), position_bias.window
    # split, whose backward is one copy, where that of a slice is zeros and a copy
    own = agreed.lengths[0][ranks.rank]
    (global_query, own_query), (_, own_key), (_, own_value) = (x.split([G, own], 2) for x in (query, key, value))
    moving = _start_fetching(own_key, own_value, plan, ranks) if plan.exchanges else None

    call = _Call(G, begin, bias, positions, causal, agreed.seed, **found)
    out, lse = call.of_local(query, key, value, plan)
    merge = None
    if G > 0 and ranks.size > 1:
        (global_out, out), (global_lse, lse) = (x.split([G, own], 2) for x in (out, lse))
        if ranks.rank > 0:  # the global keys count once
            global_out, global_lse = call.of_global(global_query, own_key, own_value)
        merge = PendingMerge(global_out, global_lse, ranks, grad)
    if moving is not None:
        came = moving.wait()
        if plan.fetched is None:
            out, lse = tie(out, came), tie(lse, came)  # whichever a loss looks at
        else:
            fetched = call.of_fetched(own_query, came, plan)
            out, lse = vattn.merge_attention([out, fetched[0]], [lse, fetched[1]])
            out = out.transpose(1, 2).contiguous().transpose(1, 2)  # which the reference, of float64, lays otherwise
    if merge is not None:
        global_out, global_lse = merge.wait()
        out, lse = _one_behind_another(global_out, out), torch.cat([global_lse, lse], 2)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_importance:
        first = (lse[:, :, :G] - call.of_global_queries())[:, :, :1].detach()
        results.append(vattn.token_importance(query[:, :, :1], own_key, lse=first, scale=found["scale"]))
    return results[0] if len(results) == 1 else tuple(results)


@dataclasses.dataclass
class _Call:
    """The parts of a call that a rank computes: which of its queries read what."""

    num_global: int
    begin: int
    bias: BiasTable | None
    positions: Tensor | None
    causal: bool
    seed: Tensor | None
    dropout_p: float
    scale: float

    def of_local(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """All queries here read the global keys, and the keys here as the layout says; global ones read all here."""
        end = self.begin + plan.local.num_tokens
        positions = None if self.positions is None else self.positions[..., self.begin : end]
        if positions is None and self.bias is not None:
            positions = torch.arange(self.begin, end, device=query.device)
        numbers = [range(self.num_global), range(self.num_global + self.begin, self.num_global + end)]
        seeds = self.numbered(query, numbers, numbers)
        out, lse, _ = attend(
            query, key, value, plan.local, self.bias, positions, self.causal, self.dropout_p, seeds, self.scale, False
        )
        return out, lse

    def of_global(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The global queries read the keys here."""
        first = self.num_global + self.begin
        seeds = self.numbered(query, [range(self.num_global)], [range(first, first + key.shape[2])])
        out, lse = attend_to_all(query, [key], [value], None, self.dropout_p, seeds, self.scale)
        return out, lse + self.of_global_queries()

    def numbered(self, query: Tensor, queries: list[Any], keys: list[Any]) -> Tensor | None:
        """The seed, with the numbers of query and key tokens on one device, the global ones first."""
        return with_numbers(self.seed, query.shape[0], query.shape[1], queries, keys)

    def of_global_queries(self) -> Tensor | float:
        """``(H, G)``: the bias of a global query, which is the same for all keys that are not global."""
        if self.bias is None:
            return 0.0
        table, window = self.bias
        first = num_offsets(window)
        return table[first : first + self.num_global].t()

    def of_fetched(self, query: Tensor, rows: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """The queries that are not global read the keys and values ``rows (tokens, 2, B, H, D)`` that came here."""
        assert plan.fetched is not None and plan.query_tokens is not None and plan.key_tokens is not None
        length, own = plan.fetched.num_tokens, query.shape[2]
        key, value = (_padded(x.permute(1, 2, 0, 3), plan.first_key, length) for x in rows.unbind(1))
        bias, positions = None, self.positions
        if self.bias is not None:
            table, window = self.bias
            bias = table[: num_offsets(window)], window
        if bias is not None or positions is not None:
            tokens = plan.query_tokens + plan.key_tokens  # rows apart: one of them is 0
            positions = tokens if positions is None else positions[..., tokens]
        seeds = self.numbered(query, [self.num_global + plan.query_tokens], [self.num_global + plan.key_tokens])
        out, lse, _ = attend(
            _padded(query, 0, length), key, value, plan.fetched, bias, positions,
            self.causal and self.positions is not None, self.dropout_p, seeds, self.scale, False,
        )  # fmt: skip
        return (out, lse) if length == own else (out[:, :, :own], lse[:, :, :own])


def _start_fetching(key: Tensor, value: Tensor, plan: Plan, ranks: Ranks) -> Pending:
    """Send the blocks that others read; what comes are rows ``(tokens, 2, B, H, D)`` of keys and values."""
    rows = torch.stack([x.permute(2, 0, 1, 3).index_select(0, plan.sent_tokens) for x in (key, value)], 1)
    return start_exchange(rows, ranks, plan.sent, plan.received)


def _padded(x: Tensor, before: int, length: int) -> Tensor:
    """`x` in the middle of `length` tokens, behind `before` others of zeros."""
    B, H, own, D = x.shape
    zeros = x.new_zeros(()).expand(B, H, length - own, D)
    return x if own == length else _one_behind_another(zeros[:, :, :before], x, zeros[:, :, before:])


def _one_behind_another(*tensors: Tensor) -> Tensor:
    """The tokens of ``(B, H, L, D)``, with heads beside channels in memory, as every operator returns them."""
    return torch.cat([x.transpose(1, 2) for x in tensors], 1).transpose(1, 2)


def _check_tokens(layout: object, query: Tensor, position_bias: Any, positions: Tensor | None) -> int:
    """The layout, the bias and the positions are for `query`; returns how many of its tokens are not global."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"{OP}: layout must be a BlockLayout, got layout={type(layout).__name__}")
    own = query.shape[2] - layout.num_global
    if own < 0:
        raise ValueError(
            f"{OP}: query must have at least the global tokens of layout ({layout.num_global}), "
            f"got query.shape={tuple(query.shape)}"
        )
    if layout.num_heads not in (1, query.shape[1]):
        raise ValueError(
            f"{OP}: layout must be for all heads or for each of the {query.shape[1]} of query, "
            f"got layout.num_heads={layout.num_heads}"
        )
    if layout.num_samples not in (1, query.shape[0]):
        raise ValueError(
            f"{OP}: layout must be for all samples or for each of the {query.shape[0]} of query, "
            f"got layout.num_samples={layout.num_samples}"
        )
    if layout.order is not None:
        raise ValueError(f"{OP}: layout must have blocks of consecutive tokens over ranks, got a layout with an order")
    if layout.device not in (query.device, torch.device("cpu")):
        raise ValueError(
            f"{OP}: layout must be on the CPU or on the device of query ({query.device}), "
            f"got layout.device={layout.device}"
        )
    if positions is not None:
        _checks.positions(OP, positions, query, query.shape[0], layout.num_tokens)
    if position_bias is not None:
        check_bias(OP, position_bias, query, layout.num_global, positions)
        places = math.prod(position_bias.window)
        if positions is None and layout.num_tokens > places:
            raise ValueError(
                f"{OP}: tokens without positions must be at most as many as position_bias.window has, "
                f"got layout.num_tokens={layout.num_tokens}, position_bias.window={position_bias.window}"
            )
        if positions is not None and query.device.type == "cpu":
            _checks.in_range(OP, "positions", positions, places)
    return own


def _check_shards(layout: BlockLayout, lengths: Sequence[int]) -> None:
    """The shards are the tokens of `layout`, in whole blocks."""
    if sum(lengths) != layout.num_tokens:
        raise ValueError(
            f"{OP}: the shards must have the tokens of layout ({layout.num_tokens}), got lengths={list(lengths)}"
        )
    begin = 0
    for length in lengths:
        if length > 0 and begin % layout.block_size != 0:
            raise ValueError(
                f"{OP}: shards must be whole blocks of {layout.block_size} tokens, but for the last one of all, "
                f"got lengths={list(lengths)}"
            )
        begin += length
