"""Token importance: how much probability a key receives, without the matrix of probabilities.

    importance[k] = mean over heads and queries of softmax(scale * q k^T + bias)[q, k]

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023): the tokens that receive
little leave the network (see :func:`vattn.select_tokens`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._flops import keys_read
from vattn._library import compute_dtype, run_reference, runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh
from vattn._operator import Operator
from vattn.position_bias import RelativePositionBias3D, check_bias, check_table, table_of


def token_importance(
    query: Tensor,
    key: Tensor,
    *,
    position_bias: RelativePositionBias3D | None = None,
    positions: Tensor | None = None,
    key_lengths: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The softmax probability that each key receives, averaged over heads and queries.

    It has no gradient. Memory does not grow with Lq x Lk.

    Args:
        query: ``(B, H, Lq, D)``, float32, bfloat16, float16 or float64, any strides. D is at most 256.
        key: ``(B, H, Lk, D)``.
        position_bias: a table of biases that is added to the scaled scores, for self-attention: query and key are the
            same ``G + N`` tokens, the first ``G = position_bias.num_global`` of which are global.
        positions: ``(N,)`` or ``(B, N)`` int64, with `position_bias`: the raster index of each token that is not global
            in ``position_bias.window``; None for 0 .. N-1.
        key_lengths: ``(B,)`` int32 or int64: sample b reads its first ``key_lengths[b]`` keys, and the others get 0.
            Between 0 and Lk: the CPU kernel raises a ValueError otherwise; the GPU and the reference clamp them.
        lse: ``(B, H, Lq)`` float32 (float64 for float64 inputs), the log-sum-exp of the scores of each query, over
            keys that may be more than `key`: probabilities are then ``exp(score - lse)``, which is one pass over the
            scores instead of two. A query of -inf gives nothing. None: that over `key`.
        scale: factor of the scores; None means ``D ** -0.5``.

    Returns:
        ``(B, Lk)`` in float32 (float64 for float64 inputs); 0 where there is no query. A NaN in a query makes that of
        all keys that its sample reads NaN, for it is their mean.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on node sparsity.

    Example:
        >>> text, video = torch.randn(2, 4, 12, 32), torch.randn(2, 4, 1000, 32)           # (B, H, tokens, D)
        >>> importance = token_importance(text, video)
        >>> importance.shape, torch.allclose(importance.sum(1), torch.ones(2))
        (torch.Size([2, 1000]), True)
    """
    op = "token_importance"
    num_global, scale = _check(query, key, position_bias, positions, key_lengths, lse, scale)
    query, key, lse = query.detach(), key.detach(), None if lse is None else lse.detach()
    if on_mesh(query, key, positions, key_lengths, lse):
        return over_mesh(
            op, query=query, key=key, position_bias=position_bias, positions=positions, key_lengths=key_lengths,
            lse=lse, scale=scale,
        )  # fmt: skip
    if runs_reference(query, op):
        if position_bias is not None and positions is not None:
            _checks.in_range(op, "positions", positions, math.prod(position_bias.window))
        return run_reference(
            reference.token_importance, query, key, position_bias=position_bias, positions=positions,
            key_lengths=key_lengths, lse=lse, scale=scale,
        )  # fmt: skip
    table, window = table_of(position_bias)
    table = None if table is None else table.detach()
    return _importance(query, key, table, window, num_global, positions, key_lengths, lse, scale)


@once
def _check(
    query: Tensor, key: Tensor, position_bias: RelativePositionBias3D | None, positions: Tensor | None,
    key_lengths: Tensor | None, lse: Tensor | None, scale: float | None,
) -> tuple[int, float]:  # fmt: skip
    """How many tokens are global, and scale, of a call that is right."""
    op = "token_importance"
    for name, x, axes in (("query", query, "Lq"), ("key", key, "Lk")):
        _checks.tensor(op, name, x)
        _checks.rank(op, name, x, f"(B, H, {axes}, D)")
        _checks.same(op, "query", query, name, x, shape=False)
        _checks.same_but_tokens(op, query, name, x)
    _checks.head_dim(op, query)
    num_global = 0
    if position_bias is not None:
        num_global = _check_self_attention(op, position_bias, positions, query, key)
    elif positions is not None:
        raise ValueError(f"{op}: positions must come with position_bias, got position_bias=None")
    if key_lengths is not None:
        _checks.lengths(op, "key_lengths", key_lengths, query)
    if lse is not None:
        _check_lse(op, lse, query)
    return num_global, _checks.scale(op, scale, query.shape[-1])


def _check_lse(op: str, lse: Tensor, query: Tensor) -> None:
    _checks.tensor(op, "lse", lse)
    wide = torch.promote_types(compute_dtype(query), torch.float32)
    if lse.dtype != wide:
        raise TypeError(f"{op}: lse must be {wide}, got lse.dtype={lse.dtype}")
    if lse.device != query.device:
        raise ValueError(f"{op}: lse must be on the device of query ({query.device}), got lse.device={lse.device}")
    if lse.shape != query.shape[:-1]:
        raise ValueError(f"{op}: lse must have shape {tuple(query.shape[:-1])}, got lse.shape={tuple(lse.shape)}")


def _check_self_attention(
    op: str, bias: RelativePositionBias3D, positions: Tensor | None, query: Tensor, key: Tensor
) -> int:
    """With a bias both sides are the same tokens; returns how many of them are global."""
    num_global = bias.num_global if isinstance(bias, RelativePositionBias3D) else 0
    if positions is not None:
        _checks.positions(op, positions, query, query.shape[0], query.shape[2] - num_global)
    check_bias(op, bias, query, num_global, positions)
    if query.shape != key.shape or query.shape[2] < num_global:
        raise ValueError(
            f"{op}: with position_bias query and key must be the same tokens, at least position_bias.num_global "
            f"({num_global}), got query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )
    return num_global


def _flops(query: Tensor, key: Tensor, key_lengths: Tensor | None, lse: Tensor | None, **others: Any) -> int:
    B, H, queries, D = query.shape
    pairs = H * queries * keys_read(key_lengths, B, key.shape[2])
    passes = 2 if lse is None else 1  # scores for the sums of their powers, and again for the weights
    return 2 * passes * pairs * D


def _check_table(
    query: Tensor, key: Tensor, bias_table: Tensor | None, window: Sequence[int], num_global: int, **others: Any
) -> None:  # fmt: skip
    check_table("token_importance", bias_table, window, num_global)
    if bias_table is not None and query.shape != key.shape:
        raise ValueError(
            "token_importance: with a bias_table query and key must be the same tokens, "
            f"got query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )


_importance = Operator(
    "token_importance(Tensor query, Tensor key, Tensor? bias_table, int[] window, SymInt num_global, "
    "Tensor? positions, Tensor? key_lengths, Tensor? lse, float scale) -> Tensor importance",
    takes={
        "query": "B H Lq D",
        "key": "B H G+N D",
        "bias_table": "R H: float32",
        "window": ">= 1",
        "num_global": "G",
        "positions": "N | B N: int64",
        "key_lengths": "B: int",
        "lse": "B H Lq: float32",
        "scale": "finite",
    },
    also=_check_table,
    fake=lambda query, key, *others: query.new_empty(key.shape[0], key.shape[2], dtype=torch.float32),
    constant=("importance",),
    autocast=("query", "key"),
    shared=("bias_table",),
    flops=_flops,
)
