"""A call on one device, and on the ranks that have its inputs in parts along one axis: are they the same?"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Call:
    """`whole(*inputs, *positional, **settings)`, and `part` of a group on shards of the inputs."""

    def __init__(
        self, whole: Callable[..., Any], part: Callable[..., Any], shape: Sequence[int], dim: int,
        lengths: Sequence[int], positional: Sequence[Any] = (), *, inputs: int = 3, dtype: torch.dtype = torch.float64,
        told: bool = False, seed: int = 0, only_of_ranks: dict[str, Any] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self._whole, self._part, self.dim, self.lengths = whole, part, dim, list(lengths)
        self.positional, self.settings, self.told, self.seed = positional, settings, told, seed
        self.only_of_ranks = only_of_ranks or {}
        self._generator = torch.Generator().manual_seed(seed)
        # Heads beside channels, as they come from a linear layer.
        self.inputs = [self.draw(shape, dtype).movedim(-2, 1).requires_grad_() for _ in range(inputs)]
        self.bound = BOUNDS[dtype]

    def draw(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Random numbers; `shape` is of (B, H, ..., D), and the result lies as (B, ..., H, D)."""
        B, H, *tokens, D = shape
        return torch.randn(B, *tokens, H, D, dtype=dtype, generator=self._generator)

    def on_rank(self, x: Tensor, rank: int) -> Tensor:
        """The part of `x` that a rank has."""
        return x.split(self.lengths, self.dim)[rank]

    def of_one(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._seed(0)
        return _as_tuple(self._whole(*inputs, *self.positional, **self.settings))

    def of_rank(self, rank: int, group: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        self._seed(rank)  # that of rank 0 counts
        told = {"lengths": self.lengths} if self.told else {}
        settings = self.settings | self.only_of_ranks | told
        return _as_tuple(self._part(*parts, *self.positional, group=group, **settings))

    def _seed(self, rank: int) -> None:
        if self.settings.get("dropout_p"):
            torch.manual_seed(self.seed + rank)

    def parts(self, rank: int) -> list[Tensor]:
        return [self.on_rank(x.detach(), rank).requires_grad_() for x in self.inputs]

    def errors(self, rank: int, group: Any) -> dict[str, float]:
        """How far results and gradients of a rank are from those of one device."""
        expected = self.of_one(*self.inputs)
        self._generator.manual_seed(1)  # of each rank, the same
        weights = [torch.randn(x.shape, dtype=x.dtype, generator=self._generator) for x in expected]
        loss = sum((x * weight).sum() for x, weight in zip(expected, weights, strict=True))
        grads = torch.autograd.grad(loss, self.inputs)  # type: ignore[arg-type]
        mine = self.parts(rank)
        found = self.of_rank(rank, group, *mine)
        of_rank = [self.on_rank(weight, rank) for weight in weights]
        loss = sum((x * weight).sum() for x, weight in zip(found, of_rank, strict=True))
        own_grads = torch.autograd.grad(loss, mine)  # type: ignore[arg-type]
        pairs = [*zip(found, expected, strict=True), *zip(own_grads, grads, strict=True)]
        names = [*("out", "lse")[: len(found)], *(f"gradient {i}" for i in range(len(mine)))]
        errors = {name: error(a, self.on_rank(b, rank)) for name, (a, b) in zip(names, pairs, strict=True)}
        return errors | {"layout": 0.0 if found[0].movedim(1, -2).is_contiguous() else torch.inf}

    def tangent_errors(self, rank: int, group: Any) -> float:
        """The same of tangents, by torch.func.jvp."""
        primals = [x.detach() for x in self.inputs]
        self._generator.manual_seed(1)  # of each rank, the same
        tangents = [torch.randn(x.shape, dtype=x.dtype, generator=self._generator) for x in primals]
        expected = torch.func.jvp(self.of_one, tuple(primals), tuple(tangents))[1]
        mine, mine_tangents = (tuple(self.on_rank(x, rank) for x in some) for some in (primals, tangents))
        found = torch.func.jvp(lambda *x: self.of_rank(rank, group, *x), mine, mine_tangents)[1]
        return max(error(a, self.on_rank(b, rank)) for a, b in zip(found, expected, strict=True))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of tensors of one shape and dtype."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return (found - expected).abs().max().item() if expected.numel() else 0.0


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)
