"""Random numbers of samplers and training steps, from one generator each."""

import types

import torch
from torch import Tensor

from vattn.models.recomputation import in_backward


class Draws:
    """Random numbers that all come from one generator, so that a seed reproduces what is made of them.

    They are drawn on the device of the generator, in float32, whatever PyTorch's defaults are, and a seed on the CPU
    makes the same draws for every device. A subclass can replay numbers that somebody recorded.

    Args:
        generator: None is PyTorch's own, on the CPU.

    Raises:
        TypeError: `generator` is no generator.
        RuntimeError: numbers of a generator are asked for in a backward pass, by a forward that activation
            checkpointing runs again, which would not draw those of the first run. PyTorch's own can be.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if not isinstance(generator, (torch.Generator, types.NoneType)):
            raise TypeError(f"Draws: generator must be a torch.Generator, Draws or None, got generator={generator!r}")
        self.generator = generator
        self._device = torch.device("cpu") if generator is None else generator.device

    def _source(self) -> torch.Generator | None:
        """The generator. A forward that activation checkpointing runs again must find the numbers of its first run."""
        if self.generator is not None and in_backward():
            raise RuntimeError(
                "Draws: generator must be None inside of a backward pass, where activation checkpointing runs a "
                "forward again: only PyTorch's own draws the same numbers again, got a generator"
            )
        return self.generator

    def exponential(self, *shape: int, device: torch.device) -> Tensor:
        """Numbers of the exponential distribution, whose mean is 1: float32, above 0."""
        numbers = torch.empty(shape, dtype=torch.float32, device=self._device).exponential_(generator=self._source())
        return numbers.clamp(min=torch.finfo(torch.float32).tiny).to(device)

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        """Numbers of the normal distribution, with mean 0 and variance 1: float32."""
        return torch.randn(shape, generator=self._source(), dtype=torch.float32, device=self._device).to(device)

    def permutation(self, batch: int, length: int, device: torch.device) -> Tensor:
        """A permutation of ``range(length)`` for each sample, ``(batch, length)``."""
        rows = [torch.randperm(length, generator=self._source(), device=self._device) for _ in range(batch)]
        numbers = torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int64, device=self._device)
        return numbers.to(device)

    def uniforms(self, *shape: int, device: torch.device) -> Tensor:
        """Numbers from 0 up to, but not including, 1: float32."""
        numbers = torch.empty(shape, dtype=torch.float32, device=self._device)  # unlike rand, of any symbolic size
        return numbers.uniform_(generator=self._source()).to(device)

    def uniform(self) -> float:
        """A number from 0 up to, but not including, 1."""
        return float(self.uniforms(device=self._device))


class DrawsOfRows(Draws):
    """The draws of a rank: those of some `rows` of the `total` that each sample has."""

    def __init__(self, draws: Draws, rows: range, total: int) -> None:
        super().__init__(draws.generator)
        self.draws, self.rows, self.total = draws, rows, total

    def exponential(self, *shape: int, device: torch.device) -> Tensor:
        """For ``(B, rows, ...)`` the numbers of ``(B, total, ...)``, which lie on the device of the generator alone."""
        numbers = self.draws.exponential(shape[0], self.total, *shape[2:], device=self.draws._device)
        return numbers[:, self.rows.start : self.rows.stop].to(device)


Randomness = torch.Generator | Draws | None
"""What samplers take as their `generator`."""


def draws_of(generator: Randomness) -> Draws:
    """The draws of a generator, or `generator` itself if it is draws already."""
    return generator if isinstance(generator, Draws) else Draws(generator)
