"""What is not finite: NaN and infinities reach what the plain formula over the keys that are read lets them reach.

Truth is the reference in float64. Each fault is one number, or one kind of tensor, of an otherwise ordinary case.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.attention import Attention
from tests.kernels.cases import Case, Tensors
from tests.kernels.checks import assert_agree, formula, formula_jvp, run, run_jvp
from tests.kernels.operators import OPERATORS, over

NAN, INF = float("nan"), float("inf")
DIFFERENTIABLE = [op for op in OPERATORS if op.differentiable]
ATTENTION = [op for op in OPERATORS if isinstance(op, Attention)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def faulty(tensors: Tensors, name: str) -> Iterator[tuple[str, Tensors]]:
    """`tensors`, of which one element of `name`, or all of it, is not finite."""
    for value in (NAN, INF, -INF):
        x = tensors[name].clone(memory_format=torch.contiguous_format)
        x.view(-1)[x.numel() // 2] = value
        yield f"{name} has one {value}", tensors | {name: x}
    yield f"{name} is NaN", tensors | {name: torch.full_like(tensors[name], NAN)}


def kinds(x: Tensor, apart: bool) -> Tensor:
    """0 where `x` is finite, and 1 elsewhere; or, taken `apart`, 1, 2 and 3 where it is NaN, inf and -inf."""
    if not apart:
        return (~x.isfinite()).int()
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def first_difference(what: str, differs: Tensor, found: Tensor, expected: Tensor) -> str:
    index = tuple(differs.nonzero()[0].tolist())
    return f"{what} is {found[index]} at {index}, expected {expected[index]}; {int(differs.sum())} are wrong"


def assert_same_pattern(case: Case, found: Tensors, truth: Tensors, plain: Tensors, fault: str) -> None:
    """NaN and infinities are where they are in `truth`, and what is finite is right.

    A gradient may be NaN where it is infinite in `truth`, and the reverse: it is a difference of such numbers.
    """
    finite: dict[str, Tensors] = {"found": {}, "truth": {}, "plain": {}}
    for name, x in found.items():
        expected = truth[name].to(x.device)
        kind, expected_kind = (kinds(y, name in case.operator.results) for y in (x, expected))
        assert torch.equal(kind, expected_kind), first_difference(f"{fault}: {name}", kind != expected_kind, x, expected)
        for which, of in (("found", found), ("truth", truth), ("plain", plain)):
            y = of[name].clone(memory_format=torch.preserve_format)
            finite[which][name] = y.masked_fill_(~expected.isfinite(), 0)
    assert_agree(case, *finite.values(), {name: 1e3 for name in found})


def check_faults(operator, sizes, dtype, backend):
    case = operator.make(backend.device, dtype, **sizes)
    for name in case.tensors:
        for fault, tensors in faulty(case.tensors, name):
            check(dataclasses.replace(case, tensors=tensors), fault, backend)
    for name in case.grads:
        for fault, grads in faulty(case.grads, name):
            check(dataclasses.replace(case, grads=grads), f"gradient of {fault}", backend)


def check(case: Case, fault: str, backend) -> None:
    (truth, gradients), (plain, plain_gradients) = (formula(case, dtype) for dtype in (torch.float64, case.dtype))
    found = run(backend, case)
    assert_same_pattern(case, found, truth | gradients, plain | plain_gradients, fault)


@over("cases", [op for op in OPERATORS if not op.exact])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients(operator, sizes, dtype, backend):
    check_faults(operator, sizes, dtype, backend)
