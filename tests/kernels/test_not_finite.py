"""What is not finite: NaN and infinities reach what the plain formula over the keys that are read lets them reach.

Truth is the reference in float64. Each fault is one element, or all, of one tensor of an otherwise ordinary case.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.attention import Attention
from tests.kernels.backends import Backend
from tests.kernels.cases import Case, Tensors
from tests.kernels.checks import formula, formula_jvp, run, run_jvp
from tests.kernels.operators import OPERATORS, over
from tests.utils import assert_close, magnitude

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = {
    "latent_attention": {
        "key lengths": {"queries": 5, "keys": (20,), "key_lengths": torch.tensor([9, 0])},
        "one tile of keys": {"queries": 150, "keys": (20, 9)},
    },
    "token_importance": {"key lengths": {"queries": 5, "keys": 20, "key_lengths": torch.tensor([9, 0])}},
    "edge_sparse_attention": {
        "causal": {"rows": [[1, 0], [1]], "block_size": 7, "N": 13, "causal": True},
        "causal without global tokens": {"rows": [[1], [0, 1]], "block_size": 7, "N": 13, "G": 0, "causal": True},
        "deterministic": {"rows": [[0, 1], [1, 1]], "block_size": 7, "N": 13, "deterministic": True},
    },
    "axial_attention": {"lines of a row": {"outer": 3, "line": 5, "inner": 2}},
}
INEXACT = [dataclasses.replace(op, cases=op.cases | PATHS.get(op.name, {})) for op in OPERATORS if not op.exact]
DIFFERENTIABLE = [op for op in INEXACT if op.differentiable]
ATTENTION = [op for op in INEXACT if isinstance(op, Attention)]


def case_of(operator, sizes, dtype, backend) -> Case:
    """Two samples: the fault is in the second one."""
    lengths = {"key_lengths": sizes["key_lengths"].to(backend.device)} if "key_lengths" in sizes else {}
    return operator.make(backend.device, dtype, **{"B": 2, **sizes, **lengths})


def faulty(tensors: Tensors, name: str) -> Iterator[tuple[str, Tensors]]:
    """`tensors`, of which one element of `name`, or all of it, is not finite."""
    for value in (NAN, INF, -INF):
        x = tensors[name].clone(memory_format=torch.contiguous_format)
        x.view(-1)[x.numel() // 2] = value
        yield f"{name} has one {value}", tensors | {name: x}
    yield f"{name} is NaN", tensors | {name: torch.full_like(tensors[name], NAN)}


def shares_tiles(case: Case, backend: Backend) -> bool:
    """Whether queries may turn NaN by a key that they do not read, because it is in their tile: see docs/numerics.md."""
    if backend.name != "triton":
        return False
    short_lines = case.operator.name == "axial_attention" and case.tensors["query"].shape[3] <= 8
    return short_lines or case.settings.get("causal", False)


def kinds(x: Tensor, apart: bool) -> Tensor:
    """0 where `x` is finite, and 1 elsewhere; or, taken `apart`, 1, 2 and 3 where it is NaN, inf and -inf."""
    if not apart:
        return (~x.isfinite()).int()
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def assert_same_kinds(case: Case, backend: Backend, fault: str, found: Tensors, truth: Tensors) -> None:
    """NaN and infinities are where they are in `truth`, and what is finite is about right.

    Derivatives are differences of such numbers: whether they are NaN or infinite may depend on the order of sums.
    """
    spreads = shares_tiles(case, backend)
    for name, x in found.items():
        apart = name in case.operator.results and not spreads
        expected = truth[name].to(x.device)
        kind, expected_kind = kinds(x, apart), kinds(expected, apart)
        wrong = expected_kind > kind if spreads else kind != expected_kind
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{fault}: {name} is {x[index]} at {index}, expected {expected[index]}; so are {int(wrong.sum())}"
            )
        about = 64 * torch.finfo(case.dtype).eps * max(1.0, magnitude(*truth.values()))
        assert_close(*(torch.where(kind == 0, y, 0.0) for y in (x, expected)), about, f"{fault}: {name}")


def check(backend: Backend, case: Case, fault: str) -> None:
    truth, gradients = formula(case, torch.float64)
    assert_same_kinds(case, backend, fault, run(backend, case), truth | gradients)


@over("cases", INEXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs(operator, sizes, dtype, backend):
    """Results and gradients, also of importance and of the table of biases."""
    case = case_of(operator, sizes, dtype, backend)
    for name in case.tensors:
        for fault, tensors in faulty(case.tensors, name):
            check(backend, dataclasses.replace(case, tensors=tensors), fault)


@over("cases", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_results(operator, sizes, dtype, backend):
    case = case_of(operator, sizes, dtype, backend)
    for name in case.grads:
        for fault, grads in faulty(case.grads, name):
            check(backend, dataclasses.replace(case, grads=grads), f"the gradient of {fault}")


@over("cases", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangents(operator, sizes, dtype, backend):
    """Of inputs that are not finite, and tangents that are not."""
    case = case_of(operator, sizes, dtype, backend)
    tangents = case.random_tangents()
    for name in case.tensors:
        for fault, tensors in faulty(case.tensors, name):
            check_jvp(backend, dataclasses.replace(case, tensors=tensors), tangents, fault)
        for fault, of_inputs in faulty(tangents, name):
            check_jvp(backend, case, of_inputs, f"the tangent of {fault}")


def check_jvp(backend: Backend, case: Case, tangents: Tensors, fault: str) -> None:
    found = {f"tangent of {name}": x for name, x in run_jvp(backend, case, tangents).items()}
    truth = {f"tangent of {name}": x for name, x in formula_jvp(case, tangents, torch.float64)[1].items()}
    assert_same_kinds(case, backend, fault, found, truth)
