"""Random numbers that a seed alone decides: on every device, in every version of PyTorch, in an exported program.

    a    = mix(mix(seed) + call)        one for each call
    bits = mix(mix(a + i) ^ a)          one for each number i of it, with the hash of dropout

A generator of PyTorch cannot be made inside a program that is compiled or exported, and there is one for each device.
"""

import math

import torch
from torch import Tensor

from vattn.models.draws import Draws, Randomness, draws_of
from vattn.reference.dropout import mix


class SeededDraws(Draws):
    """Draws that are the same again in every object that is made with this seed, an int from 0 to 2**32 - 1.

    Example:
        >>> SeededDraws(3).uniforms(2, device=torch.device("cpu"))
        tensor([0.3900, 0.5719])
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self._calls = seed, 0

    def exponential(self, *shape: int, device: torch.device) -> Tensor:
        return -self._inside(shape, device).log()

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        return torch.special.ndtri(self._inside(shape, device))

    def permutation(self, batch: int, length: int, device: torch.device) -> Tensor:
        return self.uniforms(batch, length, device=device).argsort(dim=1, stable=True)

    def uniforms(self, *shape: int, device: torch.device) -> Tensor:
        return self._bits(shape, device).float() / 2**24

    def uniform(self) -> float:
        return self.uniforms(1, device=torch.device("cpu")).item()

    def _inside(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform numbers between 0 and 1, which are not among them: float32."""
        return ((self._bits(shape, device) >> 1).float() + 0.5) / 2**23

    def _bits(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Uniform int64 below ``2**24``."""
        a = mix(mix(torch.full((), self.seed, device=device)) + self._calls)
        self._calls += 1
        index = torch.arange(math.prod(shape), device=device).view(shape)
        return mix(mix(a + index) ^ a) >> 8


def draws_in(training: bool, generator: Randomness, seed: int = 0) -> Draws:
    """The draws of `generator`; without one torch's own in training, and those of `seed` in evaluation."""
    return draws_of(generator) if training or generator is not None else SeededDraws(seed)
