"""How ``torch.vmap`` maps an operator: the mapped axis becomes part of the axis of samples.

Samples of a call are independent of each other, so that those of ``vmap`` may be more of them. Not so where they
differ in what samples of a call share, such as a layout or a table of biases; where a result is summed over samples, as
the gradient of such a table is; and with dropout, which numbers the samples. Then they are computed one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OF_SAMPLES = {"positions": 2, "row_offsets": 3, "column_offsets": 3}
"""Arguments that all samples share unless they have so many axes, of which the first then is that of samples."""


def vmap_rule(op: Any, call: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """`call`, which runs operator `op`, mapped: its results and their mapped axes, as ``torch.library`` has it."""
    found = dict(zip(op.arguments, zip(args, in_dims, strict=True), strict=True))
    shared = {name for name in op.shared if name in found}
    shared |= {name for name, axes in OF_SAMPLES.items() if name in found and _rank(*found[name]) != axes}
    sums = [name for name in op.results if name in op.shared and found[name.removeprefix("grad_")][0] is not None]
    dropout = found.get("seed", (None, None))[0] is not None
    if info.batch_size == 0 or sums or dropout or any(_is_mapped(found[name][1]) for name in shared):
        return _one_by_one(call, info.batch_size, in_dims, args)

    def fold(x: Any, dim: Any) -> Any:
        if isinstance(x, Tensor):
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x if op.any_axes else x.flatten(0, 1)
        return [fold(*each) for each in zip(x, dim, strict=True)] if _holds_tensors(x) else x

    def unfold(name: str, x: Any) -> Any:
        if isinstance(x, Tensor):
            whole = op.any_axes or name in op.shared
            return x if whole else x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size))
        return [unfold(name, y) for y in x]

    results = call(*(x if name in shared else fold(x, dim) for name, (x, dim) in found.items()))
    if isinstance(results, Tensor):
        return unfold(next(iter(op.results)), results), 0
    named = list(zip(op.results, results, strict=True))
    dims = tuple(_everywhere(x, None if name in op.shared else 0) for name, x in named)
    return tuple(unfold(name, x) for name, x in named), dims


def _one_by_one(call: Callable[..., Any], count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    def pick(x: Any, dim: Any, i: int | None) -> Any:
        if _holds_tensors(x):
            return [pick(*each, i) for each in zip(x, dim, strict=True)]
        if dim is None or not isinstance(x, Tensor):
            return x
        return x.new_zeros(x.movedim(dim, 0).shape[1:]) if i is None else x.select(dim, i)

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors))[:count]

    # Of nothing, the results of one sample of zeros say what they would be.
    samples = range(count) if count > 0 else [None]
    found = [call(*(pick(x, dim, i) for x, dim in zip(args, in_dims, strict=True))) for i in samples]
    if isinstance(found[0], Tensor):
        return stack(found), 0
    stacked = tuple(
        stack(each) if isinstance(each[0], Tensor) else [stack(x) for x in zip(*each, strict=True)]
        for each in zip(*found, strict=True)
    )
    return stacked, tuple(_everywhere(x, 0) for x in stacked)


def _rank(x: Any, dim: Any) -> int | None:
    """The axes of a tensor but for the one that is mapped."""
    return x.dim() - (dim is not None) if isinstance(x, Tensor) else None


def _is_mapped(dim: Any) -> bool:
    return any(map(_is_mapped, dim)) if isinstance(dim, (list, tuple)) else dim is not None


def _holds_tensors(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x)


def _everywhere(x: Any, dim: int | None) -> Any:
    return dim if isinstance(x, Tensor) else [dim] * len(x)
