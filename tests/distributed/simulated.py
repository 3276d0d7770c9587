"""Ranks that are threads of one process: many cases in little time. The processes of a real group are the proof."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn.distributed._ranks import Ranks

TIMEOUT = 60.0


class _Board:
    """What the ranks show each other; a rank that fails frees those that wait for it.

    One rank runs at a time, until it has something to show: they share torch's generator.
    """

    def __init__(self, size: int) -> None:
        self.shown: list[Any] = [None] * size
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)


class SimulatedRanks(Ranks):
    """One of `size` threads. Ranks that do not make the same call are told so."""

    on_cpu = True

    def __init__(self, rank: int, size: int, board: _Board) -> None:
        self.rank, self.size, self._board, self.sent = rank, size, board, 0

    def _show(self, what: str, x: Any) -> list[Any]:
        self._board.shown[self.rank] = (what, x)
        self._board.turn.release()
        try:
            self._board.barrier.wait()
            everyone = list(self._board.shown)
            with contextlib.suppress(threading.BrokenBarrierError):  # another rank fails of what it has seen
                self._board.barrier.wait()
        finally:
            self._board.turn.acquire()
        assert {name for name, _ in everyone} == {what}, everyone
        return [x for _, x in everyone]

    def start_exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        self.sent += x.nbytes
        parts = [each.split(list(splits))[self.rank] for each, splits in self._show("exchange", (x.detach(), sent))]
        assert [len(part) for part in parts] == list(received)
        return torch.cat(parts)

    def start_all_reduce(self, x: Tensor, how: str) -> Tensor:
        self.sent += x.nbytes
        parts = torch.stack(self._show(f"all_reduce {how} {tuple(x.shape)}", x.detach()))
        return parts.sum(0) if how == "sum" else parts.amax(0)

    def start_all_gather(self, x: Tensor) -> Tensor:
        self.sent += x.nbytes
        return torch.cat(self._show(f"all_gather {tuple(x.shape)}", x.detach()))

    def wait(self, x: Tensor) -> Tensor:
        return x

    def add_up(self, x: Tensor) -> Tensor:
        return self.start_all_reduce(x, "sum")

    def all_gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(one) for one in self._show("numbers", numbers)]

    def all_gather_objects(self, x: Any) -> list[Any]:
        return self._show("objects", x)


def run_ranks(size: int, what: Callable[[SimulatedRanks], Any]) -> list[Any]:
    """What each of `size` ranks gives; the first error of one is raised."""
    board = _Board(size)
    results: list[Any] = [None] * size
    errors: list[Exception | None] = [None] * size

    def one(rank: int) -> None:
        with board.turn:
            try:
                results[rank] = what(SimulatedRanks(rank, size, board))
            except Exception as error:
                errors[rank] = error
                board.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [error for error in errors if error is not None]
    for error in sorted(found, key=lambda error: isinstance(error, RuntimeError)):  # of which others are the cause
        raise error
    return results
