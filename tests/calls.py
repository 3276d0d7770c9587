"""Calls of every public operator at a small size, for tests of what they all owe their caller."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vattn
from tests.layouts import bias_without_table, layout_of


def video(*shape: int, dtype: torch.dtype = torch.float32, parts: int = 3) -> list[Tensor]:
    """Leaves (B, H, T, N, D) that require gradients."""
    return [x.requires_grad_() for x in torch.randn(parts, *shape).to(dtype).unbind()]


def parts(*shape: int, count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    outs = [torch.randn(*shape).to(dtype).requires_grad_() for _ in range(count)]
    wide = torch.promote_types(dtype, torch.float32)
    return outs, [torch.randn(shape[:-1], dtype=wide).requires_grad_() for _ in range(count)]


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


class Call(NamedTuple):
    """One way to call an operator: a function of tensors that all get gradients."""

    function: Any
    tensors: list[Tensor]


def calls(dtype: torch.dtype) -> dict[str, Call]:
    """Every operator, at a small size."""

    def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return vattn.merge_attention(tensors[:2], tensors[2:])

    def latent(query: Tensor, *tensors: Tensor) -> Any:
        return vattn.latent_attention(query, tensors[:2], tensors[2:], return_lse=True)

    layout = layout_of([[0, 2, 2], [], [1, 0]], num_tokens=5, block_size=2, num_global=1)
    bias = bias_without_table((1, 2, 3), num_heads=2)

    def edges(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
        bias.table = table  # type: ignore[assignment]
        return vattn.edge_sparse_attention(query, key, value, layout, position_bias=bias, return_lse=True)

    axial = functools.partial(vattn.axial_attention, dim=0, return_lse=True)
    leap = functools.partial(vattn.leap_attention, leap=2, fold_div=3, return_lse=True)
    shift = functools.partial(vattn.periodic_shift, fold_div=3)
    outs, lses = parts(2, 3, 5, 6, count=2, dtype=dtype)
    tokens = leaves(*((1, 2, length, 6) for length in (3, 4, 2, 4, 2)), dtype=dtype)
    kept = torch.tensor([[2, 0, 2], [3, 1, 0]])
    nodes = functools.partial(vattn.node_sparse_attention, kept=kept, return_lse=True)
    select = functools.partial(vattn.select_tokens, importance=torch.rand(2, 4), keep=0.5)
    return {
        "axial_attention": Call(axial, video(1, 2, 3, 4, 6, dtype=dtype)),
        "edge_sparse_attention": Call(edges, leaves((1, 2, 6, 3), (1, 2, 6, 3), (1, 2, 6, 3), (18, 2), dtype=dtype)),
        "latent_attention": Call(latent, tokens),
        "leap_attention": Call(leap, video(1, 2, 3, 2, 6, dtype=dtype)),
        "periodic_shift": Call(shift, video(1, 2, 4, 2, 6, dtype=dtype)[:1]),
        "merge_attention": Call(merge, [*outs, *lses]),
        "nearest_code": Call(vattn.nearest_code, [torch.randn(size).to(dtype) for size in ((2, 5, 6), (7, 6))]),
        "node_sparse_attention": Call(nodes, leaves((2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5), dtype=dtype)),
        "select_tokens": Call(lambda tokens: select(tokens)[0], leaves((2, 5, 3), dtype=dtype)),
        "token_importance": Call(vattn.token_importance, leaves((2, 2, 3, 5), (2, 2, 4, 5), dtype=dtype)),
    }


OPERATORS = list(calls(torch.float32))
DIFFERENTIABLE = [op for op in OPERATORS if op not in ("nearest_code", "token_importance")]
WITH_LSE = [op for op in DIFFERENTIABLE if op not in ("periodic_shift", "select_tokens")]
