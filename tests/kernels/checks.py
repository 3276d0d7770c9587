"""What the contracts share: both ways to compute a case, and whether they agree."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.kernels.backends import Backend
from tests.kernels.cases import Case, Tensors
from tests.utils import assert_within_budget
from vattn import reference


def run(backend: Backend, case: Case) -> Tensors:
    """The results by name, and the gradients of the tensors, as ``d`` and their names, by the kernels of `backend`."""
    launchers = backend.launchers(case.operator.name)
    results = case.operator.forward(launchers, case)
    if not case.operator.differentiable:
        return results
    return results | _gradients(case.operator.backward(launchers, case, results))


def formula(case: Case, dtype: torch.dtype, functions: Any = reference) -> tuple[Tensors, Tensors]:
    """The results and the gradients by the reference, or the public functions of vattn, in `dtype`.

    What is float32 in any call stays as wide.
    """
    tensors = {name: x.detach().to(torch.promote_types(dtype, x.dtype)) for name, x in case.tensors.items()}
    if not case.operator.differentiable:
        return case.operator.reference(tensors, case.settings, functions), {}
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    results = case.operator.reference(leaves, case.settings, functions)
    grads = torch.autograd.grad(
        [results[name] for name in case.grads],
        list(leaves.values()),
        [grad.to(results[name].dtype) for name, grad in case.grads.items()],
        materialize_grads=True,
    )
    return results, _gradients(dict(zip(leaves, grads, strict=True)))


def check(backend: Backend, case: Case) -> Tensors:
    """:func:`assert_right` of what the kernels of `backend` find; returns it."""
    found = run(backend, case)
    assert_right(case, found)
    return found


def assert_right(case: Case, found: Tensors) -> None:
    """Results and gradients are within budget, and lie in memory as they should."""
    (truth, gradients), (plain, plain_gradients) = (formula(case, dtype) for dtype in (torch.float64, case.dtype))
    intermediate = case.operator.intermediate(case, truth, gradients)
    assert_agree(case, found, truth | gradients, plain | plain_gradients, intermediate)


def run_jvp(backend: Backend, case: Case, tangents: Tensors) -> Tensors:
    """The tangents of the results by name, by the kernels of `backend`."""
    launchers = backend.launchers(case.operator.name)
    return case.operator.jvp(launchers, case, case.operator.forward(launchers, case), tangents)


def formula_jvp(
    case: Case, tangents: Tensors, dtype: torch.dtype, functions: Any = reference
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """The results and their tangents by forward mode through the reference, or the public functions, in `dtype`."""
    names = list(case.tensors)

    def results(*tensors: Tensor) -> Tensors:
        found = case.operator.reference(dict(zip(names, tensors, strict=True)), case.settings, functions)
        return {name: found[name] for name in case.operator.results}

    def wide(x: Tensor) -> Tensor:  # copied, because a dual tensor allocates all that a view's strides span
        return x.detach().contiguous().to(torch.promote_types(dtype, x.dtype))

    of_primals = (tangents.get(name, x.new_zeros(()).expand_as(x)) for name, x in case.tensors.items())
    pairs = [(wide(x), wide(tangent)) for x, tangent in zip(case.tensors.values(), of_primals, strict=True)]
    found, of_found = torch.func.jvp(results, *zip(*pairs, strict=True))[:2]
    return found, of_found


def check_jvp(backend: Backend, case: Case, tangents: Tensors | None = None) -> Tensors:
    """:func:`assert_right_jvp` of what the kernels of `backend` find, for random tangents if not these; returns it."""
    tangents = case.random_tangents() if tangents is None else tangents
    found = run_jvp(backend, case, tangents)
    assert_right_jvp(case, tangents, found)
    return found


def assert_right_jvp(case: Case, tangents: Tensors, found: Tensors) -> None:
    """The tangents of results are within budget, and lie in memory as the results do."""
    results, truth = formula_jvp(case, tangents, torch.float64)
    _, plain = formula_jvp(case, tangents, case.dtype)
    assert_agree(case, found, truth, plain, case.operator.intermediate_of_tangents(case, results, truth))


def assert_agree(case: Case, actual: Tensors, truth: Tensors, plain: Tensors, intermediate: dict[str, float]) -> None:
    """All tensors are there, lie as they should, and are as close to `truth` as `plain` and rounding allow."""
    operator = case.operator
    assert list(actual) == list(truth) == list(plain)
    for name, x in actual.items():
        assert operator.lies_well(case, name.removeprefix("d"), x), f"{name}: strides {x.stride()}"
        if operator.exact:
            assert x.dtype == plain[name].dtype, f"{name}: {x.dtype}"
            assert torch.equal(x, truth[name].to(x.dtype)), name
        else:
            assert_within_budget(x, truth[name], plain[name], name, intermediate.get(name, 0.0))


@contextlib.contextmanager
def poisoned(device: str) -> Iterator[None]:
    """What torch.empty returns is NaN here, or the largest integer."""
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        assert torch.empty(1, device=device).isnan().all()
        assert torch.empty_like(torch.ones(1, device=device)).isnan().all()
        assert (torch.empty(1, dtype=torch.int64, device=device) == torch.iinfo(torch.int64).max).all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_bits(first: Tensors, second: Tensors) -> None:
    """No bit differs, and nothing is NaN."""
    assert list(first) == list(second)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def _gradients(of_tensors: dict[str, Tensor]) -> Tensors:
    return {f"d{name}": grad for name, grad in of_tensors.items()}
