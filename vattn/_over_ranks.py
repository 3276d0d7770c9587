"""Modules that work over ranks, once :func:`vattn.distributed.parallelize` has given them some.

Only those that have ranks import :mod:`vattn.distributed`: it takes a second, and a PyTorch with `torch.distributed`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vattn.distributed._ranks import Ranks


class Held:
    """The ranks of a model. Copies of it are over the same ones; another process has others, and no such group."""

    def __init__(self, ranks: "Ranks") -> None:
        self.ranks = ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        must = "be over no ranks, since their group is of this process alone: save its state_dict(), or save_pretrained"
        raise TypeError(f"parallelize: a model that is pickled must {must}, got one over {self.ranks.size}")


class OverRanks:
    """A module with `ranks`: None is one process; otherwise it has its share of the tokens, and calls
    :mod:`vattn.distributed` for those of others.

    Gradients are "partial": the loss is the sum of the ranks' losses, and a parameter's gradient the sum of the ranks'.
    """

    _held: Held | None = None

    @property
    def ranks(self) -> "Ranks | None":
        return None if self._held is None else self._held.ranks

    def _refuse(self, ranks: "Ranks") -> None:
        """Raise ValueError for settings that cannot work over `ranks`."""

    def _sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.ranks is None or self.ranks.size == 1:
            return x
        from vattn.distributed._collectives import start_sum

        return start_sum(x, self.ranks, "partial").wait()

    @property
    def _compares(self) -> bool:
        """Whether the ranks compare their inputs: not in a compiled program, nor for simulated ranks."""
        if self.ranks is None or self.ranks.size == 1 or torch.compiler.is_compiling():
            return False
        from vattn.distributed._ranks import PaperRanks

        return not isinstance(self.ranks, PaperRanks)

    def _agree(self, op: str, check: Callable[[], Mapping[str, Any]]) -> None:
        """Check an input on every rank: an error on one rank is raised on all, and settings must agree."""
        if self._compares:
            from vattn.distributed._ranks import agree

            agree(op, self.ranks, lambda: (check(), ()), None)  # type: ignore[arg-type]
        else:
            check()
