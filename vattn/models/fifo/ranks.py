"""The windows of a step over the ranks of a group: each predicts its own, and all get all predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OP = "FIFO"
AGREED = (
    "the number of the frame that leaves",
    "the queue (what it was started with, or a generator)",
    "the noise of a step (or a generator)",
    "conditions",
    "unconditional",
)
"""What a step compares over the ranks before it goes on."""


class Ranks:
    """The ranks of `group`: a process group, a one-dimensional device mesh, or None for this process alone."""

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is None:
            return
        from vattn.distributed._ranks import process_group

        self.group = process_group(OP, group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def own(self, count: int) -> Sequence[int]:
        """Which of `count` windows this rank predicts."""
        return range(self.rank, count, self.size)

    def bytes_sent(self, shapes: Sequence[torch.Size], element_size: int) -> int:
        """What each rank hands to collectives in a step whose windows write predictions of these shapes."""
        if self.size == 1:
            return 0
        return 8 * (1 + len(AGREED)) + self._rounds(shapes) * max(shape.numel() for shape in shapes) * element_size

    def share(self, own: Mapping[int, Tensor], shapes: Sequence[torch.Size], like: Tensor) -> list[Tensor]:
        """All predictions, of which this rank has its own; each rank sends as much as every other one."""
        if self.size == 1:
            return [own[i] for i in range(len(shapes))]
        most = max(shape.numel() for shape in shapes)
        sent = like.new_zeros(self._rounds(shapes), most)
        for i, prediction in own.items():
            sent[i // self.size, : prediction.numel()] = prediction.flatten()
        got = self._gather(sent)
        return [
            got[i % self.size][i // self.size, : shape.numel()].view(shape).to(like.device)
            for i, shape in enumerate(shapes)
        ]

    def agree(self, error: Exception | None, *values: object) -> None:
        """All ranks have the same values, those that `AGREED` names, and none had an error.

        Raises:
            Exception: `error`, where there is one.
            RuntimeError: another rank had one.
            ValueError: a value is another one on another rank.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        from vattn.distributed._checks import fingerprint

        told = [int(error is not None), *map(fingerprint, values)]
        got = torch.stack(self._gather(torch.tensor(told)))
        if got[:, 0].any():
            self._raise(error)
        self._require_same({name: column.tolist() for name, column in zip(AGREED, got[:, 1:].unbind(1), strict=True)})

    def agree_on_settings(self, settings: Mapping[str, Any]) -> None:
        """All ranks have the same `settings`.

        Raises:
            ValueError: they have not.
        """
        if self.size > 1:
            everyone: list[Any] = [None] * self.size
            dist.all_gather_object(everyone, {name: str(value) for name, value in settings.items()}, self.group)
            self._require_same({name: [one.get(name) for one in everyone] for name in settings})

    def _rounds(self, shapes: Sequence[torch.Size]) -> int:
        """How many windows each rank has, or has room for."""
        return -(-len(shapes) // self.size)

    def _raise(self, error: Exception | None) -> None:
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, None if error is None else repr(error), self.group)
        if error is not None:
            raise error
        which = next(rank for rank, text in enumerate(errors) if text is not None)
        raise RuntimeError(f"{OP}: a step must succeed on every rank, got {errors[which]} on rank {which}")

    def _require_same(self, values: Mapping[str, Sequence[Any]]) -> None:
        for name, of_ranks in values.items():
            if any(value != of_ranks[0] for value in of_ranks):
                raise ValueError(f"{OP}: {name} must be the same on every rank, got {_short(of_ranks)}")

    def _gather(self, sent: Tensor) -> list[Tensor]:
        sent = sent.to("cpu" if dist.get_backend(self.group) == "gloo" else torch.accelerator.current_accelerator())
        got = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(got, sent, self.group)
        return got


def _short(values: Sequence[Any]) -> str:
    """What each rank has, without the middle of long texts."""
    texts = [str(value) for value in values]
    return ", ".join(f"rank {i}: {x if len(x) < 80 else x[:38] + '...' + x[-38:]}" for i, x in enumerate(texts))
