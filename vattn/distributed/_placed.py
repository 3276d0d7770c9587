"""How the tensors of a call lie on a mesh of devices, when they are DTensors.

Each axis of a tensor has a name, as in "B H Lq D"; axes with the same name are sharded the same way. A dimension of
the mesh shards one axis::

    mesh (data=2, context=2)      query "B H Lq D"  [Shard(0), Replicate()]
                                  key   "B H Lk D"  [Shard(0), Shard(2)]         axes: B, Lk

Tensors without that axis are replicated along that dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from vattn._library import empty_rows
from vattn.distributed._numbers import with_numbers
from vattn.distributed._ranks import Part, chunks, ranks_of

BATCH_AND_HEADS = ("B", "H")


class Placed:
    """Which axes of the tensors of a call each dimension of the mesh shards.

    Args:
        op: that is called.
        tensors: by their names, each with the names of its axes.
        free: the axes along which an operator does not mix what it reads.

    Attributes:
        axes: of each dimension of the mesh the axes that it shards: none, one, or those of several key tensors.
        sizes: of all axes, over all ranks.

    Raises:
        TypeError: one is no DTensor.
        ValueError: they lie on several meshes, are partial, or axes of the same name are sharded differently.
    """

    def __init__(self, op: str, tensors: Mapping[str, tuple[Any, str]], free: str = "B H") -> None:
        self.op, self.tensors, self.free = op, tensors, free.split()
        distributed = [name for name, (x, _) in tensors.items() if isinstance(x, DTensor)]
        if not distributed:
            name, (x, _) = next(iter(tensors.items()))
            raise TypeError(f"{op}: {name} must be a DTensor where others are, got {name}={type(x).__name__}")
        self.mesh: DeviceMesh = tensors[distributed[0]][0].device_mesh
        self.sizes: dict[str, int] = {}
        for name, (x, axes) in tensors.items():
            if not isinstance(x, DTensor):
                raise TypeError(
                    f"{op}: {name} must be a DTensor, as {distributed[0]} is, got {name}={type(x).__name__}"
                )
            self._check_placements(name, x)
            self.sizes.update(zip(axes.split(), x.shape, strict=True))
        self.axes = [self._axes_along(dim) for dim in range(self.mesh.ndim)]

    def _check_placements(self, name: str, x: DTensor) -> None:
        if x.device_mesh != self.mesh:
            raise ValueError(
                f"{self.op}: {name} must lie on the mesh {self.mesh}, got {name}.device_mesh={x.device_mesh}"
            )
        for placement in x.placements:
            # Other kinds of shards are not those of consecutive rows.
            if not (placement.is_replicate() or type(placement) is Shard):
                raise ValueError(
                    f"{self.op}: {name} must be sharded or replicated along every dimension of its mesh, "
                    f"got {name}.placements={x.placements}"
                )

    def _axes_along(self, dim: int) -> list[str]:
        sharded = {name: _axis(x.placements[dim], axes) for name, (x, axes) in self.tensors.items()}
        found = [axis for axis in dict.fromkeys(sharded.values()) if axis]
        for name, (x, axes) in self.tensors.items():
            wanted = [axis for axis in found if axis in axes.split()]
            if wanted and sharded[name] != wanted[0]:
                other = next(other for other, axis in sharded.items() if axis == wanted[0])
                raise ValueError(
                    f"{self.op}: {name} must be sharded as {other} is, {self.tensors[other][0].placements}, "
                    f"got {name}.placements={x.placements}"
                )
        return found

    def tokens(self, *allowed: str) -> int | None:
        """The dimension of the mesh that shards one of the axes `allowed`, or None where none does.

        Raises:
            ValueError: the mesh shards axes that are neither free nor these, or these along several dimensions.
        """
        dims = [
            dim for dim, axes in enumerate(self.axes) if self.mesh.size(dim) > 1 and not set(axes) <= set(self.free)
        ]
        for dim in dims:
            for axis in self.axes[dim]:
                if axis not in allowed:
                    name, x = self._sharded_by(axis)
                    raise ValueError(
                        f"{self.op}: {name} must be whole along its axis {axis.rstrip('0123456789')} on every rank, or "
                        f"be gathered by its owner (DTensor.redistribute), got {name}.placements={x.placements}"
                    )
        if len(dims) > 1:
            name, x = self._sharded_by(self.axes[dims[1]][0])
            raise ValueError(
                f"{self.op}: tokens must be sharded along one dimension of the mesh, "
                f"got {name}.placements={x.placements}"
            )
        return dims[0] if dims else None

    def _sharded_by(self, axis: str) -> tuple[str, DTensor]:
        return next((name, x) for name, (x, axes) in self.tensors.items() if axis in axes.split())

    def part(self, axis: str) -> tuple[int, int]:
        """Where this rank's part of an axis begins, and how long it is."""
        begin, length = 0, self.sizes[axis]
        for dim, axes in enumerate(self.axes):
            if axis in axes:
                lengths, rank = chunks(length, self.mesh.size(dim)), self.mesh.get_local_rank(dim)
                begin, length = begin + sum(lengths[:rank]), lengths[rank]
        return begin, length

    def lengths(self, dim: int, axis: str) -> list[int]:
        """The lengths of all parts of an axis of tokens, which the dimension `dim` shards."""
        return chunks(self.sizes[axis], self.mesh.size(dim))

    def local(self, name: str, whole_gradient: int | None = None) -> Tensor:
        """This rank's part of a tensor.

        Where it is replicated and others are sharded, its gradient is a part of the sum over these ranks; along the
        dimension `whole_gradient` it is whole.
        """
        x = self.tensors[name][0]
        return x.to_local(grad_placements=self._of_gradients(x.placements, whole_gradient))

    def _of_gradients(self, placements: Sequence[Placement], whole_gradient: int | None) -> list[Placement]:
        return [
            Partial() if placement.is_replicate() and axes and dim != whole_gradient else placement
            for dim, (placement, axes) in enumerate(zip(placements, self.axes, strict=True))
        ]

    def aside(self, name: str, x: Tensor | None, axes: str, whole_gradient: int | None = None) -> Tensor | None:
        """This rank's part of what comes beside the tensors of a call: plain tensors are the same on every rank.

        Raises:
            ValueError: a DTensor that is neither replicated nor sharded as the tensors are.
        """
        if x is None:
            return None
        replicated = [Replicate()] * self.mesh.ndim
        if not isinstance(x, DTensor):
            if not x.requires_grad:
                return self._sliced(x, axes)
            x = DTensor.from_local(x, self.mesh, replicated)  # whose gradient is whole on every rank
        self._check_placements(name, x)
        if not any(placement.is_shard() for placement in x.placements):
            return self._sliced(x.to_local(grad_placements=self._of_gradients(x.placements, whole_gradient)), axes)
        for placement, sharded in zip(x.placements, self.axes, strict=True):
            wanted = [axis for axis in sharded if axis in axes.split()]
            if _axis(placement, axes) != (wanted[0] if wanted else None):
                raise ValueError(
                    f"{self.op}: {name} must be replicated, or sharded as {next(iter(self.tensors))} is, "
                    f"got {name}.placements={x.placements}"
                )
        return x.to_local(grad_placements=self._of_gradients(x.placements, whole_gradient))

    def _sliced(self, x: Tensor, axes: str) -> Tensor:
        for i, axis in enumerate(axes.split()):
            if axis in BATCH_AND_HEADS and self._shards(axis):
                x = x.narrow(i, *self.part(axis))
        return x

    def _shards(self, axis: str) -> bool:
        return any(axis in axes for axes in self.axes)

    def seed(self, seed: Tensor | None) -> Tensor | None:
        """That of the first rank of the mesh, which all take: a broadcast of 8 bytes along each of its dimensions."""
        if seed is None:
            return None
        for dim in range(self.mesh.ndim):
            if self.mesh.size(dim) > 1:
                name = self.mesh.get_group(dim).group_name
                seed = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.broadcast(seed, 0, name))
        return seed

    def numbered(self, seed: Tensor | None, queries: int | range, keys: int) -> Tensor | None:
        """The common seed, for this part of the batch and of the heads.

        `queries` are so many tokens from the first one, or a range of them.
        """
        seed = self.seed(seed)
        if seed is None or not (isinstance(queries, range) or any(map(self._shards, BATCH_AND_HEADS))):
            return seed
        of_queries = queries if isinstance(queries, range) else range(queries)
        return with_numbers(self._of_batch_heads(seed), *self._batch_heads(), [of_queries], [range(keys)])

    def _batch_heads(self) -> tuple[int, int]:
        return self.part("B")[1], self.part("H")[1]

    def _of_batch_heads(self, seed: Tensor) -> Tensor:
        (sample, batch), (head, heads) = self.part("B"), self.part("H")
        return with_numbers(seed, batch, heads, [], [], first_sample=sample, first_head=head, all_heads=self.sizes["H"])  # type: ignore[return-value]

    def group(self, dim: int, seed: Tensor | None = None) -> Part:
        """The ranks along a dimension of the mesh, as the argument `group` of the functions over ranks."""
        seed = self.seed(seed)
        ranks = ranks_of(self.op, self.mesh.get_group(dim))
        return Part(ranks, None if seed is None else self._of_batch_heads(seed))

    def result(
        self, x: Tensor, axes: str, rows: bool = False, sums: bool = False, stride: tuple[int, ...] | None = None,
        others: Mapping[str, int] | None = None,
    ) -> DTensor:  # fmt: skip
        """The DTensor whose part on this rank is `x`.

        Args:
            x: with these `axes`, sharded as those of the tensors are.
            rows: whether it lies in memory as outputs do, heads next to channels.
            sums: along dimensions of the mesh that shard an axis that it lacks, it is a part of a sum; otherwise it is
                the same on all ranks.
            stride: of the whole, if it is not that of contiguous rows or tensors.
            others: sizes of axes that no tensor has.
        """
        names, sizes = axes.split(), self.sizes | dict(others or {})
        placements: list[Placement] = []
        for along in self.axes:
            own = [axis for axis in along if axis in names]
            placements.append(Shard(names.index(own[0])) if own else Partial() if along and sums else Replicate())
        shape = torch.Size(sizes[axis] for axis in names)
        if stride is None:
            whole = torch.empty(shape, dtype=x.dtype, device="meta")
            stride = (empty_rows(whole) if rows else whole).stride()
        return DTensor.from_local(x, self.mesh, placements, shape=shape, stride=stride)


def _axis(placement: Placement, axes: str) -> str | None:
    """The axis of a tensor that `placement` shards."""
    return axes.split()[placement.dim] if isinstance(placement, Shard) else None
