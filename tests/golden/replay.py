"""Random numbers that the official code drew, used again in its order."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vattn.models.draws import Draws


class Replay(Draws):
    """Draws that were recorded: each is used once, and has the shape it was recorded with."""

    def __init__(
        self, exponentials: Sequence[Tensor] = (), permutations: Sequence[Tensor] = (), normals: Sequence[Tensor] = ()
    ) -> None:
        super().__init__()
        self.exponentials, self.permutations, self.normals = iter(exponentials), iter(permutations), iter(normals)

    def exponential(self, *shape: int, device: torch.device) -> Tensor:
        numbers = next(self.exponentials)
        assert numbers.shape == shape
        return numbers.float()

    def permutation(self, batch: int, length: int, device: torch.device) -> Tensor:
        numbers = torch.stack([next(self.permutations) for _ in range(batch)])
        assert numbers.shape == (batch, length)
        return numbers

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        numbers = next(self.normals)
        assert numbers.shape == shape
        return numbers

    def assert_used_up(self, path: str) -> None:
        left = [*self.exponentials, *self.permutations, *self.normals]
        assert not left, f"{path}: the official code drew more"


def recorded(golden: Any, name: str) -> list[Tensor]:
    """The arrays `name` 0, 1, 2, ... that the file has."""
    return [golden[f"{name}{i}"] for i in range(sum(end.isdigit() for end in golden.names(name)))]
