"""Calls of every public operator at a small size, for tests of what they all owe their caller."""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vattn.ops import OPERATORS as NAMES


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


class Call(NamedTuple):
    """One way to call an operator: a function of tensors that all get gradients."""

    function: Any
    tensors: list[Tensor]


def calls(dtype: torch.dtype) -> dict[str, Call]:
    """Every operator, as its module in tests/operators calls it."""
    return {name: importlib.import_module(f"tests.operators.{name}").call(dtype) for name in NAMES}


OPERATORS = list(NAMES)
DIFFERENTIABLE = [op for op in OPERATORS if op not in ("nearest_code", "token_importance")]
WITH_LSE = [op for op in DIFFERENTIABLE if op not in ("periodic_shift", "select_tokens")]
