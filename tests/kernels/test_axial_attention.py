"""What only axial attention has: many short lines, of which several share a tile."""

import pytest
import torch

import vattn
from tests.kernels.checks import check, check_jvp, run, run_jvp
from tests.kernels.sizes import CPP_TILE
from tests.operators.axial_attention import OPERATOR as AXIAL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_long_lines(dtype, backend):
    check(backend, AXIAL.make(backend.device, dtype, H=2, outer=1, line=40, inner=2, D=80))


@pytest.mark.parametrize("outer", [1, 2, 7])
@pytest.mark.parametrize("inner", [1, 3, 7])
def test_numbers_of_lines(outer, inner, backend):
    """Tiles whose lines lie in one outer place or in several, and a last tile with fewer."""
    check(backend, AXIAL.make(backend.device, H=2, outer=outer, line=4, inner=inner))


def test_queries_of_a_long_line_for_several_threads(backend):
    """More than the components that would keep threads busy, so that a backward cuts queries and keys."""
    check(backend, AXIAL.make(backend.device, outer=1, line=2 * CPP_TILE + 3, inner=1))


def test_lines_do_not_see_each_other(backend):
    """In one tile: changing a line changes no bit of another, forward and backward."""
    case = AXIAL.make(backend.device, outer=2, line=3, inner=4, scale=0.3)
    first = run(backend, case)
    for x in (*case.tensors.values(), case.grads["out"]):
        x[:, :, 1, :, 2] *= 100
    second = run(backend, case)
    for name in first:
        changed = (first[name] != second[name]).transpose(2, 3)[0, 0]  # (line, outer, inner, ...)
        assert changed[:, 1, 2].any()
        changed[:, 1, 2] = False
        assert not changed.any()


def test_dropout_mask_of_long_lines(backend):
    case, keep_out, keep_value = AXIAL.show_dropout(backend.device, -1, line=32)
    found = run(backend, case)
    assert torch.equal(found["out"] > 0, keep_out)
    assert torch.equal(found["dvalue"] > 0, keep_value)


def test_tangents_of_lines_do_not_mix(backend):
    """In one tile: a tangent in one line changes no bit of another."""
    case = AXIAL.make(backend.device, outer=2, line=3, inner=4, scale=0.3)
    tangents = case.random_tangents()
    first = check_jvp(backend, case, tangents)
    for x in tangents.values():
        x[:, :, 1, :, 2] *= 100
    for name, x in run_jvp(backend, case, tangents).items():
        changed = (x != first[name]).transpose(2, 3)[0, 0]  # (line, outer, inner, ...)
        assert changed[:, 1, 2].any()
        changed[:, 1, 2] = False
        assert not changed.any()


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(0, 4, 4, 3, 2, 8).transpose(2, 4),
        torch.randn(4, 2, 4, 6, 6, 8)[:0, :, :, :3, :3],
        torch.empty(1, 0, 2, 3, 4, 8).transpose(2, 3),
        torch.empty(2, 2, 2, 0, 3, 8),
    ],
    ids=["samples", "samples of a crop", "heads", "an axis"],
)
@pytest.mark.parametrize("dim", range(3))
def test_grids_of_nothing_in_any_order(x, dim):
    like = vattn.axial_attention(*[x.to("meta")] * 3, dim, return_lse=True)
    found = vattn.axial_attention(x, x, x, dim, return_lse=True)
    assert [(y.shape, y.stride()) for y in found] == [(y.shape, y.stride()) for y in like]
    y = x.clone().requires_grad_()
    out = vattn.axial_attention(y, y, y, dim)
    out.backward(torch.ones(1).expand(out.shape))
    assert y.grad.shape == x.shape
