"""Matrix products of which only some pairs count: what a query does not read never reaches it, and is not reached.

A plain product of a matrix of weights multiplies what is not read by 0, and 0 times infinity is NaN::

    weights   1 0      values   1       plain product    NaN       over pairs     1
              0 1               NaN                      NaN                      NaN

Each of the two products here is the derivative of the other, so that gradients of any order, and tangents, keep to the
pairs as well. `read` is bool, and broadcasts to the matrix of pairs. Where PyTorch compiles, products are plain ones.
"""

from typing import Any

import torch
from torch import Tensor


def pair_products(a: Tensor, b: Tensor, read: Tensor | None) -> Tensor:
    """``a b^T`` (..., Lq, Lk) of rows (..., Lq, D) and (..., Lk, D), 0 where `read` is off."""
    if read is None or torch.compiler.is_compiling():
        return a @ b.mT
    return _PairProducts.apply(a, b, read)


def sums_over_pairs(weights: Tensor, rows: Tensor, read: Tensor | None) -> Tensor:
    """``weights rows`` (..., Lq, D): for each query, the weighted sum of the rows (..., Lk, D) that it reads."""
    if read is None or torch.compiler.is_compiling():
        return weights @ rows
    return _SumsOverPairs.apply(weights, rows, read)


def _is_seen_to_hold(x: Tensor) -> bool:
    """Whether all of `x` is True, where it has values that may be looked at: not mapped, traced or on "meta"."""
    if type(x) is not Tensor or x.is_meta or torch.jit.is_tracing():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x) and bool(x.all())


class _PairProducts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, read: Tensor) -> Tensor:
        return torch.where(read, a @ b.mT, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, read = ctx.saved_tensors
        return sums_over_pairs(grad, b, read), sums_over_pairs(grad.mT, a, read.mT), None

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor, b_tangent: Tensor, _: None) -> Tensor:
        a, b, read = ctx.saved_tensors
        return pair_products(a_tangent, b, read) + pair_products(a, b_tangent, read)


class _SumsOverPairs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, rows: Tensor, read: Tensor) -> Tensor:
        weights, finite = torch.where(read, weights, 0.0), rows.isfinite()
        if _is_seen_to_hold(finite):
            return weights @ rows
        sums = weights @ torch.where(finite, rows, 0.0)

        def meet(pairs: Tensor, elements: Tensor) -> Tensor:
            return pairs.to(sums.dtype) @ elements.to(sums.dtype) > 0

        up, down = rows == torch.inf, rows == -torch.inf
        rises = meet(weights > 0, up) | meet(weights < 0, down)
        falls = meet(weights > 0, down) | meet(weights < 0, up)
        neither = meet(read & (weights == 0), ~finite) | meet(read.expand(weights.shape), rows.isnan())
        sums = torch.where(rises, sums + torch.inf, sums)
        sums = torch.where(falls, sums - torch.inf, sums)
        return torch.where(neither, torch.nan, sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, rows, read = ctx.saved_tensors
        return pair_products(grad, rows, read), sums_over_pairs(weights.mT, grad, read.mT), None

    @staticmethod
    def jvp(ctx: Any, weights_tangent: Tensor, rows_tangent: Tensor, _: None) -> Tensor:
        weights, rows, read = ctx.saved_tensors
        return sums_over_pairs(weights_tangent, rows, read) + sums_over_pairs(weights, rows_tangent, read)
