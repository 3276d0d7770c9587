"""The public functions at sizes, settings, strides and dtypes that nobody thought of: results, gradients, tangents.

Each run of the tests tries the same few. `make fuzz` tries others every time, thousands for each operator.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vattn
from tests.kernels.cases import Case, Tensors
from tests.kernels.checks import assert_agree, formula, formula_jvp
from tests.kernels.operators import OPERATORS
from tests.kernels.strides import STRIDES, STRIDES_OF_GRADIENTS, restrided
from tests.utils import magnitude
from vattn import _library, reference

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
BY_NAME = {operator.name: operator for operator in OPERATORS}
ZERO = torch.zeros(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_rounding(
    case: Case, intermediate: dict[str, float], results: Tensors, derivatives: Tensors
) -> dict[str, float]:
    """`intermediate`, or more where an exponent is a sum whose terms cancel, as among thousands of inputs some do.

    A score in float32 is off by units in the last place of the sum of its absolute terms, and so are lse, absolutely,
    and all that weights multiply, relatively.
    """
    tensors = case.tensors
    if "query" in tensors:
        keys = [x for name, x in tensors.items() if name.startswith("key")]
        lengths = [float(x.double().norm(dim=-1).amax()) if x.numel() else 0.0 for x in (tensors["query"], *keys)]
        exponent = abs(case.settings["scale"]) * lengths[0] * max(lengths[1:])
        exponent += magnitude(*(x for x in (tensors.get("table"), case.settings.get("table")) if x is not None), ZERO)
    else:
        exponent = magnitude(*(x for name, x in tensors.items() if name.startswith("lses")), ZERO)
    values = [x for name, x in tensors.items() if name.startswith(("value", "outs"))]
    largest = magnitude(*values, *results.values(), *derivatives.values(), ZERO)
    found = {name: exponent * largest for name in (*results, *derivatives) if not case.operator.exact}
    if "query" in tensors and "out" in case.grads:
        # The derivative of a score is the difference of dout v and delta, whose out the forward has rounded: where they
        # cancel, as for a query that reads a single key, the rounding of the terms is left.
        rounded = max(1.0, torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 4)
        delta = magnitude((case.grads["out"].double() * results["out"]).abs().sum(-1), ZERO)
        others = magnitude(tensors["query"], *keys, ZERO) * abs(case.settings["scale"])
        found |= {
            name: found[name] + rounded * delta * others
            for name in (f"d{x}" for x in tensors)
            if name in found and not name.startswith("dvalue")
        }
    return {name: max(found.get(name, 0.0), intermediate.get(name, 0.0)) for name in (*found, *intermediate)}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
@given(data=st.data())
def test_any_input(name, data):
    """As close to the definition in float64 as the definition in the same dtype is, but for rounding."""
    operator = BY_NAME[name]
    seed = data.draw(st.integers(0, 2**31), label="seed")
    torch.manual_seed(seed)
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    case = operator.make("cpu", dtype, **operator.draw(data.draw))
    is_large = all(x.numel() > 0 for x in case.tensors.values()) and next(iter(case.tensors.values())).ndim >= 3
    if is_large and data.draw(st.booleans(), label="as views"):
        strides = data.draw(st.sampled_from(list(STRIDES)), label="strides")
        case = dataclasses.replace(
            case,
            tensors=restrided(case.tensors, STRIDES[strides]),
            grads=restrided(case.grads, STRIDES_OF_GRADIENTS[strides]),
        )
    case = dataclasses.replace(case, settings={name: x for name, x in case.settings.items() if name != "seed"})

    def at_seed(compute, *args):
        torch.manual_seed(seed)
        return compute(*args)

    actual, actual_gradients = at_seed(formula, case, dtype, vattn)
    truth, gradients = at_seed(formula, case, torch.float64)
    plain, plain_gradients = at_seed(formula, case, dtype)
    intermediate = with_rounding(case, operator.intermediate(case, truth, gradients), truth, gradients)
    assert_agree(case, actual | actual_gradients, truth | gradients, plain | plain_gradients, intermediate)
    if operator.differentiable:
        case = case.replace(**{name: x.contiguous() for name, x in case.tensors.items()})
        tangents = case.random_tangents()
        _, actual = at_seed(formula_jvp, case, tangents, dtype, vattn)
        results, truth = at_seed(formula_jvp, case, tangents, torch.float64)
        _, plain = at_seed(formula_jvp, case, tangents, dtype)
        intermediate = with_rounding(case, operator.intermediate_of_tangents(case, results, truth), results, truth)
        assert_agree(case, actual, truth, plain, intermediate)


@pytest.mark.slow
@given(data=st.data())
def test_any_selection(data):
    """The rows of select_tokens, and which they are; ties, NaN and infinities among the scores."""
    draw = data.draw
    B, N, C = (draw(st.integers(0, most), label=name) for name, most in (("B", 3), ("N", 300), ("C", 9)))
    num_global, keep = draw(st.integers(0, 3), label="num_global"), draw(st.integers(0, N), label="keep")
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    divisor = draw(st.sampled_from([0.0, 1.0]), label="divisor")  # makes NaN and infinities, or many ties
    scores = torch.randint(-3, 4, (B, N)) / divisor
    shape = draw(st.sampled_from([None, (N,), (B, N)]), label="shape of positions")
    positions = None if shape is None else torch.randint(0, 1000, shape)
    tokens = torch.randn(C, num_global + N, B).permute(2, 1, 0).to(dtype).requires_grad_()
    kept, at = vattn.select_tokens(tokens, scores, keep, positions=positions, num_global=num_global)
    expected, expected_at = reference.select_tokens(tokens, scores, keep, positions=positions, num_global=num_global)
    assert torch.equal(kept, expected) and torch.equal(at, expected_at)
    gradient = torch.randn_like(kept)
    (actual,), (truth,) = (torch.autograd.grad(x, tokens, gradient) for x in (kept, expected))
    assert torch.equal(actual, truth)
