"""Node-sparse attention: every query reads the few keys of its sample that were kept.

    out = softmax(scale * q k[kept]^T) v[kept]

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023)::

    keys      0  1  2  3  4  5  6  7        kept = [1, 4, 5]
    queries      x        x  x              gathered inside the kernel
"""

from typing import Any

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._attention import Attention
from vattn._flops import keys_read
from vattn._library import run_reference, runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh
from vattn.reference.dropout import random_seed


def node_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    kept_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the kept keys only, which are read where they lie.

    Args:
        query: ``(B, H, Lq, D)``, float32, bfloat16, float16 or float64, any strides (a last axis that is not
            contiguous costs one copy). D is at most 256.
        key, value: ``(B, H, Lk, D)``.
        kept: ``(B, K)`` int64, the keys that each sample reads, in any order; one that is listed twice counts twice.
        kept_lengths: ``(B,)`` int32 or int64: sample b reads its first ``kept_lengths[b]`` entries of `kept`; those
            behind are not looked at, and may hold anything. Between 0 and K: the CPU kernel raises a ValueError
            otherwise; the GPU and the reference clamp them. None: all entries.
        dropout_p: probability of dropping an attention weight; the seed comes from torch's generator. The copies of a
            key that is listed twice are dropped together.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, Lq, D)``, in memory as ``(B, Lq, H, D)``, so that merging heads with
        ``out.movedim(1, -2).flatten(-2)`` is a view. With `return_lse` also lse ``(B, H, Lq)`` in float32 (float64 for
        float64 inputs), natural logarithm. Without a kept key, 0 and -inf.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit; on a CPU, a kept index out of range.
        RuntimeError: on a GPU, a kept index out of range. It is never read: the device asserts it, and the error comes
            where the host next waits for the device, which this operator does not.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on node sparsity.

    Example:
        >>> text, video = torch.randn(2, 4, 12, 32), torch.randn(2, 4, 1000, 32)           # (B, H, tokens, D)
        >>> kept = torch.rand(2, 1000).topk(100).indices
        >>> node_sparse_attention(text, video, video, kept).shape
        torch.Size([2, 4, 12, 32])
    """
    dropout_p, scale = _check(query, key, value, kept, kept_lengths, dropout_p, scale)
    seed = random_seed(query.device) if dropout_p > 0 else None
    out, lse = attend(query, key, value, kept, kept_lengths, dropout_p, seed, scale)
    return (out, lse) if return_lse else out


@once
def _check(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, kept_lengths: Tensor | None, dropout_p: float,
    scale: float | None,
) -> tuple[float, float]:  # fmt: skip
    """dropout_p and scale of a call that is right."""
    op = "node_sparse_attention"
    for name, x, axes in (("query", query, "Lq"), ("key", key, "Lk"), ("value", value, "Lk")):
        _checks.tensor(op, name, x)
        _checks.rank(op, name, x, f"(B, H, {axes}, D)")
        _checks.same(op, "query", query, name, x, shape=False)
        _checks.same_but_tokens(op, query, name, x)
    _checks.same(op, "key", key, "value", value)
    _checks.head_dim(op, query)
    check_kept(op, kept, query)
    if kept_lengths is not None:
        _checks.lengths(op, "kept_lengths", kept_lengths, query)
    return _checks.dropout(op, dropout_p), _checks.scale(op, scale, query.shape[-1])


def attend(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, kept_lengths: Tensor | None, dropout_p: float,
    seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out and lse of arguments that have been checked; for `seed`, see :func:`vattn.reference.dropout.numbered`."""
    if on_mesh(query, key, value, kept, kept_lengths):
        return over_mesh(
            "node_sparse_attention", query=query, key=key, value=value, kept=kept, kept_lengths=kept_lengths,
            dropout_p=dropout_p, seed=seed, scale=scale,
        )  # fmt: skip
    if runs_reference(query, "node_sparse_attention"):
        _check_range(kept, kept_lengths, key.shape[2])
        return run_reference(
            reference.node_sparse_attention, query, key, value, kept, kept_lengths=kept_lengths, dropout_p=dropout_p,
            scale=scale, return_lse=True, seed=seed,
        )  # fmt: skip
    return _attend(query, key, value, kept, kept_lengths, dropout_p, seed, scale)


def check_kept(op: str, kept: object, query: Tensor) -> None:
    """`kept` lists keys for each sample; whether there are such keys is for the kernels to see."""
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64:
        got = f"kept.dtype={kept.dtype}" if isinstance(kept, Tensor) else f"kept={kept!r}"
        raise TypeError(f"{op}: kept must be an int64 tensor, got {got}")
    _checks.dense(op, "kept", kept, meshes=True)
    if kept.dim() != 2 or kept.shape[0] != query.shape[0]:
        raise ValueError(f"{op}: kept must have shape ({query.shape[0]}, K), got kept.shape={tuple(kept.shape)}")
    if kept.device != query.device:
        raise ValueError(f"{op}: kept must be on the device of query ({query.device}), got kept.device={kept.device}")


def _check_range(kept: Tensor, kept_lengths: Tensor | None, keys: int) -> None:
    op = "node_sparse_attention"
    if kept_lengths is None:
        _checks.in_range(op, "kept", kept, keys)
    elif keys == 0:
        _checks.in_range(op, "kept_lengths", kept_lengths.clamp(0, kept.shape[1]), 1)
    else:
        listed = torch.arange(kept.shape[1], device=kept.device) < kept_lengths[:, None]
        _checks.in_range(op, "kept", torch.where(listed, kept, 0), keys)


def _pairs(query: Tensor, kept: Tensor, kept_lengths: Tensor | None, **others: Any) -> int:
    B, H, queries, _ = query.shape
    return H * queries * keys_read(kept_lengths, B, kept.shape[1])


_attend = Attention(
    "node_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor kept, Tensor? kept_lengths, "
    "float dropout_p, Tensor? seed, float scale) -> (Tensor out, Tensor lse)",
    takes={
        "query": "B H Lq D",
        "key": "B H Lk D",
        "value": "B H Lk D",
        "kept": "B K: int64",
        "kept_lengths": "B: int",
    },
    tokens="Lq+Lk",
    pairs=_pairs,
    autocast=("query", "key", "value"),
)
