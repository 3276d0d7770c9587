"""Processes of a gloo group that run cases once for a module of tests, which then look at what they found.

A case is a function of a :class:`World`. Every process runs all cases in one order, in groups of 1, 2, 3 and 4 of them.
"""

import contextlib
import datetime
import itertools
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

multiprocessing.set_forkserver_preload(["torch", "torch.distributed.tensor", "vattn.distributed"])  # imported once

Found = list[dict[str, Any]]
"""Of each process, what its cases gave, by "<case> <size of the group>"."""


class World:
    """A group of the first `size` processes, and this one's rank in it."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        self.rank, self.size, self.group = rank, size, group

    def shard(self, x: torch.Tensor, lengths: Sequence[int], dim: int) -> torch.Tensor:
        """This rank's part of `x` along `dim`, as a leaf of its own."""
        return x.split(list(lengths), dim)[self.rank].detach().requires_grad_(x.requires_grad)

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all ranks, along `dim`."""
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, x.detach(), self.group)
        return torch.cat(parts, dim)


class SentBytes(TorchDispatchMode):
    """Counts the bytes of what is handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Integers are those of a handshake.
        others = "wait_tensor" in func.name() or "wrap_tensor" in func.name()
        if func.namespace in ("_c10d_functional", "c10d") and not others:
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.total += sum(x.nbytes for x in tensors if x.dtype != torch.int64)
        return func(*args, **(kwargs or {}))


Case = Callable[[World], Any]


def lengths_of(total: int, size: int, seed: int) -> list[int]:
    """Shards of `total` tokens: some uneven, some empty."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(total + 1, (size - 1,), generator=generator).sort().values.tolist()
    return [b - a for a, b in itertools.pairwise([0, *cuts, total])]


def _run(rank: int, world: int, cases: Mapping[str, Case], sizes: Sequence[int], folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    groups = {size: dist.new_group(range(size), timeout=datetime.timedelta(seconds=timeout)) for size in sizes}
    found: dict[str, Any] = {}
    for size, (name, case) in itertools.product(sizes, cases.items()):
        if rank < size:
            try:
                found[f"{name} {size}"] = case(World(rank, size, groups[size]))
            except Exception:
                found[f"{name} {size}"] = traceback.format_exc()
                break  # the others would wait for this one
    torch.save(found, f"{folder}/{rank}.pt")
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


def run_cases(cases: Mapping[str, Case], folder: Path, sizes: Sequence[int] = (2, 3, 4), timeout: float = 120) -> Found:
    """What each of ``max(sizes)`` processes found. Cases are functions of modules: processes import those."""
    world = max(sizes)
    torch.multiprocessing.start_processes(
        _run, (world, dict(cases), list(sizes), str(folder), timeout), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def results(found: Found, name: str, size: int) -> Iterator[Any]:
    """What each rank of a group found; a traceback is an error of the test."""
    for rank in range(size):
        result = found[rank].get(f"{name} {size}", "did not run: an earlier case failed")
        assert not isinstance(result, str), f"rank {rank}: {result}"
        yield result
