"""Latent attention whose context, or whose queries, lie on several ranks.

    sharded="keys"       latents read the context of all ranks       rank 0 [k v]   rank 1 [k v]   rank 2 [k v]
                         each rank attends to its own part, and              \\          |          /
                         (out, lse) are merged exactly                         q, the same everywhere

    sharded="queries"    positions read the latents                  rank 0 [q]     rank 1 [q]     rank 2 [q]
                         nothing is sent                                     k, v, the same everywhere

MeBT: Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers" (CVPR 2023).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vattn import _checks
from vattn.distributed._checks import asks, grad_mode, settings_of, values_of
from vattn.distributed._collectives import enter
from vattn.distributed._merge import merge_over_ranks
from vattn.distributed._numbers import with_numbers
from vattn.distributed._ranks import agree, dropout_seed, ranks_of
from vattn.ops.latent_attention import attend, checked_inputs

OP = "distributed.latent_attention"


def latent_attention(
    query: Tensor,
    key: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    group: Any = None,
    sharded: str | Sequence[str] = "keys",
    grad: str = "full",
    lengths: Sequence[int] | Sequence[Sequence[int] | None] | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vattn.latent_attention` with keys or queries sharded over the ranks of a process group.

    With keys sharded, a rank sends ``B * H * Lq * (D + 2)`` numbers of at least 32 bits forward, and in the backward
    the gradient of the query, however long the context is. With queries sharded it sends nothing forward, and in the
    backward the gradients of keys and values. With ``grad="partial"`` it is the gradient of the output that is sent in
    the backward, and nothing for queries sharded.

    Args:
        query: ``(B, H, Lq, D)``: the same on every rank, or for ``sharded="queries"`` this rank's part of the queries.
        key, value: ``(B, H, Lk, D)``, or tuples of as many such tensors: this rank's part of the context where they are
            sharded, of any length, 0 too; otherwise the same on every rank.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        sharded: "keys", "queries", or for tuples "keys" or "replicated" for each tensor: those that are replicated
            count once, and each rank reads its share of them.
        grad: what gradients of replicated tensors are. "full": that of a replicated output must come whole, and equal,
            on every rank; those of replicated inputs are whole, and equal. "partial": the loss is the sum of those of
            the ranks; a replicated input gets this rank's share of its gradient, and the sum over the ranks is whole.
        lengths: the sizes of the shards, one for each rank, where they are known; for tuples such a list for each
            tensor, None for one that is replicated. Without them the ranks ask each other, and compare their settings.
        key_lengths: ``(B,)`` int32 or int64: sample b reads the first ``key_lengths[b]`` keys of all ranks. For one key
            tensor only.
        dropout_p: probability of dropping an attention weight. The mask is that of one device with the seed that rank
            0 draws; all ranks draw one.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, Lq, D)`` of the queries given, and with `return_lse` also lse ``(B, H, Lq)``: as of
        :func:`vattn.latent_attention`; on every rank the same unless queries are sharded.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, dtypes or shapes that differ between ranks.
            Queries and keys cannot both be sharded: every rank would need the keys of all.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers"; for the merge Milakov and Gimelshein, "Online normalizer calculation for softmax", section 3.

    Example:
        >>> latents, context = torch.randn(1, 4, 16, 32), torch.randn(1, 4, 1000, 32)    # context: this rank's part
        >>> vattn.distributed.latent_attention(latents, context, context, group=group).shape
        torch.Size([1, 4, 16, 32])
    """
    ranks = ranks_of(OP, group)
    found: dict[str, Any] = {}

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        grad_mode(OP, grad)
        keys, values = checked_inputs(OP, query, key, value, key_lengths)
        shards = _sharded(sharded, len(keys), isinstance(key, Tensor))
        if not isinstance(key, Tensor) and sharded != "queries":
            _check_lengths_of_tuple(lengths, shards)
        found.update(
            keys=keys, values=values, shards=shards, dropout_p=_checks.dropout(OP, dropout_p),
            scale=_checks.scale(OP, scale, query.shape[-1]),
        )  # fmt: skip
        own = [k.shape[2] for k, how in zip(keys, shards, strict=True) if how == "keys"]
        fixed = [k.shape[2] for k, how in zip(keys, shards, strict=True) if how == "replicated"]
        if sharded == "queries":
            own = [query.shape[2]]
        else:
            fixed.append(query.shape[2])
        alike = [] if sharded == "queries" else [query]
        alike += [x for some in (keys, values) for x, how in zip(some, shards, strict=True) if how == "replicated"]
        asked = [asks(x) for x in alike] if grad == "full" else sharded != "queries" and asks(query, *keys, *values)
        settings = settings_of(
            OP, "query", query, requires_grad=asked, sharded=sharded, grad=grad,
            dropout_p=found["dropout_p"], scale=found["scale"], key_lengths=values_of(key_lengths),
            **{"numbers of replicated tokens": fixed},
        )  # fmt: skip
        return settings, own

    seed = dropout_seed(group, query, dropout_p)
    agreed = agree(OP, ranks, check, _of_shards(lengths, sharded, key), seed)
    keys, values, shards = found["keys"], found["values"], found["shards"]
    B, H, Lq, _ = query.shape
    rest = found["dropout_p"], None, found["scale"]

    if sharded == "queries":
        begin = agreed.begins(ranks.rank)
        seeds = with_numbers(agreed.seed, B, H, [range(begin, begin + Lq)], [range(sum(k.shape[2] for k in keys))])
        keys, values = ([enter(x, ranks, grad) for x in some] for some in (keys, values))
        out, lse = attend(query, keys, values, key_lengths, rest[0], seeds, rest[2])
        return (out, lse) if return_lse else out

    query = enter(query, ranks, grad)
    numbers, first, read_lengths = [], 0, key_lengths
    of_shards = iter(range(len(agreed.lengths)))
    for i, how in enumerate(shards):
        if how == "keys":
            shard = next(of_shards)
            begin, total = agreed.begins(ranks.rank, shard), sum(agreed.lengths[shard])
            end = begin + keys[i].shape[2]
        else:  # of replicated keys each rank reads its share
            total = keys[i].shape[2]
            share = ranks.share(total)
            begin, end = share.start, share.stop
            keys[i], values[i] = (enter(x, ranks, grad)[:, :, begin:end] for x in (keys[i], values[i]))
        if read_lengths is not None:
            read_lengths = (read_lengths - begin).clamp(0, end - begin)
        numbers.append(range(first + begin, first + end))
        first += total
    if key_lengths is not None:
        _checks.in_range(OP, "key_lengths", key_lengths, first + 1)
    seeds = with_numbers(agreed.seed, B, H, [range(Lq)], numbers)
    out, lse = attend(query, keys, values, read_lengths, rest[0], seeds, rest[2])
    out, lse = merge_over_ranks(out, lse, ranks, grad)
    return (out, lse) if return_lse else out


def _sharded(sharded: object, count: int, one: bool) -> list[str]:
    """For each key tensor "keys" or "replicated"."""
    if sharded == "both":
        raise ValueError(
            f"{OP}: sharded must be keys or queries, got sharded='both', where every rank would need the keys of all"
        )
    if isinstance(sharded, str):
        if sharded not in ("keys", "queries"):
            raise ValueError(f"{OP}: sharded must be keys, queries, or a tuple for tuples, got sharded={sharded!r}")
        return ["keys" if sharded == "keys" else "replicated"] * count
    if not isinstance(sharded, (list, tuple)):
        raise TypeError(f"{OP}: sharded must be a str or a tuple of them, got sharded={sharded!r}")
    if one or len(sharded) != count or not set(sharded) <= {"keys", "replicated"}:
        raise ValueError(
            f"{OP}: sharded must be keys or replicated for each of {count} key tensors of a tuple, "
            f"got sharded={tuple(sharded)}"
        )
    return list(sharded)


def _check_lengths_of_tuple(lengths: Any, shards: Sequence[str]) -> None:
    """`lengths` is None for those tensors that are replicated, and for no others."""
    if not isinstance(lengths, (list, tuple)):  # :func:`agree` looks at what it is
        return
    if [each is None for each in lengths] != [how == "replicated" for how in shards]:
        raise ValueError(
            f"{OP}: lengths must be a list for each key tensor that is sharded and None for others, "
            f"got lengths={lengths}, sharded={tuple(shards)}"
        )


def _of_shards(
    lengths: Sequence[int] | Sequence[Sequence[int] | None] | None, sharded: str | Sequence[str], key: Any
) -> list[Sequence[int]] | None:
    """`lengths` as a list for each tensor that is sharded."""
    if lengths is None:
        return None
    if isinstance(key, Tensor) or sharded == "queries" or not isinstance(lengths, (list, tuple)):
        return [lengths]  # type: ignore[list-item]
    return [each for each in lengths if each is not None]
