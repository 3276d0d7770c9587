"""The public operators on DTensors: what each of them does where batch, heads or tokens are sharded.

    batch, heads    each rank calls the operator on its part: nothing is sent
    tokens          the function over ranks of the same name, along the dimension of the mesh that shards them
    others          refused by name: nothing is gathered silently

Results are placed as the tensors are. With dropout the ranks take one seed, a broadcast of 8 bytes, and each draws its
part of the mask of one device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

import vattn
from vattn import distributed as over_ranks
from vattn.distributed._placed import Placed
from vattn.layout import BlockLayout
from vattn.ops.axial_attention import attend as attend_axial
from vattn.ops.edge_sparse_attention import attend as attend_edges
from vattn.ops.latent_attention import attend as attend_latent
from vattn.ops.leap_attention import attend as attend_leap
from vattn.ops.node_sparse_attention import attend as attend_nodes
from vattn.position_bias import BiasTable, RelativePositionBias3D, num_offsets


def leap_attention(
    query: Tensor, key: Tensor, value: Tensor, leap: int, group_size: int, fold_div: int, dropout_p: float,
    seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = "B H T N D"
    placed = Placed("leap_attention", {"query": (query, rows), "key": (key, rows), "value": (value, rows)})
    frames = placed.tokens("T")
    q, k, v = map(placed.local, ("query", "key", "value"))
    if frames is None:
        tokens = query.shape[2] * query.shape[3]
        out, lse = attend_leap(
            q, k, v, leap, group_size, fold_div, dropout_p, placed.numbered(seed, tokens, tokens), scale
        )
    else:
        out, lse = over_ranks.leap_attention(
            q, k, v, leap, group=placed.group(frames, seed), lengths=placed.lengths(frames, "T"), group_size=group_size,
            fold_div=fold_div, dropout_p=dropout_p, scale=scale, return_lse=True,
        )  # fmt: skip
    return placed.result(out, rows, rows=True), placed.result(lse, "B H T N")


def periodic_shift(x: Tensor, fold_div: int) -> Tensor:
    axes = "B H T N D"
    placed = Placed("periodic_shift", {"x": (x, axes)}, free="B H N")
    frames = placed.tokens("T")
    if frames is None:
        out = vattn.periodic_shift(placed.local("x"), fold_div)
    else:
        out = over_ranks.periodic_shift(
            placed.local("x"), fold_div, group=placed.group(frames), lengths=placed.lengths(frames, "T")
        )
    return placed.result(out, axes, rows=True)


def axial_attention(
    query: Tensor, key: Tensor, value: Tensor, dim: int, dropout_p: float, seed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    grid = [f"L{i}" for i in range(query.dim() - 3)]
    rows = " ".join(["B", "H", *grid, "D"])
    placed = Placed("axial_attention", {"query": (query, rows), "key": (key, rows), "value": (value, rows)})
    sharded = placed.tokens(*grid)
    q, k, v = map(placed.local, ("query", "key", "value"))
    if sharded is None:
        tokens = math.prod(query.shape[2:-1])
        out, lse = attend_axial(q, k, v, dim, dropout_p, placed.numbered(seed, tokens, tokens), scale)
    else:
        (axis,) = placed.axes[sharded]
        out, lse = over_ranks.axial_attention(
            q, k, v, dim, group=placed.group(sharded, seed), sharded_dim=grid.index(axis),
            lengths=placed.lengths(sharded, axis), dropout_p=dropout_p, scale=scale, return_lse=True,
        )  # fmt: skip
    return placed.result(out, rows, rows=True), placed.result(lse, rows.removesuffix(" D"))


def latent_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], key_lengths: Tensor | None, dropout_p: float,
    seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    one, axes = len(keys) == 1, [f"Lk{i}" for i in range(len(keys))]
    names = {"key": ["key"], "value": ["value"]} if one else {
        name: [f"{name}[{i}]" for i in range(len(keys))] for name in ("key", "value")
    }  # fmt: skip
    tensors: dict[str, tuple[Any, str]] = {"query": (query, "B H Lq D")}
    for name, some in (("key", keys), ("value", values)):
        tensors |= {one: (x, f"B H {axis} D") for one, x, axis in zip(names[name], some, axes, strict=True)}
    placed = Placed("latent_attention", tensors)
    dim = placed.tokens("Lq", *axes)
    sharded = () if dim is None else placed.axes[dim]
    if "Lq" in sharded and len(sharded) > 1:
        raise ValueError(
            "latent_attention: query and key must not be sharded along their tokens by one dimension of the mesh, "
            f"where every rank would need the keys of all, got query.placements={query.placements}"  # type: ignore[attr-defined]
        )
    by_keys = dim if sharded and "Lq" not in sharded else None
    q = placed.local("query", by_keys)
    own_keys, own_values = ([placed.local(one, by_keys) for one in names[name]] for name in ("key", "value"))
    key_lengths = placed.aside("key_lengths", key_lengths, "B")
    if dim is None:
        total = sum(key.shape[2] for key in keys)
        seed = placed.numbered(seed, query.shape[2], total)
        out, lse = attend_latent(q, own_keys, own_values, key_lengths, dropout_p, seed, scale)
    else:
        lengths: Any = [placed.lengths(dim, axis) if axis in sharded else None for axis in axes]
        how: Any = ["keys" if axis in sharded else "replicated" for axis in axes]
        if "Lq" in sharded:
            lengths, how = placed.lengths(dim, "Lq"), "queries"
        elif one:
            lengths, how = lengths[0], "keys"
        out, lse = over_ranks.latent_attention(
            q, own_keys[0] if one else own_keys, own_values[0] if one else own_values, group=placed.group(dim, seed),
            sharded=how, grad="partial" if how == "queries" else "full", lengths=lengths, key_lengths=key_lengths,
            dropout_p=dropout_p, scale=scale, return_lse=True,
        )  # fmt: skip
    return placed.result(out, "B H Lq D", rows=True), placed.result(lse, "B H Lq")


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    axes = " ".join(f"x{i}" for i in range(lses[0].dim()))
    tensors: dict[str, tuple[Any, str]] = {f"outs[{i}]": (out, f"{axes} D".strip()) for i, out in enumerate(outs)}
    tensors |= {f"lses[{i}]": (lse, axes) for i, lse in enumerate(lses)}
    placed = Placed("merge_attention", tensors, free=axes)
    placed.tokens()
    out, lse = vattn.merge_attention(
        [placed.local(f"outs[{i}]") for i in range(len(outs))], [placed.local(f"lses[{i}]") for i in range(len(lses))]
    )
    return placed.result(out, f"{axes} D".strip(), stride=outs[0].stride()), placed.result(lse, axes)


def edge_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout,
    position_bias: RelativePositionBias3D | BiasTable | None, positions: Tensor | None, causal: bool, dropout_p: float,
    seed: Tensor | None, scale: float, importance: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    rows, length = "B H L D", query.shape[2]
    placed = Placed("edge_sparse_attention", {"query": (query, rows), "key": (key, rows), "value": (value, rows)})
    # What is global lies on every rank, and a shard of a DTensor does not.
    dim = placed.tokens(*([] if layout.num_global else ["L"]))
    layout = _part_of(layout, placed.part("B"), placed.part("H"))
    q, k, v = map(placed.local, ("query", "key", "value"))
    positions = placed.aside("positions", positions, "N" if positions is None or positions.dim() == 1 else "B N")
    bias = _local_bias(placed, position_bias)
    seen: Tensor | None = None
    if dim is None:
        seed = placed.numbered(seed, length, length)
        out, lse, seen = attend_edges(q, k, v, layout, bias, positions, causal, dropout_p, seed, scale, importance)
    else:
        out, lse = over_ranks.edge_sparse_attention(
            q, k, v, layout, group=placed.group(dim, seed), grad="partial", lengths=placed.lengths(dim, "L"),
            position_bias=None if bias is None else _module(bias), positions=positions, causal=causal,
            dropout_p=dropout_p, scale=scale, return_lse=True,
        )  # fmt: skip
    if seen is not None:
        seen = placed.result(seen * _share(placed, "H"), "B N", sums=True, others={"N": layout.num_tokens})
    return placed.result(out, rows, rows=True), placed.result(lse, "B H L"), seen


def node_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, kept_lengths: Tensor | None, dropout_p: float,
    seed: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = {"query": (query, "B H Lq D"), "key": (key, "B H Lk D"), "value": (value, "B H Lk D")}
    placed = Placed("node_sparse_attention", tensors)
    dim = placed.tokens("Lq", "Lk")
    by_keys = dim if dim is not None and placed.axes[dim] == ["Lk"] else None
    q, k, v = (placed.local(name, by_keys) for name in tensors)
    kept = cast(Tensor, placed.aside("kept", kept, "B K"))
    kept_lengths = placed.aside("kept_lengths", kept_lengths, "B")
    if by_keys is None:
        begin, count = placed.part("Lq")
        seed = placed.numbered(seed, count if dim is None else range(begin, begin + count), key.shape[2])
        out, lse = attend_nodes(q, k, v, kept, kept_lengths, dropout_p, seed, scale)
    else:
        if kept_lengths is not None:
            raise ValueError(
                "node_sparse_attention: kept_lengths must be None where keys are sharded along their tokens, "
                f"got key.placements={key.placements}"  # type: ignore[attr-defined]
            )
        out, lse = over_ranks.node_sparse_attention(
            q, k, v, kept, group=placed.group(by_keys, seed), lengths=placed.lengths(by_keys, "Lk"),
            dropout_p=dropout_p, scale=scale, return_lse=True,
        )  # fmt: skip
    return placed.result(out, "B H Lq D", rows=True), placed.result(lse, "B H Lq")


def token_importance(
    query: Tensor, key: Tensor, position_bias: RelativePositionBias3D | None, positions: Tensor | None,
    key_lengths: Tensor | None, lse: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    tensors = {"query": (query, "B H Lq D"), "key": (key, "B H Lk D")}
    if lse is not None:
        tensors["lse"] = lse, "B H Lq"
    placed = Placed("token_importance", tensors)
    dim = placed.tokens("Lq", "Lk")
    if dim is not None and position_bias is not None:
        raise ValueError(
            "token_importance: with position_bias tokens must be whole on every rank, "
            f"got query.placements={query.placements}"  # type: ignore[attr-defined]
        )
    positions = placed.aside("positions", positions, "N" if positions is None or positions.dim() == 1 else "B N")
    key_lengths = placed.aside("key_lengths", key_lengths, "B")
    bias = _local_bias(placed, position_bias)
    position_bias = None if bias is None or bias[0].shape[1] == 0 else _module(bias)
    q, k = placed.local("query"), placed.local("key")
    lse = None if lse is None else placed.local("lse")
    if dim is not None and placed.axes[dim] == ["Lk"]:
        found = _importance_of_shard(placed, dim, q, k, key_lengths, lse, scale)
    else:
        found = vattn.token_importance(
            q, k, position_bias=position_bias, positions=positions, key_lengths=key_lengths, lse=lse, scale=scale
        )
    return placed.result(found * _share(placed, "H") * _share(placed, "Lq"), "B Lk", sums=True)


def _importance_of_shard(
    placed: Placed, dim: int, query: Tensor, key: Tensor, key_lengths: Tensor | None, lse: Tensor | None, scale: float
) -> Tensor:
    """The importance of this rank's keys, of those of all ranks along `dim`."""
    if lse is None:
        return over_ranks.token_importance(
            query, key, group=placed.group(dim), lengths=placed.lengths(dim, "Lk"), key_lengths=key_lengths, scale=scale
        )
    begin, count = placed.part("Lk")
    key_lengths = None if key_lengths is None else (key_lengths - begin).clamp(0, count)
    return vattn.token_importance(query, key, key_lengths=key_lengths, lse=lse, scale=scale)


def select_tokens(
    tokens: Tensor, importance: Tensor, keep: int, positions: Tensor | None, num_global: int
) -> tuple[Tensor, Tensor]:
    placed = Placed("select_tokens", {"tokens": (tokens, "B L C"), "importance": (importance, "B N")}, free="B C")
    placed.tokens()
    positions = placed.aside("positions", positions, "N" if positions is None or positions.dim() == 1 else "B N")
    kept_tokens, kept_positions = vattn.select_tokens(
        placed.local("tokens"), placed.local("importance"), keep, positions=positions, num_global=num_global
    )
    return (
        placed.result(kept_tokens, "B G+K C", others={"G+K": num_global + keep}),
        placed.result(kept_positions, "B K", others={"K": keep}),
    )


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    axes = " ".join(f"x{i}" for i in range(x.dim() - 1))
    placed = Placed("nearest_code", {"x": (x, f"{axes} C".strip())}, free=axes)
    placed.tokens()
    own = cast(Tensor, placed.aside("codebook", codebook, "K C"))
    return placed.result(vattn.nearest_code(placed.local("x"), own), axes)


def _part_of(layout: BlockLayout, samples: tuple[int, int], heads: tuple[int, int]) -> BlockLayout:
    """The rows of so many samples and heads, from the first ones on."""
    rows = layout.row_offsets.view(layout.num_samples, layout.num_heads, -1)
    for axis, (first, count) in enumerate((samples, heads)):
        if rows.shape[axis] > 1:  # a layout has the rows of a sample and a head, even where none is here
            rows = rows.narrow(axis, min(first, rows.shape[axis] - 1), max(count, 1))
    if rows.numel() == layout.row_offsets.numel():
        return layout
    columns, offsets, before = [], [], torch.zeros_like(rows[0, 0, 0])
    for of_sample in rows:
        begin, end = of_sample[0, 0], of_sample[-1, -1]
        columns.append(layout.columns[begin:end])
        offsets.append(of_sample - begin + before)
        before = before + end - begin
    return BlockLayout(
        layout.num_tokens, layout.block_size, torch.stack(offsets), torch.cat(columns), num_global=layout.num_global,
        order=layout.order, check_values=False,
    )  # fmt: skip


def _local_bias(placed: Placed, position_bias: RelativePositionBias3D | BiasTable | None) -> BiasTable | None:
    """The columns of a table of biases that belong to this rank's heads."""
    if position_bias is None:
        return None
    table, window = position_bias if isinstance(position_bias, tuple) else (
        position_bias(as_table=True), position_bias.window
    )  # fmt: skip
    return placed.aside("position_bias.table", table, "R H"), window  # type: ignore[return-value]


def _module(bias: BiasTable) -> RelativePositionBias3D:
    """A module that has this rank's columns of a table."""
    table, window = bias
    num_global = math.isqrt(table.shape[0] - num_offsets(window) + 1) - 1  # 2G + G*G = (G + 1)**2 - 1
    module = RelativePositionBias3D(window, 1, num_global)
    del module.table
    module.table, module.num_heads = table, table.shape[1]  # type: ignore[assignment]
    return module


def _share(placed: Placed, axis: str) -> float:
    """The share of an axis that this rank has: a mean over all of it is the sum of the ranks' means by their shares."""
    return placed.part(axis)[1] / max(placed.sizes[axis], 1)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        axial_attention, edge_sparse_attention, latent_attention, leap_attention, merge_attention, nearest_code,
        node_sparse_attention, periodic_shift, select_tokens, token_importance,
    )
}  # fmt: skip
