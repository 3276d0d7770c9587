"""The ranks of a group, and the handshake in which they compare a call before they make it.

local checks     an error on one rank is an error on all of them: none waits for a call that will not come
handshake        one all_gather of integers: what is called, with which settings, on how many tokens of each rank; where
                 `lengths` are known there is none in compiled code and on GPUs
collectives      of torch's functional ones, which compile, and are asynchronous until they are waited for
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.distributed.distributed_c10d import _resolve_process_group

from vattn import _checks
from vattn.reference.dropout import random_seed

MOST_LENGTHS = 8
"""Numbers of tokens that one handshake tells."""


def process_group(op: str, group: Any) -> dist.ProcessGroup:
    """The process group that `group` means: itself, that of a one-dimensional mesh, or for None the default one.

    Raises:
        TypeError: it is none of these.
        ValueError: the mesh has more dimensions, or this process is not in the group.
        RuntimeError: there is no default group.
    """
    known = None, dist.GroupMember.NON_GROUP_MEMBER
    if group not in known and not isinstance(group, (dist.device_mesh.DeviceMesh, dist.ProcessGroup)):
        raise TypeError(f"{op}: group must be a ProcessGroup, a DeviceMesh or None, got group={group!r}")
    if not dist.is_initialized():
        got = None if group is None else type(group).__name__  # a mesh has no repr then
        raise RuntimeError(f"{op}: torch.distributed must be initialized (init_process_group), got group={got}")
    if group is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if isinstance(group, dist.device_mesh.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{op}: group must be one-dimensional, got group.ndim={group.ndim}")
        return group.get_group()
    # What `new_group` gives a process that it leaves out, and a group of others.
    left_out = group is dist.GroupMember.NON_GROUP_MEMBER
    if left_out or (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0):
        raise ValueError(f"{op}: this process must be in group, got rank={dist.get_rank()}, which is not")
    return group


class Ranks:
    """The ranks of a process group: who this is, how many there are, and what they send each other."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.name = group.group_name  # and not the group, of which a trace shows a stand-in only
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def group(self) -> dist.ProcessGroup:
        return _resolve_process_group(self.name)

    def shares(self, total: int) -> list[int]:
        """How many of `total` things each rank has, as equal as can be: those of a rank lie together, in order."""
        return [(rank + 1) * total // self.size - rank * total // self.size for rank in range(self.size)]

    def share(self, total: int) -> range:
        """Which of `total` things this rank has."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def gather_shares(self, x: Tensor, total: int) -> Tensor:
        """Of each rank's share of the columns ``x (B, n)``, those of all ranks, ``(B, total)``; without gradients."""
        shares = self.shares(total)
        rows = x.new_zeros(max(shares), x.shape[0])
        rows[: x.shape[1]] = x.T
        everyone = self.wait(self.start_all_gather(rows)).split(max(shares))
        return torch.cat([part[:n] for part, n in zip(everyone, shares, strict=True)]).T.contiguous()

    def start_exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return torch.ops._c10d_functional.all_to_all_single(x, received, sent, self.name)

    def start_all_reduce(self, x: Tensor, how: str) -> Tensor:
        return torch.ops._c10d_functional.all_reduce(x, how, self.name)

    def start_all_gather(self, x: Tensor) -> Tensor:
        """``(size * x.shape[0], ...)``: `x` has one shape on all ranks."""
        return torch.ops._c10d_functional.all_gather_into_tensor(x, self.size, self.name)

    def wait(self, x: Tensor) -> Tensor:
        return torch.ops._c10d_functional.wait_tensor(x)

    @functools.cached_property
    def on_cpu(self) -> bool:
        """Whether the group sends what lies on a CPU."""
        return "cpu" in {device.type for device in self.group._device_types}

    def all_gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Those of every rank; all have as many."""
        device = "cpu" if self.on_cpu else torch.accelerator.current_accelerator()
        told = torch.tensor([numbers], dtype=torch.int64, device=device)
        return self.wait(self.start_all_gather(told)).tolist()

    def all_gather_objects(self, x: Any) -> list[Any]:
        """Objects of all ranks: slow, for error messages."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, x, self.group)
        return everyone


class PaperRanks(Ranks):
    """One rank of a simulated group: nothing is sent, and what would be sent is recorded.

    Attributes:
        calls: of each collective, its name and the bytes that this rank hands to it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.calls: list[tuple[str, int]] = []

    @property
    def sent(self) -> int:
        return sum(handed for _, handed in self.calls)

    def start_exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        self.calls.append(("all_to_all", x.nbytes))
        return x.new_empty(sum(received), *x.shape[1:])

    def start_all_reduce(self, x: Tensor, how: str) -> Tensor:
        self.calls.append(("all_reduce", x.nbytes))
        return torch.empty_like(x)

    def start_all_gather(self, x: Tensor) -> Tensor:
        self.calls.append(("all_gather", x.nbytes))
        return x.new_empty(self.size * x.shape[0], *x.shape[1:])

    def wait(self, x: Tensor) -> Tensor:
        return x


def chunks(size: int, count: int) -> list[int]:
    """The lengths of the `count` parts that `torch.chunk` and DTensor cut `size` into; the last ones may be empty."""
    most = -(-size // count)
    return [min(max(size - i * most, 0), most) for i in range(count)]


@dataclasses.dataclass
class Part:
    """The ranks over which the tokens of a part of a batch, or of its heads, are sharded: an argument `group`.

    Attributes:
        seed: of dropout, the same on all ranks of all parts, with the numbers of this part's batch-heads behind it.
    """

    ranks: Ranks
    seed: Tensor | None = None


_known: dict[str, Ranks] = {}


def ranks_of(op: str, group: Any) -> Ranks:
    """The ranks that the argument `group` of `op` means."""
    if isinstance(group, Part):
        return group.ranks
    return group if isinstance(group, Ranks) else _known[_name_of(op, group)]


@torch.compiler.assume_constant_result
def _name_of(op: str, group: Any) -> str:
    """The name under which `group` is known. What is constant in a trace must be found again where it is guarded."""
    ranks = Ranks(process_group(op, group))
    _known[ranks.name] = ranks
    return ranks.name


def dropout_seed(group: Any, query: object, dropout_p: object) -> Tensor | None:
    """The seed of this rank's dropout: that of `group` if it has one, or one that is drawn."""
    if isinstance(group, Part):
        return group.seed
    return random_seed(query.device) if isinstance(query, Tensor) and dropout_p else None


@dataclasses.dataclass
class Agreed:
    """What the ranks have agreed on: the lengths of all shards, of each tensor that is sharded; and the seed."""

    lengths: list[list[int]]
    seed: Tensor | None = None

    def begins(self, rank: int, tensor: int = 0) -> int:
        """The first token of a rank, of those of all ranks."""
        return sum(self.lengths[tensor][:rank])


def agree(
    op: str,
    ranks: Ranks,
    check: Callable[[], tuple[Mapping[str, Any], Sequence[int]]],
    lengths: Sequence[Sequence[int]] | None,
    seed: Tensor | None = None,
) -> Agreed:
    """Check a call on every rank, and that all ranks make the same one.

    Args:
        check: raises for what is wrong here; gives the settings that must be the same on every rank, and how many
            tokens this rank has of each tensor that is sharded.
        lengths: of the shards of each such tensor, in the order of ranks, where known: then nothing is asked in
            compiled code and on GPUs, unless there is a seed, nor is a mismatch noticed there. With
            TORCH_DISTRIBUTED_DEBUG set to INFO or DETAIL, eager calls on GPUs are compared all the same.
        seed: of this rank's dropout; that of rank 0 counts. With numbers behind it, all ranks have the same.

    Raises:
        Exception: what `check` raises here.
        RuntimeError: another rank had an error.
        ValueError: another rank has another op, setting, dtype or shape, or `lengths` are not those of the shards.
    """
    _refuse_vmap(op, ranks)
    settled = seed is None or ranks.size == 1 or seed.numel() > 1 or isinstance(ranks, PaperRanks)
    if lengths is not None and settled and not _compares_always(ranks):
        _, own = check()
        return Agreed(_checked(op, ranks, lengths, own), seed)
    if ranks.size == 1:
        _, own = check()
        return Agreed([[n] for n in own], seed)
    if isinstance(ranks, PaperRanks):
        raise ValueError(f"{op}: lengths must be given on paper, got lengths=None")
    return _handshake(op, ranks, check, lengths, seed)


def _refuse_vmap(op: str, ranks: Ranks) -> None:
    """Of several samples, a collective would be stacked while it is on its way."""
    if torch.compiler.is_compiling() or ranks.size == 1 or torch._C._functorch.maybe_current_level() is None:
        return
    if any(each.key() == TransformType.Vmap for each in retrieve_all_functorch_interpreters()):
        raise NotImplementedError(f"{op}: samples must lie along the batch over several ranks, got torch.func.vmap")


def _compares_always(ranks: Ranks) -> bool:
    """Whether ranks compare their calls although lengths are given: where it costs little, or is asked for.

    On a CPU a tenth of a millisecond is little for an error by name, where gloo would end a process that gets more than
    it expects.
    """
    if torch.compiler.is_compiling() or ranks.size == 1 or isinstance(ranks, PaperRanks):
        return False
    return ranks.on_cpu or dist.get_debug_level() != dist.DebugLevel.OFF


def _checked(op: str, ranks: Ranks, lengths: Sequence[Sequence[int]], own: Sequence[int]) -> list[list[int]]:
    if len(lengths) != len(own):
        raise ValueError(f"{op}: lengths must be those of {len(own)} sharded tensors, got lengths={lengths}")
    for of_ranks, here in zip(lengths, own, strict=True):
        if isinstance(of_ranks, str) or not isinstance(of_ranks, Sequence):
            raise TypeError(f"{op}: lengths must be a list of an int for each rank, got lengths={of_ranks!r}")
        for length in of_ranks:
            _checks.integer(op, "lengths", length, least=0)
        if len(of_ranks) != ranks.size:
            raise ValueError(f"{op}: lengths must be one for each of {ranks.size} ranks, got lengths={list(of_ranks)}")
        if of_ranks[ranks.rank] != here:
            raise ValueError(
                f"{op}: lengths must be those of the shards, got lengths[{ranks.rank}]={of_ranks[ranks.rank]}, "
                f"where this rank has {here}"
            )
    return [list(of_ranks) for of_ranks in lengths]


@torch.compiler.disable
def _handshake(
    op: str, ranks: Ranks, check: Callable[[], tuple[Mapping[str, Any], Sequence[int]]],
    lengths: Sequence[Sequence[int]] | None, seed: Tensor | None,
) -> Agreed:  # fmt: skip
    error: Exception | None = None
    settings: Mapping[str, Any] = {}
    own: Sequence[int] = ()
    try:
        settings, own = check()
        if lengths is not None:
            settings = {**settings, "lengths": _checked(op, ranks, lengths, own)}
    except Exception as caught:
        error = caught
    described = {"the operator": op, **{name: str(value) for name, value in settings.items()}}
    whole = [*own, *[-1] * (MOST_LENGTHS - len(own))]
    told = [error is not None, _crc(described), 0 if seed is None else int(seed[0]), *whole]
    everyone = ranks.all_gather_numbers([int(number) for number in told])
    if any(one[0] or one[1] != everyone[0][1] for one in everyone):
        _raise(op, ranks, error, described)
    columns = list(zip(*(one[3:] for one in everyone), strict=True))
    if seed is not None:
        seed = torch.cat([torch.full_like(seed[:1], everyone[0][2]), seed[1:]])
    return Agreed([list(column) for column in columns[: len(own)]], seed)


def _raise(op: str, ranks: Ranks, error: Exception | None, described: Mapping[str, str]) -> None:
    """Raise on every rank what is wrong on any."""
    everyone = ranks.all_gather_objects((None if error is None else f"{type(error).__name__}: {error}", described))
    if error is not None:
        raise error
    for rank, (failed, _) in enumerate(everyone):
        if failed is not None:
            raise RuntimeError(f"{op}: the call must be right on every rank, got on rank {rank} {failed}")
    names = dict.fromkeys(name for _, one in everyone for name in one)
    for name in names:
        values = [one.get(name, "nothing") for _, one in everyone]
        if len(set(values)) > 1:
            told = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ValueError(f"{op}: {name} must be the same on every rank, got {told}")
    raise ValueError(f"{op}: the ranks must make the same calls in the same order, got others")


def _crc(described: Mapping[str, str]) -> int:
    return zlib.crc32(repr(sorted(described.items())).encode())
