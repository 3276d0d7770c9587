"""The collectives as linear maps that are differentiated: their transposes are collectives, too.

    sent      y = f(x)            f: rows that move, or a sum over the ranks
    backward  dx = b(dy)          b: the transpose of f, or nothing, where gradients are those of all ranks already
    forward   y' = f(x')          mode

A map is started and waited for, and what a program does in between, it does meanwhile. In the backward the nodes come
in the reverse order: waiting has become starting, and the gradients of what was done meanwhile are computed meanwhile.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vattn.distributed._ranks import Ranks


class Exchange:
    """Rows along the first axis that move: `sent[r]` of them to rank r, `received[r]` from it, by rank."""

    def __init__(self, ranks: Ranks, sent: Sequence[int], received: Sequence[int]) -> None:
        self.ranks, self.sent, self.received = ranks, list(sent), list(received)

    @property
    def transpose(self) -> "Exchange":
        return Exchange(self.ranks, self.received, self.sent)

    def start(self, x: Tensor) -> Tensor:
        return self.ranks.start_exchange(x.contiguous(), self.sent, self.received)


class Sum:
    """The sum over all ranks, which all of them have."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def start(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return self.ranks.start_all_reduce(x.contiguous(), "sum")
        whole = self.ranks.start_all_reduce(x.float().contiguous(), "sum")
        return self.ranks.wait(whole).to(x.dtype)  # rounded once, not by every rank


Map = Exchange | Sum


class _Start(torch.autograd.Function):
    """Start `forward`, whose transpose is `backward`; None is the identity.

    What has been started has the shape of the result. Beside it stands a token of the shape of `x`, without memory: in
    the backward, where the transpose has been started, the two change places.
    """

    @staticmethod
    def forward(x: Tensor, forward: Map | None, backward: Map | None) -> tuple[Tensor, Tensor]:
        return x.view_as(x) if forward is None else forward.start(x), x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.map, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        token, started = grads
        return _wait(started, token, ctx.transpose, ctx.map), None, None


class _Wait(torch.autograd.Function):
    """Wait for what :class:`_Start` has started."""

    @staticmethod
    def forward(x: Tensor, token: Tensor, forward: Map | None, backward: Map | None) -> Tensor:
        return x.view_as(x) if forward is None else forward.ranks.wait(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.map, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        started, token = _start(grads[0], ctx.transpose, ctx.map)
        return token, started, None, None


class _StartWithTangent(_Start):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _start(tangents[0], ctx.map, ctx.transpose)


class _WaitWithTangent(_Wait):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _wait(tangents[0], tangents[1], ctx.map, ctx.transpose)


def _start(x: Tensor, forward: Map | None, backward: Map | None) -> tuple[Tensor, Tensor]:
    # Dynamo refuses a function with a jvp.
    return (_Start if torch.compiler.is_compiling() else _StartWithTangent).apply(x, forward, backward)


def _wait(x: Tensor, token: Tensor, forward: Map | None, backward: Map | None) -> Tensor:
    return (_Wait if torch.compiler.is_compiling() else _WaitWithTangent).apply(x, token, forward, backward)


class Pending:
    """A collective on its way: `wait` gives its result."""

    def __init__(self, x: Tensor, forward: Map, backward: Map | None) -> None:
        self._maps = forward, backward
        self._started = _start(x, *self._maps)

    def wait(self) -> Tensor:
        return _wait(*self._started, *self._maps)


def start_exchange(x: Tensor, ranks: Ranks, sent: Sequence[int], received: Sequence[int]) -> Pending:
    """Send rows ``x (sent[0] + sent[1] + ..., ...)`` to the ranks; what comes are as many as `received` says."""
    there = Exchange(ranks, sent, received)
    return Pending(x, there, there.transpose)


def start_sum(x: Tensor, ranks: Ranks, grad: str) -> Pending:
    """Sum the parts `x` of all ranks.

    The gradient of the sum comes whole on every rank ("full"), or a part of it on each ("partial").
    """
    return Pending(x, Sum(ranks), Sum(ranks) if grad == "partial" else None)


def enter(x: Tensor, ranks: Ranks, grad: str) -> Tensor:
    """`x`, the same on every rank, as an input of what each rank does for itself.

    Its gradient is the sum of those of the ranks ("full"), or each rank's own share of that ("partial").
    """
    if grad == "partial" or ranks.size == 1:
        return x
    return _wait(*_start(x, None, Sum(ranks)), None, Sum(ranks))


class _EnterRows(torch.autograd.Function):
    """:func:`enter` for the first rows of tensors, in one collective."""

    @staticmethod
    def forward(first: int, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.first, ctx.ranks, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        asked = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        packed = torch.cat([grads[i][:, :, : ctx.first] for i in asked], 2)
        whole = _wait(*_start(packed, Sum(ctx.ranks), None), Sum(ctx.ranks), None)
        found: list[Any] = [None] * len(grads)
        for i, rows in zip(asked, whole.split(ctx.first, 2), strict=True):
            found[i] = torch.cat([rows, grads[i][:, :, ctx.first :]], 2)
        return None, None, *found


class _EnterRowsWithTangent(_EnterRows):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple(None if x is None else x.view_as(x) for x in tangents[2:])


def enter_rows(tensors: Sequence[Tensor], first: int, ranks: Ranks, grad: str) -> Sequence[Tensor]:
    """Tensors ``(B, H, first + N, D)`` whose first rows are the same on every rank: those :func:`enter`."""
    if grad == "partial" or ranks.size == 1 or first == 0:
        return tensors
    if torch.compiler.is_compiling():
        return _EnterRows.apply(first, ranks, *(x.view_as(x) for x in tensors))  # Dynamo refuses one tensor twice
    return _EnterRowsWithTangent.apply(first, ranks, *tensors)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, nothing: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.nothing = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[0].new_zeros(ctx.nothing)


class _TieWithTangent(_Tie):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None if tangents[0] is None else tangents[0].view_as(tangents[0])


def tie(x: Tensor, nothing: Tensor) -> Tensor:
    """`x`, whose backward goes on to that of `nothing`, of no elements.

    A rank that received nothing may have sent something: it takes part in sending the gradients back.
    """
    return (_Tie if torch.compiler.is_compiling() else _TieWithTangent).apply(x, nothing)
