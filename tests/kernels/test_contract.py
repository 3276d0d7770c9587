"""What the kernels of every operator owe, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64; the budget is twice the error of the reference in the kernels' own dtype.
"""

import dataclasses

import pytest
import torch

from tests.kernels.attention import SEED, Attention
from tests.kernels.checks import assert_right, assert_same_bits, check, poisoned, run
from tests.kernels.operators import OPERATORS, over
from tests.kernels.strides import STRIDES, STRIDES_OF_GRADIENTS, restrided
from tests.utils import far_apart

ATTENTION = [op for op in OPERATORS if isinstance(op, Attention)]
WITH_SCORES = [op for op in OPERATORS if "scale" in op.settings]


@pytest.mark.parametrize(
    ("operator", "sizes"),
    [
        pytest.param(op, sizes | {"D": D}, id=f"{op.name}-{name}-{D}")
        for op in OPERATORS
        for name, sizes in op.narrow.items()
        for D in op.head_dims
    ],
)
def test_head_dims(operator, sizes, backend):
    """Whole, split and masked columns."""
    check(backend, operator.make(backend.device, **sizes))


@over("narrow")
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(operator, sizes, head_dim, dtype, backend):
    check(backend, operator.make(backend.device, dtype, **sizes | {"H": 2, "D": head_dim}))


@over("lengths")
def test_lengths(operator, sizes, backend):
    """As many rows as a tile has, and one more or less."""
    check(backend, operator.make(backend.device, **sizes))


@over("cases", WITH_SCORES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-4, 5.0])
def test_scale(operator, sizes, scale, backend):
    check(backend, operator.make(backend.device, **sizes, scale=scale))


@over("cases", ATTENTION)
def test_large_scores_do_not_overflow(operator, sizes, backend):
    case = operator.make(backend.device, **sizes)
    scored = {name: x * 100 for name, x in case.tensors.items() if name in operator.scored}
    check(backend, case.replace(**scored))


@over("cases", [op for op in OPERATORS if "lse" in op.results])
def test_gradient_of_out_only(operator, sizes, backend):
    check(backend, operator.make(backend.device, **sizes).gradient_of_out_only())


@over("cases", ATTENTION)
@pytest.mark.parametrize("dropout_p", [0.2, 0.9, 1.0])
def test_dropout(operator, sizes, dropout_p, backend):
    check(backend, operator.make(backend.device, **sizes | {"H": 2}, dropout_p=dropout_p))


@pytest.mark.parametrize("operator", ATTENTION, ids=lambda op: op.name)
@pytest.mark.parametrize("seed", [0, -1, SEED])
def test_dropout_mask_is_that_of_the_reference(operator, seed, backend):
    """Bit by bit, forward and backward: with equal scores and unit vectors for values, out shows the mask."""
    case, keep_out, keep_value = operator.show_dropout(backend.device, seed)
    found = run(backend, case)
    assert torch.equal(found["out"] > 0, keep_out)
    grads = [grad for name, grad in found.items() if name.startswith("dvalue")]
    assert torch.equal(torch.cat(grads, 2) > 0, keep_value)


@over("strided")
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(operator, sizes, strides, backend):
    """Inputs and gradients of results as views; each means what its contiguous copy means."""
    case = operator.make(backend.device, **sizes)
    tensors = restrided(case.tensors, STRIDES[strides])
    grads = restrided(case.grads, STRIDES_OF_GRADIENTS[strides])
    check(backend, dataclasses.replace(case, tensors=tensors, grads=grads))


@over("cases")
def test_every_element_is_written_and_twice_the_same_bits(operator, sizes, backend):
    written_and_repeated(operator, sizes, backend)


@over("paths", marks=[pytest.mark.slow])
def test_paths(operator, sizes, backend):
    """All ways through the kernels that sizes decide."""
    written_and_repeated(operator, sizes, backend)
    case = operator.make(backend.device, torch.bfloat16, **sizes)
    with poisoned(backend.device):
        found = run(backend, case)
    assert_right(case, found)


def written_and_repeated(operator, sizes, backend):
    dropout = {"dropout_p": 0.2} if isinstance(operator, Attention) else {}
    case = operator.make(backend.device, **{"D": 24, **sizes, **dropout, **operator.repeatable})
    with poisoned(backend.device):
        first, second = run(backend, case), run(backend, case)
    assert_right(case, first)
    assert_same_bits(first, second)


@over("empty")
def test_empty(operator, sizes, backend):
    """Shapes are those of the reference; inputs that nothing reads have a gradient of 0."""
    case = operator.make(backend.device, **sizes)
    found = run(backend, case)
    for name, expected in operator.reference(case.tensors, case.settings).items():
        torch.testing.assert_close(found.pop(name), expected, equal_nan=True)
    for name, grad in found.items():
        assert grad.shape == case.tensors[name.removeprefix("d")].shape and (grad == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize(
    ("operator", "axis"),
    [pytest.param(op, axis, id=f"{op.name}-{name}") for op in OPERATORS for axis, name in enumerate(op.axes)],
)
def test_offsets_beyond_int32(operator, axis, backend):
    case = operator.make("cpu", **operator.far)
    tensors = {name: x for name, x in case.tensors.items() if x.ndim == len(operator.axes) + 1}
    tensors |= {"grad of out": case.grads["out"]} if operator.differentiable else {}
    views = dict(zip(tensors, far_apart(list(tensors.values()), axis), strict=True))
    grads = {"out": views.pop("grad of out")} if operator.differentiable else {}
    check(backend, dataclasses.replace(case, tensors=case.tensors | views, grads=case.grads | grads))
