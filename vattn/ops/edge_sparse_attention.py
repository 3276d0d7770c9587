"""Edge-sparse attention: a block of tokens reads the global tokens and the blocks that a layout lists for it.

    out[i] = softmax(scale * q[i] k[read(i)]^T + bias[i, read(i)]) v[read(i)]

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023). One global token and four
blocks, each of which reads itself and a random one::

            g  0  1  2  3
        g   x  x  x  x  x       global queries read everything
        0   x  x  .  x  .
        1   x  x  x  .  .       every query reads the global keys
        2   x  .  .  x  x
        3   x  .  x  .  x
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._attention import Attention
from vattn._flops import values
from vattn._library import empty_rows, run_reference, runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh
from vattn.layout import BlockLayout
from vattn.position_bias import BiasTable, RelativePositionBias3D, check_bias, check_table, table_of
from vattn.reference.dropout import random_seed


def edge_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    position_bias: RelativePositionBias3D | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    return_importance: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of blocks of tokens to the blocks that `layout` lists for them, and to and from global tokens.

    The first G = ``layout.num_global`` tokens are global: they read all tokens, and all tokens read them. The other N
    are cut into blocks of ``layout.block_size``, of which the last may be short, or lie in blocks as ``layout.order``
    says, which moves none of them. Query block i reads the blocks in row i of the layout, and one that is listed twice
    counts twice. A query that reads nothing gives 0 and an lse of -inf.

    Args:
        query, key, value: ``(B, H, G+N, D)``, float32, bfloat16, float16 or float64, any strides (a last axis that is
            not contiguous costs one copy). D is at most 256.
        layout: who reads whom, on the device of `query`; for all samples and heads, or one set of rows per head, or
            per sample.
        position_bias: a table of biases that is added to the scaled scores, looked up inside the kernel from the
            offset between two positions. Its gradient is computed there too, and is deterministic under
            ``torch.use_deterministic_algorithms(True)``.
        positions: ``(N,)`` or ``(B, N)`` int64, the raster index of each token that is not global in the full grid
            ``position_bias.window``, or, without a bias, any numbers; None for 0 .. N-1.
        causal: a token reads another only if the position of that one is not greater. Global tokens have no position:
            they still read everything, and are read by everything.
        dropout_p: probability of dropping an attention weight; the seed comes from torch's generator. The copies of a
            block that is listed twice are dropped together.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled and biased scores.
        return_importance: also return how much the first global token attends to each other token.

    Returns:
        The output ``(B, H, G+N, D)``, in memory as ``(B, G+N, H, D)``, so that merging heads with
        ``out.movedim(1, -2).flatten(-2)`` is a view. With `return_lse` then lse ``(B, H, G+N)``, natural logarithm, and
        with `return_importance` then ``(B, N)``, the softmax probability averaged over heads, before dropout and
        without gradient; both in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on edge sparsity.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 1 + 72, 16)                       # a global token, 2 frames of 6 x 6
        >>> layout = vattn.BlockLayout.local_random(72, block_size=16, num_random=2)
        >>> bias = vattn.RelativePositionBias3D((2, 6, 6), num_heads=4)
        >>> edge_sparse_attention(q, k, v, layout, position_bias=bias).shape
        torch.Size([2, 4, 73, 16])
    """
    dropout_p, scale = _check(
        query, key, value, layout, position_bias, positions, dropout_p, scale, bool(return_importance)
    )
    seed = random_seed(query.device) if dropout_p > 0 else None
    out, lse, importance = attend(
        query, key, value, layout, position_bias, positions, causal, dropout_p, seed, scale, return_importance
    )
    results = (out, *([lse] if return_lse else []), *([importance] if importance is not None else []))
    return results if len(results) > 1 else out


@once
def _check(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, position_bias: RelativePositionBias3D | None,
    positions: Tensor | None, dropout_p: float, scale: float | None, importance: bool,
) -> tuple[float, float]:  # fmt: skip
    """dropout_p and scale of a call that is right."""
    op = "edge_sparse_attention"
    _checks.alike(op, "(B, H, G+N, D)", query=query, key=key, value=value)
    _checks.head_dim(op, query)
    _check_layout(op, layout, query)
    if positions is not None:
        _checks.positions(op, positions, query, query.shape[0], layout.num_tokens)
    if position_bias is not None:
        check_bias(op, position_bias, query, layout.num_global, positions)
    if importance and layout.num_global == 0:
        raise ValueError(f"{op}: return_importance needs a global token, got layout.num_global=0")
    return _checks.dropout(op, dropout_p), _checks.scale(op, scale, query.shape[-1])


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout,
    position_bias: RelativePositionBias3D | BiasTable | None, positions: Tensor | None, causal: bool, dropout_p: float,
    seed: Tensor | None, scale: float, importance: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Out, lse and importance, or None, of arguments that have been checked.

    For `seed`, see :func:`vattn.reference.dropout.numbered`.
    """
    op = "edge_sparse_attention"
    if on_mesh(query, key, value, positions):
        return over_mesh(
            op, query=query, key=key, value=value, layout=layout, position_bias=position_bias, positions=positions,
            causal=causal, dropout_p=dropout_p, seed=seed, scale=scale, importance=importance,
        )  # fmt: skip
    if runs_reference(query, op):
        if position_bias is not None and positions is not None:
            window = position_bias[1] if isinstance(position_bias, tuple) else position_bias.window
            _checks.in_range(op, "positions", positions, math.prod(window))
        out, lse, *seen = run_reference(
            reference.edge_sparse_attention, query, key, value, layout, position_bias=position_bias,
            positions=positions, causal=causal, dropout_p=dropout_p, scale=scale, return_lse=True,
            return_importance=importance, seed=seed,
        )  # fmt: skip
        return out, lse, seen[0] if importance else None
    table, window = table_of(position_bias)
    transposed = layout.transpose() if _backward_reads_transposed(query, key, value, table) else None
    out, lse, seen = _attend(
        query, key, value, layout.row_offsets, layout.columns,
        None if transposed is None else transposed.row_offsets, None if transposed is None else transposed.columns,
        layout.order, layout.block_size, layout.num_global, table, window, positions, causal, dropout_p, seed, scale,
        importance,
    )  # fmt: skip
    return out, lse, seen if importance else None


def _check_layout(op: str, layout: object, query: Tensor) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"{op}: layout must be a BlockLayout, got layout={type(layout).__name__}")
    if layout.num_global + layout.num_tokens != query.shape[2]:
        raise ValueError(
            f"{op}: query must have as many tokens as layout ({layout.num_global} + {layout.num_tokens}), "
            f"got query.shape={tuple(query.shape)}"
        )
    if layout.num_heads not in (1, query.shape[1]):
        raise ValueError(
            f"{op}: layout must be for all heads or for each of the {query.shape[1]} of query, "
            f"got layout.num_heads={layout.num_heads}"
        )
    if layout.num_samples not in (1, query.shape[0]):
        raise ValueError(
            f"{op}: layout must be for all samples or for each of the {query.shape[0]} of query, "
            f"got layout.num_samples={layout.num_samples}"
        )
    if layout.device != query.device:
        raise ValueError(
            f"{op}: layout must be on the device of query ({query.device}), got layout.device={layout.device}"
        )


def _backward_reads_transposed(query: Tensor, *inputs: Tensor | None) -> bool:
    """Whether a backward will come that needs to know who reads a block: the one on a GPU."""
    if not query.is_cuda or not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in (query, *inputs))


def _fake(query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_global, importance = others[8], others[-1]
    B, _, length, _ = query.shape
    return (
        empty_rows(query),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
        query.new_empty((B, length - num_global) if importance else (0,), dtype=torch.float32),
    )


def _pairs(
    query: Tensor, columns: Tensor, row_offsets: Tensor, order: Tensor | None, block_size: int, num_global: int,
    **others: Any,
) -> int:  # fmt: skip
    B, H, length, _ = query.shape
    of_sets, sets = _listed_pairs(columns, row_offsets, order, block_size, length - num_global), row_offsets[..., 0]
    return B * H * of_sets // sets.numel() + B * H * num_global * (2 * length - num_global)


def _listed_pairs(
    columns: Tensor, row_offsets: Tensor, order: Tensor | None, block_size: int, num_tokens: int
) -> int:  # fmt: skip
    """How many pairs the listed blocks have, of all sets of rows; where there are no values, as if none were short."""
    if values(columns) is None:
        return columns.numel() * block_size**2
    blocks = row_offsets.shape[-1] - 1
    if order is None:
        sizes = (num_tokens - torch.arange(blocks, device=columns.device) * block_size).clamp(max=block_size)
    else:
        sizes = (order >= 0).view(blocks, -1).sum(1)
    keys = torch.nn.functional.pad(sizes[columns.long()].cumsum(0), (1, 0))[row_offsets.long()].diff()
    return int((keys * sizes).sum())


def _check_blocks(
    query: Tensor, row_offsets: Tensor, order: Tensor | None, block_size: int, num_global: int,
    bias_table: Tensor | None, window: Sequence[int], importance: bool, table_tangent: Tensor | None = None,
    **others: Any,
) -> None:  # fmt: skip
    op, num_tokens = "edge_sparse_attention", query.shape[2] - num_global
    if block_size < 1:
        raise ValueError(f"{op}: block_size must be at least 1, got block_size={block_size}")
    blocks = -(-num_tokens // block_size)
    if order is None and row_offsets.shape[-1] != blocks + 1:
        raise ValueError(
            f"{op}: row_offsets must have an entry for each of {blocks} blocks and one more, "
            f"got row_offsets.shape={tuple(row_offsets.shape)}"
        )
    if order is not None and not num_tokens <= order.numel() < 2**31:
        raise ValueError(
            f"{op}: order must have a slot for each of {num_tokens} tokens, and fewer than 2**31, "
            f"got order.shape={tuple(order.shape)}"
        )
    check_table(op, bias_table, window, num_global)
    if table_tangent is not None and bias_table is None:
        raise ValueError(f"{op}: table_tangent must come with a bias_table, got bias_table=None")
    if importance and num_global == 0:
        raise ValueError(f"{op}: importance needs a global token, got num_global=0")


_attend = Attention(
    "edge_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor row_offsets, Tensor columns, "
    "Tensor? column_offsets, Tensor? rows, Tensor? order, SymInt block_size, SymInt num_global, Tensor? bias_table, "
    "int[] window, Tensor? positions, bool causal, float dropout_p, Tensor? seed, float scale, bool importance) "
    "-> (Tensor out, Tensor lse, Tensor importance)",
    takes={
        **dict.fromkeys(("query", "key", "value"), "B H G+N D"),
        "row_offsets": "1 M+1 | H M+1 | B 1 M+1 | B H M+1: int32",
        "columns": "nnz: int32",
        "column_offsets": "1 M+1 | H M+1 | B 1 M+1 | B H M+1: int32",
        "rows": "nnz: int32",
        "order": "M*S: int32",
        "block_size": "S",
        "num_global": "G",
        "bias_table": "R H: float32",
        "window": ">= 1",
        "positions": "N | B N: int64",
    },
    also=_check_blocks,
    inputs=("query", "key", "value", "bias_table"),
    tokens="G+N+G+N",
    fake=_fake,
    pairs=_pairs,
    autocast=("query", "key", "value"),
    shared=("columns", "rows", "order", "bias_table"),
)
