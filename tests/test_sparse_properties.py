"""Sparse attention at layouts, positions, lengths, strides and dtypes that nobody thought of, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.layouts import layouts
from tests.utils import assert_within_budget, magnitude
from vattn import RelativePositionBias3D, _library, reference

needs_kernels = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
HEAD_DIMS = [1, 2, 7, 8, 16, 24, 33, 64, 72, 129, 256]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(attend: Callable[..., Any], dtype: torch.dtype, tensors: list[Tensor], table: Tensor | None) -> list[Tensor]:
    """Outputs and gradients of `attend` with `tensors`, the last of which is the gradient of the output, in `dtype`."""
    *leaves, grad_out = [x.detach().to(dtype).requires_grad_() for x in tensors]
    torch.manual_seed(3)
    out, lse, *importance = attend(*leaves)
    if table is not None:
        leaves.append(table)
    grads = torch.autograd.grad([out, lse], leaves, [grad_out.detach(), torch.ones_like(lse)], materialize_grads=True)
    return [out, lse, *importance, *grads]


def check(
    kernel: Callable[..., Any],
    definition: Callable[..., Any],
    dtype: torch.dtype,
    tensors: list[Tensor],
    table: Tensor | None = None,
    table_terms: float = 0.0,
) -> None:
    """`kernel` is as close to `definition` in float64 as the definition in `dtype` is, but for rounding.

    A gradient of `table` sums as many terms as there are pairs: `table_terms` bounds the sum of their absolutes.
    """
    actual, plain, truth = (
        run(attend, dtype, tensors, table)
        for attend, dtype in ((kernel, dtype), (definition, dtype), (definition, torch.float64))
    )
    query, key, value, grad_out = (x.double().abs() for x in tensors)
    scores, products = query @ key.mT * query.shape[-1] ** -0.5, grad_out @ value.mT  # sums of absolute terms
    outputs = len(truth) - len(tensors) + (table is None)
    forward = backward = 0.0
    if scores.numel() > 0:
        forward = magnitude(scores)
        # The gradient of a score is the difference of grad_out . value and of grad_out . out, which the forward has
        # rounded: where they cancel, as for a query that reads a single key, half a unit in their last place is left.
        # And a probability exp(score - lse) is as far off, relatively, as these two are.
        rounded = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 4
        rounded = max(1.0, rounded, magnitude(truth[1], scores))
        backward = magnitude(*truth[outputs:], products) * rounded
        table_terms *= rounded
    budgets = [forward] * outputs + [backward] * 3 + [max(backward, table_terms)]
    for i, (a, t, p, intermediate) in enumerate(zip(actual, truth, plain, budgets, strict=False)):
        assert_within_budget(a, t, p.to(a.dtype), f"tensor {i}", intermediate)


def sums_of_absolute_terms(
    attend: Callable[..., Any], bias: RelativePositionBias3D, positions: Tensor, tensors: list[Tensor]
) -> Tensor:
    """For each row of the table, the sum of p (|grad_out . value| + |grad_out . out| + 1) over its pairs of tokens."""
    query, key, value, grad_out = (x.double() for x in tensors)
    dense = bias(positions).expand(*query.shape[:2], -1, -1)
    leaf = dense.detach().double().requires_grad_()
    _, lse, *_ = attend(query, key, value, position_bias=lambda _: leaf)
    (p,) = torch.autograd.grad(lse, leaf, torch.ones_like(lse))
    products = grad_out.abs() @ value.abs().mT
    terms = p * (products + (p * products).sum(-1, keepdim=True) + 1)
    return torch.autograd.grad(dense, bias.table, terms.to(dense.dtype))[0]


@pytest.mark.slow
@needs_kernels
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_edges(data):
    draw = data.draw
    B, H = draw(st.integers(0, 3), label="B"), draw(st.integers(1, 3), label="H")
    D = draw(st.sampled_from(HEAD_DIMS), label="D")
    layout = draw(layouts(heads=H, max_block_size=draw(st.sampled_from([3, 20, 70]), label="largest")), label="layout")
    G, N = layout.num_global, layout.num_tokens
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    order = draw(st.permutations(range(4)), label="memory order")
    seed = draw(st.integers(0, 99), label="seed")
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {
        "causal": draw(st.booleans(), label="causal"),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3]), label="dropout_p"),
        "scale": draw(st.sampled_from([None, None, 0.0, -0.2]), label="scale"),
        "return_importance": G > 0 and draw(st.booleans(), label="importance"),
    }
    window = draw(st.sampled_from([(1, 1, 1), (2, 3, 5), (8, 7, 9)]), label="window")
    cells = window[0] * window[1] * window[2]
    shape = draw(st.sampled_from([(N,), (B, N), None]), label="shape of positions")
    if shape is not None:
        options["positions"] = torch.randint(0, cells, shape, generator=generator)
    bias = None
    if (shape is not None or cells >= N) and draw(st.booleans(), label="with position_bias"):
        bias = RelativePositionBias3D(window, H, G)
        torch.nn.init.normal_(bias.table, generator=generator)

    def tensor() -> Tensor:
        lengths = (B, H, G + N, D)
        back = [order.index(axis) for axis in range(4)]
        return torch.randn([lengths[axis] for axis in order], generator=generator).permute(back).to(dtype)

    tensors = [tensor() for _ in range(4)]
    kernel, definition = (
        functools.partial(attend, layout=layout, position_bias=bias, return_lse=True, **options)
        for attend in (vattn.edge_sparse_attention, reference.edge_sparse_attention)
    )
    if bias is None:
        check(kernel, definition, dtype, tensors)
    else:
        at = options.get("positions", torch.arange(N))
        terms = sums_of_absolute_terms(definition, bias, at, tensors)
        check(kernel, definition, dtype, tensors, bias.table, magnitude(terms))


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_nodes(data):
    draw = data.draw
    B, H = draw(st.integers(0, 3), label="B"), draw(st.integers(1, 2), label="H")
    D = draw(st.sampled_from(HEAD_DIMS), label="D")
    queries, keys = draw(st.integers(0, 200), label="queries"), draw(st.integers(1, 300), label="keys")
    count = draw(st.integers(0, 200), label="kept keys")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    order = draw(st.permutations(range(4)), label="memory order")
    options = {
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3]), label="dropout_p"),
        "scale": draw(st.sampled_from([None, None, 0.0, -0.2]), label="scale"),
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99), label="seed"))
    kept = torch.randint(0, keys, (B, count), generator=generator)  # some of them twice

    def tensor(length: int) -> Tensor:
        lengths = (B, H, length, D)
        back = [order.index(axis) for axis in range(4)]
        return torch.randn([lengths[axis] for axis in order], generator=generator).permute(back).to(dtype)

    tensors = [tensor(length) for length in (queries, keys, keys, queries)]
    kernel, definition = (
        functools.partial(attend, kept=kept, return_lse=True, **options)
        for attend in (vattn.node_sparse_attention, reference.node_sparse_attention)
    )
    check(kernel, definition, dtype, tensors)
