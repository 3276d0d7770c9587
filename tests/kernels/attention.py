"""What the attention operators under test have in common: random inputs, budgets, and how dropout shows."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cases import Case, Draw, Operator, Sizes, Tensors, grouped
from tests.utils import magnitude
from vattn import reference

SEED = 0x123456789ABCDEF
HEAD_DIMS = (1, 2, 7, 8, 16, 24, 31, 33, 64, 72, 129, 256)


class Attention(Operator):
    """Any of them: how it is made from the shapes of its tensors, of which the first is that of out."""

    results: ClassVar[tuple[str, ...]] = ("out", "lse")
    settings: ClassVar[tuple[str, ...]] = ("dropout_p", "seed", "scale")
    scored: ClassVar[tuple[str, ...]] = ("query", "key")  # scores grow with them

    def random(
        self, device: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], dropout_p: float = 0.0,
        seed: int = SEED, scale: float | None = None, **settings: Any,
    ) -> Case:  # fmt: skip
        tensors = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
        out = next(iter(tensors.values()))
        grads = {"out": torch.randn_like(out), "lse": torch.randn(out.shape[:-1], device=device)}
        settings |= {
            "dropout_p": dropout_p,
            "seed": torch.tensor([seed], device=device) if dropout_p > 0 else None,
            "scale": out.shape[-1] ** -0.5 if scale is None else scale,
        }
        return Case(self, tensors, grads, settings)

    def draw(self, draw: Draw) -> Sizes:
        """What all have: samples and heads, dropout and scale."""
        return {
            "B": draw(st.integers(0, 3), label="B"),
            "H": draw(st.integers(1, 3), label="H"),
            "D": draw(st.sampled_from(HEAD_DIMS), label="D"),
            "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3]), label="dropout_p"),
            "scale": draw(st.sampled_from([None, None, 0.0, -0.2]), label="scale"),
        }

    def reference(self, tensors: Tensors, settings: Sizes, functions: Any = reference) -> Tensors:
        function = getattr(functions, self.name)
        found = function(*grouped(tensors), **settings, return_lse=True)
        return dict(zip(self.results, found, strict=True))

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        # The backward finds weights again as exp(s - lse), which the rounding of lse in float32 changes by its own
        # size; ds = p * (dp - delta), which may be 0, is the difference of numbers as large as other gradients; and the
        # out in delta has been rounded, so that where they cancel half a unit in the last place of the terms is left.
        rounded = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 4
        largest = magnitude(*gradients.values(), torch.zeros(1))
        return dict.fromkeys(gradients, largest * max(magnitude(truth["lse"], torch.ones(1)), rounded))

    def intermediate_of_tangents(self, case: Case, truth: Tensors, tangents: Tensors) -> dict[str, float]:
        # As of gradients; in dout = p dv + (p * ds) v - dlse * out the last two may cancel but for the half unit in
        # the last place by which out has been rounded.
        rounded = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 8
        exponent = magnitude(truth["lse"], torch.ones(1))
        of_lse = magnitude(tangents["lse"], torch.zeros(1))
        of_out = max(magnitude(tangents["out"], torch.zeros(1)), of_lse * magnitude(truth["out"], torch.ones(1)))
        return {"out": of_out * max(exponent, rounded), "lse": of_lse * exponent}

    def show_dropout(self, device: str, seed: int) -> tuple[Case, Tensor, Tensor]:
        """A case with equal scores and unit vectors for values, and where out and the gradient of value are not 0."""
        raise NotImplementedError


def showing(case: Case, units: Tensor) -> Case:
    """`case` with equal scores, and with the gradient `units` of out."""
    zeros = {name: torch.zeros_like(x) for name, x in case.tensors.items() if name.split("[")[0] != "values"}
    zeros.pop("value", None)
    return dataclasses.replace(case, tensors=case.tensors | zeros, grads={"out": units})


def batch_heads(B: int, H: int, device: str) -> Tensor:
    """The numbers (B, H, 1, 1) of heads, as dropout counts them."""
    return torch.arange(B * H, device=device).view(B, H, 1, 1)
