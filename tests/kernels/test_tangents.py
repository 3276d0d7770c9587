"""What the kernels of forward mode owe, for every operator that has derivatives: see test_contract.py.

Truth is forward mode through the reference in float64. The kernels read what forward has returned.
"""

import pytest
import torch

from tests.kernels.attention import SEED, Attention
from tests.kernels.checks import assert_right_jvp, assert_same_bits, check_jvp, poisoned, run, run_jvp
from tests.kernels.operators import OPERATORS, over
from tests.kernels.strides import STRIDES, everywhere, restrided
from tests.utils import far_apart

DIFFERENTIABLE = [op for op in OPERATORS if op.differentiable]
ATTENTION = [op for op in OPERATORS if isinstance(op, Attention)]


@pytest.mark.parametrize("head_dim", [1, 33, 64, 80, 256])
@over("narrow", DIFFERENTIABLE)
def test_head_dims(operator, sizes, head_dim, backend):
    """Whole, split and masked columns."""
    check_jvp(backend, operator.make(backend.device, **sizes | {"D": head_dim}))


@over("narrow", DIFFERENTIABLE)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(operator, sizes, head_dim, dtype, backend):
    check_jvp(backend, operator.make(backend.device, dtype, **sizes | {"H": 2, "D": head_dim}))


@over("lengths", DIFFERENTIABLE)
def test_lengths(operator, sizes, backend):
    """As many rows as a tile has, and one more or less."""
    check_jvp(backend, operator.make(backend.device, **sizes))


@over("cases", ATTENTION)
@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
def test_scale(operator, sizes, scale, backend):
    check_jvp(backend, operator.make(backend.device, **sizes, scale=scale))


@over("cases", ATTENTION)
def test_large_scores_do_not_overflow(operator, sizes, backend):
    case = operator.make(backend.device, **sizes)
    scored = {name: x * 100 for name, x in case.tensors.items() if name in operator.scored}
    assert all(x.isfinite().all() for x in check_jvp(backend, case.replace(**scored)).values())


@over("cases", ATTENTION)
@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
def test_dropout(operator, sizes, dropout_p, backend):
    check_jvp(backend, operator.make(backend.device, **sizes | {"H": 2}, dropout_p=dropout_p))


@pytest.mark.parametrize("operator", ATTENTION, ids=lambda op: op.name)
def test_dropout_mask_is_that_of_the_reference(operator, backend):
    """Bit by bit: with equal scores and unit vectors for tangents of values, the tangent of out shows the mask."""
    case, keep_out, _ = operator.show_dropout(backend.device, SEED)
    tangents = {name: torch.zeros_like(x) for name, x in case.tensors.items()}
    tangents |= {name: x for name, x in case.tensors.items() if name.startswith("value")}
    assert torch.equal(run_jvp(backend, case, tangents)["out"] > 0, keep_out)


@over("strided", DIFFERENTIABLE)
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(operator, sizes, strides, backend):
    """Inputs and tangents as views, each in another way; each means what its contiguous copy means."""
    case = operator.make(backend.device, **sizes)
    tangents = restrided(dict(reversed(case.random_tangents().items())), STRIDES[strides])
    tangents = {name: tangents[name] for name in case.tensors}
    check_jvp(backend, case.replace(**restrided(case.tensors, STRIDES[strides])), tangents)


@over("strided", DIFFERENTIABLE)
def test_tangents_of_one_number(operator, sizes, backend):
    """Expanded along every axis, as those of a scalar are."""
    case = operator.make(backend.device, **sizes)
    check_jvp(backend, case, restrided(case.random_tangents(), everywhere))


@over("cases", DIFFERENTIABLE)
def test_every_element_is_written_and_twice_the_same_bits(operator, sizes, backend):
    written_and_repeated(operator, sizes, backend)


@over("paths", DIFFERENTIABLE, [pytest.mark.slow])
def test_paths(operator, sizes, backend):
    """All ways through the kernels that sizes decide."""
    written_and_repeated(operator, sizes, backend)
    check_jvp(backend, operator.make(backend.device, torch.bfloat16, **sizes))


def written_and_repeated(operator, sizes, backend):
    dropout = {"dropout_p": 0.2} if isinstance(operator, Attention) else {}
    case = operator.make(backend.device, **{"D": 24, **sizes, **dropout})
    tangents = case.random_tangents()
    with poisoned(backend.device):
        first, second = run_jvp(backend, case, tangents), run_jvp(backend, case, tangents)
    assert_right_jvp(case, tangents, first)
    assert_same_bits(first, second)


@over("empty", DIFFERENTIABLE)
def test_empty(operator, sizes, backend):
    """Shapes are those of the results; a query without keys has a tangent of 0."""
    case = operator.make(backend.device, **sizes)
    found = run_jvp(backend, case, case.random_tangents())
    for name, expected in operator.reference(case.tensors, case.settings).items():
        if name in operator.results:
            assert found[name].shape == expected.shape and found[name].dtype == expected.dtype
            assert (found[name] == 0).all()


@over("cases", DIFFERENTIABLE)
def test_is_the_transpose_of_backward(operator, sizes, backend):
    """<g, J t> = <J^T g, t> for any gradients g and tangents t: both are derivatives of the same function."""
    dropout = {"dropout_p": 0.2} if isinstance(operator, Attention) else {}
    case = operator.make(backend.device, **sizes, **dropout)
    tangents = case.random_tangents()
    forward, backward = run_jvp(backend, case, tangents), run(backend, case)
    left = [case.grads[name].double() * tangent.double() for name, tangent in forward.items()]
    right = [backward[f"d{name}"].double() * tangent.double() for name, tangent in tangents.items()]
    terms = sum(float(x.abs().sum()) for x in left + right)
    error = abs(sum(float(x.sum()) for x in left) - sum(float(x.sum()) for x in right))
    assert error <= torch.finfo(torch.float32).eps * terms


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize(
    ("operator", "axis"),
    [pytest.param(op, axis, id=f"{op.name}-{name}") for op in DIFFERENTIABLE for axis, name in enumerate(op.axes)],
)
def test_offsets_beyond_int32(operator, axis, backend):
    case = operator.make("cpu", **operator.far)
    tangents = case.random_tangents()
    names = [name for name, x in case.tensors.items() if x.ndim == len(operator.axes) + 1]
    views = far_apart([*(case.tensors[name] for name in names), *(tangents[name] for name in names)], axis)
    near, of_near = (dict(zip(names, x, strict=True)) for x in (views[: len(names)], views[len(names) :]))
    check_jvp(backend, case.replace(**near), tangents | of_near)
