"""Latent-bottleneck attention: few latents read a long context, or many positions read few latents.

    out = softmax(scale * q [k_1; k_2; ...]^T) [v_1; v_2; ...]

MeBT: Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers" (CVPR 2023). The modes of its blocks differ in who reads whom::

    latent_enc     latents <- context               256 queries, thousands of keys
    latent_self    latents <- latents
    lt2l           latents <- (latents, targets)    keys in two tensors, read where they lie
    latent_dec     targets <- latents               thousands of queries, 256 keys
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vattn import _checks, reference
from vattn._attention import Attention
from vattn._flops import keys_read
from vattn._library import run_reference, runs_reference
from vattn._looks import once
from vattn._meshes import on_mesh, over_mesh
from vattn.reference.dropout import random_seed


def latent_attention(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of any number of queries over keys in one or several tensors.

    Fast for few queries and very many keys, and for very many queries and few keys. Lengths may change with every
    call. An empty context is a context: where a query has no key, the output is 0 and its lse -inf.

    Args:
        query: ``(B, H, Lq, D)``, float32, bfloat16, float16 or float64, any strides (a last axis that is not
            contiguous costs one copy). D is at most 256.
        key, value: ``(B, H, Lk, D)``, or tuples (or lists) of as many such tensors, of any lengths, which are read
            as if they were concatenated along their tokens. Gradients go to each tensor.
        key_lengths: ``(B,)`` int32 or int64: sample b reads its first ``key_lengths[b]`` keys. Between 0 and Lk: the
            CPU kernel raises a ValueError otherwise; the GPU, which would have to wait for it, and the reference, which
            float64 runs, clamp them. For one key tensor only.
        dropout_p: probability of dropping an attention weight; the seed comes from torch's generator.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, Lq, D)``, in memory as ``(B, Lq, H, D)``, so that merging heads with
        ``out.movedim(1, -2).flatten(-2)`` is a view. With `return_lse` also lse ``(B, H, Lq)`` in float32 (float64 for
        float64 inputs), natural logarithm.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers".

    Example:
        >>> latents, context = torch.randn(1, 4, 16, 32), torch.randn(1, 4, 1000, 32)      # (B, H, tokens, D)
        >>> latent_attention(latents, context, context).shape                              # encode
        torch.Size([1, 4, 16, 32])
        >>> latent_attention(latents, (latents, context), (latents, context)).shape        # without a torch.cat
        torch.Size([1, 4, 16, 32])
        >>> latent_attention(context, latents, latents).shape                              # decode
        torch.Size([1, 4, 1000, 32])
    """
    dropout_p, scale = _check(query, key, value, key_lengths, dropout_p, scale)
    keys, values = ([x] if isinstance(x, Tensor) else list(x) for x in (key, value))
    seed = random_seed(query.device) if dropout_p > 0 else None
    out, lse = attend(query, keys, values, key_lengths, dropout_p, seed, scale)
    return (out, lse) if return_lse else out


@once
def _check(
    query: Tensor, key: Tensor | Sequence[Tensor], value: Tensor | Sequence[Tensor], key_lengths: Tensor | None,
    dropout_p: float, scale: float | None,
) -> tuple[float, float]:  # fmt: skip
    """dropout_p and scale of a call that is right."""
    op = "latent_attention"
    checked_inputs(op, query, key, value, key_lengths)
    return _checks.dropout(op, dropout_p), _checks.scale(op, scale, query.shape[-1])


def checked_inputs(
    op: str, query: Tensor, key: Tensor | Sequence[Tensor], value: Tensor | Sequence[Tensor], key_lengths: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values as lists of tensors which, with `query` and `key_lengths`, are what the operator takes."""
    _checks.tensor(op, "query", query)
    _checks.rank(op, "query", query, "(B, H, Lq, D)")
    _checks.head_dim(op, query)
    names = ("key", "value")
    keys, values = (
        [x] if isinstance(x, Tensor) else _checks.sequence(op, n, x) for n, x in zip(names, (key, value), strict=True)
    )
    if len(keys) != len(values):
        raise ValueError(f"{op}: value must have as many tensors as key ({len(keys)}), got len(value)={len(values)}")
    for i, pair in enumerate(zip(keys, values, strict=True)):
        for name, whole, x in zip(names, (key, value), pair, strict=True):
            name = name if isinstance(whole, Tensor) else f"{name}[{i}]"
            _checks.tensor(op, name, x)
            _checks.rank(op, name, x, "(B, H, Lk, D)")
            _checks.same(op, "query", query, name, x, shape=False)
            _checks.same_but_tokens(op, query, name, x)
        if pair[0].shape[2] != pair[1].shape[2]:
            raise ValueError(
                f"{op}: key and value must be equally long, got key.shape={tuple(pair[0].shape)}, "
                f"value.shape={tuple(pair[1].shape)}"
            )
    if key_lengths is not None:
        _checks.lengths(op, "key_lengths", key_lengths, query)
        if len(keys) > 1:
            raise ValueError(f"{op}: key_lengths must come with one key tensor, got len(key)={len(keys)}")
    return keys, values


def attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], key_lengths: Tensor | None, dropout_p: float,
    seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out and lse of arguments that have been checked; for `seed`, see :func:`vattn.reference.dropout.numbered`."""
    if on_mesh(query, *keys, *values, key_lengths):
        return over_mesh(
            "latent_attention", query=query, keys=keys, values=values, key_lengths=key_lengths, dropout_p=dropout_p,
            seed=seed, scale=scale,
        )  # fmt: skip
    if runs_reference(query, "latent_attention"):
        return run_reference(
            reference.latent_attention, query, keys, values, key_lengths=key_lengths, dropout_p=dropout_p, scale=scale,
            return_lse=True, seed=seed,
        )  # fmt: skip
    return _attend(query, keys, values, key_lengths, dropout_p, seed, scale)


def _pairs(query: Tensor, keys: list[Tensor], key_lengths: Tensor | None, **others: Any) -> int:
    B, H, queries, _ = query.shape
    return H * queries * keys_read(key_lengths, B, sum(key.shape[2] for key in keys))


_attend = Attention(
    "latent_attention(Tensor query, Tensor[] keys, Tensor[] values, Tensor? key_lengths, float dropout_p, "
    "Tensor? seed, float scale) -> (Tensor out, Tensor lse)",
    takes={"query": "B H Lq D", "keys": "B H Lk[] D", "values": "B H Lk[] D", "key_lengths": "B: int"},
    inputs=("query", "keys", "values"),
    tokens="Lq+Lk[]",
    pairs=_pairs,
    autocast=("query", "keys", "values"),
)
