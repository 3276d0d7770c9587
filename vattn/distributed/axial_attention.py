"""Axial attention of a grid of which one axis lies on several ranks.

    sharded_dim != dim      rank 0  AAAA        lines lie whole on a rank: nothing is sent
                            rank 1  BBBB

    sharded_dim == dim      rank 0  AB  CD      every rank has a part of all lines; it gets all of some: another axis is
                            rank 1  AB  CD      split instead, heads or whichever ranks can share best, and the output
                                                goes back

Ho et al., "Axial Attention in Multidimensional Transformers" (2019).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks
from vattn._library import compute_dtype
from vattn.distributed._checks import asks, settings_of
from vattn.distributed._collectives import start_exchange
from vattn.distributed._numbers import with_numbers
from vattn.distributed._ranks import Ranks, agree, dropout_seed, ranks_of
from vattn.ops.axial_attention import attend

OP = "distributed.axial_attention"


def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dim: int,
    *,
    group: Any = None,
    sharded_dim: int = 0,
    lengths: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vattn.axial_attention` with one axis of the grid sharded over the ranks of a process group.

    Along any other axis than the sharded one lines lie whole on a rank, and nothing is sent. Along the sharded one,
    each rank gets all lines of its share of another axis: heads, batch or an axis of the grid, the one that the ranks
    can share most evenly. With ``n`` of the tokens of a grid on this rank, ``m`` on all others, and a share ``s`` of
    that axis, which is about one in as many as there are ranks, a rank sends

        3 * B * H * D * n * (1 - s)     numbers of query, key and value
        B * H * D * m * s               numbers of the output; for `return_lse` also ``B * H * m * s`` numbers of 32
                                        bits (64 for float64)

    and in the backward as many as it gets forward.

    Args:
        query, key, value: ``(B, H, *grid_r, D)``: this rank's part of the grid. Its axis `sharded_dim` has any length,
            0 too; the others are the same on every rank.
        dim: the axis of the grid along which tokens attend: 0 is the first one, and -1 the last one.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for the default group. Shards lie in the order of
            ranks.
        sharded_dim: the axis of the grid that is sharded, numbered as `dim` is.
        lengths: how long that axis is on each rank, where it is known; otherwise the ranks ask each other, and compare
            their settings.
        dropout_p: probability of dropping an attention weight. The mask is that of one device with the seed that rank
            0 draws; all ranks draw one.
        scale: factor of the scores; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        The output ``(B, H, *grid_r, D)`` of this rank's tokens, in memory as ``(B, *grid_r, H, D)``, and with
        `return_lse` also lse ``(B, H, *grid_r)``: as of :func:`vattn.axial_attention`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings, dtypes or shapes that differ between ranks.
        RuntimeError: the call is wrong on another rank; or the group fails, as when a rank has died.

    Source:
        Ho et al., "Axial Attention in Multidimensional Transformers"; for the exchange Jacobs et al., "DeepSpeed
        Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models".

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4, 8, 8, 16)             # (B, H, T, height, width, D), some frames of a clip
        >>> out = sum(axial_attention(q, k, v, dim, group=group) for dim in range(3))
        >>> out.shape
        torch.Size([1, 2, 4, 8, 8, 16])
    """
    ranks = ranks_of(OP, group)
    found: dict[str, Any] = {}

    def check() -> tuple[Mapping[str, Any], Sequence[int]]:
        _checks.alike(OP, "(B, H, *grid, D)", query=query, key=key, value=value)
        _checks.head_dim(OP, query)
        grid = query.shape[2:-1]
        axes = {}
        for name, axis in (("dim", dim), ("sharded_dim", sharded_dim)):
            _checks.integer(OP, name, axis, least=-len(grid))
            if axis >= len(grid):
                raise ValueError(
                    f"{OP}: {name} must be less than the axes of the grid ({len(grid)}), got {name}={axis}"
                )
            axes[name] = int(axis) % len(grid)
        found.update(axes, dropout_p=_checks.dropout(OP, dropout_p), scale=_checks.scale(OP, scale, query.shape[-1]))
        others = [n for axis, n in enumerate(grid) if axis != axes["sharded_dim"]]
        settings = settings_of(
            OP, "query", query, **found, return_lse=bool(return_lse),
            requires_grad=found["dim"] == found["sharded_dim"] and asks(query, key, value),
            **{"the other axes of the grid": others},
        )  # fmt: skip
        return settings, [grid[axes["sharded_dim"]]]

    seed = dropout_seed(group, query, dropout_p)
    agreed = agree(OP, ranks, check, None if lengths is None else [lengths], seed)
    axis, sharded = found["dim"], found["sharded_dim"]
    rest = found["dropout_p"], found["scale"]
    B, H, *grid, _ = query.shape
    shards = agreed.lengths[0]
    whole = [B, H, *grid]
    whole[2 + sharded] = sum(shards)
    here = [range(n) for n in whole]

    if axis != sharded or sum(map(bool, shards)) < 2:  # lines lie whole on a rank
        begin = agreed.begins(ranks.rank)
        here[2 + sharded] = range(begin, begin + grid[sharded])
        out, lse = attend(query, key, value, axis, rest[0], _numbers(agreed.seed, whole, here), rest[1])
        return (out, lse) if return_lse else out

    others = [axis for axis in (1, 0, *range(2, len(whole))) if axis != 2 + sharded]
    unevenness = [-(-whole[axis] // ranks.size) / max(whole[axis], 1) for axis in others]
    split = others[unevenness.index(min(unevenness))]
    cuts = [whole[split] * rank // ranks.size for rank in range(ranks.size + 1)]
    here[split] = range(cuts[ranks.rank], cuts[ranks.rank + 1])
    axes = (2 + sharded, shards), (split, [end - begin for begin, end in itertools.pairwise(cuts)])
    inputs = [x.to(compute_dtype(x)) for x in (query, key, value)]
    q, k, v = Resharding(ranks, inputs, *axes).wait()
    out, lse = attend(q, k, v, axis, rest[0], _numbers(agreed.seed, whole, here), rest[1])
    results = [out, lse[..., None]] if return_lse else [out]
    back = [Resharding(ranks, [x], *reversed(axes)) for x in results]
    results = [x for resharding in back for x in resharding.wait()]
    return (results[0], results[1].squeeze(-1)) if return_lse else results[0]


class Resharding:
    """Tensors ``(B, H, *grid, D)`` on their way from shards of one axis to shards of another one.

    On the way, and when they have come, heads lie beside channels.
    """

    def __init__(
        self, ranks: Ranks, inputs: Sequence[Tensor], gathered: tuple[int, Sequence[int]],
        split: tuple[int, Sequence[int]],
    ) -> None:  # fmt: skip
        """`gathered` and `split` are an axis each, and how much of it each rank has, or will have."""
        self._rank, self._others = ranks.rank, [rank for rank in range(ranks.size) if rank != ranks.rank]
        self._axis, self._lengths = _heads_last(gathered[0], inputs[0].dim()), gathered[1]
        parts = [x.movedim(1, -2).split(list(split[1]), _heads_last(split[0], x.dim())) for x in inputs]
        self._own = [part[ranks.rank] for part in parts]
        rows = [part[rank].reshape(-1, part[rank].shape[-1]) for rank in self._others for part in parts]
        sent, received = [0] * ranks.size, [0] * ranks.size
        for rank in self._others:
            sent[rank] = len(inputs) * parts[0][rank].shape[:-1].numel()
            received[rank] = len(inputs) * self._shape(rank)[:-1].numel()
        self._pending = start_exchange(torch.cat(rows), ranks, sent, received)

    def _shape(self, rank: int) -> torch.Size:
        """Of what comes from a rank."""
        shape = list(self._own[0].shape)
        shape[self._axis] = self._lengths[rank]
        return torch.Size(shape)

    def wait(self) -> list[Tensor]:
        shapes = [self._shape(rank) for rank in self._others for _ in self._own]
        parts = self._pending.wait().split([shape[:-1].numel() for shape in shapes])
        came = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        results = []
        for i, own in enumerate(self._own):
            of_ranks = came[i :: len(self._own)]  # without this one
            of_ranks.insert(self._rank, own)
            results.append(torch.cat(of_ranks, self._axis).movedim(-2, 1))
        return results


def _heads_last(axis: int, dims: int) -> int:
    """The place of an axis when heads lie beside channels."""
    return dims - 2 if axis == 1 else max(axis - 1, 0)


def _numbers(seed: Tensor | None, whole: Sequence[int], here: Sequence[range]) -> Tensor | None:
    """`seed` with the numbers of the part `here` of a grid ``(B, H, *grid)``."""
    samples, heads, *ranges = here
    tokens = torch.zeros(1, dtype=torch.int64)
    for size, places in zip(whole[2:], ranges, strict=True):
        tokens = (tokens[:, None] * size + torch.arange(places.start, places.stop)).flatten()
    return with_numbers(
        seed, len(samples), len(heads), [tokens], [tokens], first_head=heads.start, all_heads=whole[1],
        first_sample=samples.start,
    )  # fmt: skip
