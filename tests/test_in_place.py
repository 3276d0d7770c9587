"""Results and inputs that are changed in place before the backward: what it does not read may be, and of the rest
PyTorch says so. Nothing is saved but what a derivative reads.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import vattn
from tests.calls import DIFFERENTIABLE, OPERATORS, as_tuple, calls
from vattn import _library

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
CHANGED = "modified by an inplace operation"
# What a backward reads, of the results and of the inputs as the public functions have them, by their places.
READ: dict[str, tuple[set[int], set[int]]] = {
    "periodic_shift": (set(), set()),
    "select_tokens": (set(), set()),
}


def reads(op: str, results: bool, i: int) -> bool:
    everything = {0, 1, 2, 3, 4, 5}
    return i in READ.get(op, ({0, 1}, everything))[0 if results else 1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradients(op: str, changed_result: int | None = None, changed_input: int | None = None) -> list[Tensor]:
    """Of all results that have any, one being changed, or an input after the call."""
    torch.manual_seed(0)
    function, leaves = calls(torch.float32)[op]
    inputs = [x * 1 for x in leaves]  # in-place changes of leaves are forbidden anyhow
    results = as_tuple(function(*inputs))
    if changed_result is not None:
        results[changed_result].mul_(2 if results[changed_result].is_floating_point() else 1)
    if changed_input is not None:
        with torch.no_grad():
            inputs[changed_input].mul_(2)
    outs = [x for x in results if x.requires_grad]
    return list(torch.autograd.grad([x.sin().sum() for x in outs], leaves, materialize_grads=True))


CASES = [
    (op, i)
    for op in DIFFERENTIABLE
    for i in range(len(as_tuple(calls(torch.float32)[op].function(*calls(torch.float32)[op].tensors))))
]


@pytest.mark.parametrize(("op", "i"), CASES)
def test_a_result_that_is_changed(op, i):
    if reads(op, True, i):
        with pytest.raises(RuntimeError, match=CHANGED):
            gradients(op, changed_result=i)
        return
    function, leaves = calls(torch.float32)[op]
    results = list(as_tuple(function(*leaves)))
    expected = torch.autograd.grad(
        [(x * 2 if j == i else x).sin().sum() for j, x in enumerate(results) if x.requires_grad], leaves,
        materialize_grads=True,
    )  # fmt: skip
    for x, y in zip(gradients(op, changed_result=i), expected, strict=True):
        torch.testing.assert_close(x, y)


INPUTS = [(op, i) for op in DIFFERENTIABLE for i in range(len(calls(torch.float32)[op].tensors))]


@pytest.mark.parametrize(("op", "i"), [x for x in INPUTS if x != ("edge_sparse_attention", 3)])  # a module's own table
def test_an_input_that_is_changed(op, i):
    if reads(op, False, i):
        with pytest.raises(RuntimeError, match=CHANGED):
            gradients(op, changed_input=i)
        return
    for x, y in zip(gradients(op, changed_input=i), gradients(op), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("op", OPERATORS)
def test_results_without_derivatives_may_be_changed(op):
    function, leaves = calls(torch.float32)[op]
    with torch.no_grad():
        results = as_tuple(function(*leaves))
    for x in results:
        version = x._version
        x.zero_()
        assert x._version == version + 1 and not x.requires_grad


def test_importance_may_change():
    """Neither the scores by which tokens were selected nor those that an attention gives are read again."""
    tokens = torch.randn(2, 7, 4, requires_grad=True)
    importance = torch.rand(2, 6)
    kept, positions = vattn.select_tokens(tokens, importance, 3)
    expected = torch.autograd.grad(kept.sin().sum(), tokens, retain_graph=True)[0]
    importance.zero_()
    positions.zero_()
    assert torch.equal(torch.autograd.grad(kept.sin().sum(), tokens)[0], expected)

    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    layout = vattn.BlockLayout.dense(5, 2, num_global=1)
    out, importance = vattn.edge_sparse_attention(q, q, q, layout, return_importance=True)
    importance.zero_()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_tangents_of_a_result_that_is_changed(op):
    function, tensors = calls(torch.float32)[op]
    plain = [x.detach() for x in tensors]

    def doubled(in_place: bool) -> Any:
        with forward_ad.dual_level():
            out = as_tuple(function(*(forward_ad.make_dual(x, x) for x in plain)))[0]
            out = out.mul_(2) if in_place else out * 2
            return forward_ad.unpack_dual(out)

    for x, y in zip(doubled(True), doubled(False), strict=True):
        assert torch.equal(x, y)
