"""The kernels of axial attention, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64; the budget is twice the error of the reference in the kernel's own dtype. The kernels
see a grid as (B, H, outer, line, inner, D).
"""

import pytest
import torch

from tests.utils import assert_within_budget, far_apart, magnitude
from vattn import reference
from vattn.kernels import axial_attention, configs
from vattn.reference.dropout import dropout_keep

pytestmark = pytest.mark.gpu

SEED = 0x123456789ABCDEF
BLOCK_Q, BLOCK_K = configs.INTERPRETER.BLOCK_Q, configs.INTERPRETER.BLOCK_K
CPP_ROWS, CPP_TILE = 16, 64  # csrc/cpu/axial_attention.cpp and flash.h
SHORT, LONG = (2, 3, 3), (1, 20, 2)  # lines that share tiles, and lines that several tiles share
grids = pytest.mark.parametrize("grid", [SHORT, LONG], ids=["short lines", "long lines"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(outer, line, inner, device, B=1, H=1, D=16, dtype=torch.float32):
    """Random query, key, value and gradients of out and of lse."""
    shape = (B, H, outer, line, inner, D)
    q, k, v, grad_out = torch.randn(4, *shape, device=device).to(dtype)
    return q, k, v, grad_out, torch.randn(shape[:-1], device=device)


def formula(x, dtype, dropout_p, seed, scale):
    """out, lse and gradients by the reference in `dtype`."""
    *qkv, grad_out, grad_lse = x
    leaves = [y.detach().to(dtype).requires_grad_() for y in qkv]
    out, lse = reference.axial_attention(*leaves, 1, dropout_p=dropout_p, scale=scale, return_lse=True, seed=seed)
    results, grads = [out], [grad_out.to(dtype)]
    if grad_lse is not None:
        results, grads = [out, lse], [*grads, grad_lse.to(lse.dtype)]
    return out, lse, *torch.autograd.grad(results, leaves, grads)


def run(x, *settings):
    """out, lse and gradients by the kernels; `settings` as the launchers take them, from `dropout_p` on."""
    q, k, v, grad_out, grad_lse = x
    out, lse = axial_attention.forward(q, k, v, *settings)
    return out, lse, *axial_attention.backward(grad_out, grad_lse, q, k, v, out, lse, *settings)


def check(x, dropout_p=0.0, seed=None, scale=None):
    """The kernels are within budget, forward and backward; returns what they computed."""
    scale = x[0].shape[-1] ** -0.5 if scale is None else scale
    settings = (dropout_p, seed, scale)
    actual = run(x, *settings)
    truth, plain = formula(x, torch.float64, *settings), formula(x, x[0].dtype, *settings)
    # The backward finds weights again as exp(s - lse), which the rounding of lse in float32 changes by its own
    # size; ds = p * (dp - delta), which may be 0, is the difference of numbers as large as other gradients; and the
    # out in delta has been rounded, so that where they cancel half a unit in the last place of the terms is left.
    rounded = torch.finfo(x[0].dtype).eps / torch.finfo(torch.float32).eps / 4
    intermediate = magnitude(*truth[2:]) * max(1.0, magnitude(truth[1]), rounded) if x[0].numel() else 0.0
    for name, a, t, p in zip(("out", "lse", "dq", "dk", "dv"), actual, truth, plain, strict=True):
        assert_within_budget(a, t, p, name, intermediate if name.startswith("d") else 0.0)
    return actual


@pytest.mark.parametrize("head_dim", [1, 16, 33, 64, 72, 80, 96, 120, 128, 144, 256])
def test_head_dims(head_dim, device):
    """Whole, split and masked columns."""
    check(inputs(*SHORT, device, D=head_dim))
    check(inputs(1, BLOCK_Q + 5, 1, device, D=head_dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [SHORT, (1, 40, 2)], ids=["short lines", "long lines"])
def test_dtypes(dtype, grid, device):
    check(inputs(*grid, device, H=2, D=80, dtype=dtype))


@pytest.mark.parametrize(
    "line", sorted({1, 2, 3, 5, 8, *(b + i for b in (CPP_ROWS, BLOCK_K, CPP_TILE) for i in (-1, 0, 1))})
)
def test_lengths_of_lines(line, device):
    """Several lines in a tile, one, and one in several tiles."""
    check(inputs(*((2, line, 3) if line <= CPP_ROWS else (1, line, 2)), device))


@pytest.mark.parametrize("outer", [1, 2, 7])
@pytest.mark.parametrize("inner", [1, 3, 7])
def test_numbers_of_lines(outer, inner, device):
    """Tiles whose lines lie in one outer place or in several, and a last tile with fewer."""
    check(inputs(outer, 4, inner, device, H=2))


def test_queries_of_a_long_line_for_several_threads(device):
    """More than the components that would keep threads busy, so that a backward cuts queries and keys."""
    check(inputs(1, 2 * CPP_TILE + 3, 1, device))


def test_lines_do_not_see_each_other(device):
    """In one tile: changing a line changes no bit of another, forward and backward."""
    q, k, v, grad_out, grad_lse = inputs(2, 3, 4, device)
    first = run((q, k, v, grad_out, grad_lse), 0.0, None, 0.3)
    for x in (q, k, v, grad_out):
        x[:, :, 1, :, 2] *= 100
    second = run((q, k, v, grad_out, grad_lse), 0.0, None, 0.3)
    for a, b in zip(first, second, strict=True):
        changed = (a != b).transpose(2, 3)[0, 0]  # (line, outer, inner, ...)
        assert changed[:, 1, 2].any()
        changed[:, 1, 2] = False
        assert not changed.any()


@grids
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-4, 5.0])
def test_scale(scale, grid, device):
    check(inputs(*grid, device), scale=scale)


def test_large_scores_do_not_overflow(device):
    q, k, *rest = inputs(2, 5, 2, device)
    check((q * 100, k * 100, *rest))


@grids
def test_gradient_of_out_only(grid, device):
    *x, _ = inputs(*grid, device)
    check((*x, None))


@grids
@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
def test_dropout(dropout_p, grid, device):
    check(inputs(*grid, device, H=3), dropout_p, torch.tensor([SEED], device=device))


@pytest.mark.parametrize("seed", [-1, SEED])
@pytest.mark.parametrize("line", [4, 32])
def test_dropout_mask_is_that_of_the_reference(seed, line, device):
    """Bit by bit, forward and backward: with equal scores and unit vectors for values, out shows the mask.

    Tokens count through the grid in raster order.
    """
    B, H, outer, inner, dropout_p = 1, 2, 2, 2, 0.3
    shape = (B, H, outer, line, inner, line)
    units = torch.eye(line, device=device)[:, None].expand(shape)
    zeros, settings = torch.zeros(shape, device=device), (dropout_p, torch.tensor([seed], device=device), 1.0)
    out, _, _, _, dv = run((zeros, zeros, units, units, None), *settings)
    bh = torch.arange(B * H, device=device).view(B, H, 1, 1, 1, 1)
    tokens = torch.arange(outer * line * inner, device=device).view(outer, line, inner).transpose(1, 2)
    keep = dropout_keep(settings[1], bh, tokens[..., :, None], tokens[..., None, :], dropout_p)
    assert torch.equal((out > 0).transpose(3, 4), keep)
    assert torch.equal((dv > 0).transpose(3, 4), keep.mT)


@grids
@pytest.mark.parametrize("layout", ["channels last", "heads first", "broadcast", "last axis", "slices"])
def test_strides(layout, grid, device):
    """Inputs and output gradients as views; each means what its contiguous copy means."""
    B, H, (outer, line, inner), D = 2, 2, grid, 16
    q, k, v, grad_out, grad_lse = inputs(outer, line, inner, device, B, H, D)
    shape = q.shape
    if layout == "channels last":
        q, k, v = torch.randn(B, outer, line, inner, 3, H, D, device=device).permute(4, 0, 5, 1, 2, 3, 6)
        grad_out, grad_lse = (x.movedim(1, 4).contiguous().movedim(4, 1) for x in (grad_out, grad_lse))
    elif layout == "heads first":
        q, k, grad_out = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, grad_out))
    elif layout == "broadcast":
        q, k, v = q[:, :1].expand(shape), k[:, :, :, :1].expand(shape), v[..., :1, :].expand(shape)
        one = torch.ones((), device=device)
        grad_out, grad_lse = one.expand(shape), one.expand(shape[:-1])
    elif layout == "last axis":
        q, v, grad_out = (x.mT.contiguous().mT for x in (q, v, grad_out))
    else:
        sliced = torch.randn(3, B, H, outer, line + 1, inner, D + 3, device=device)
        q, k, grad_out = sliced[..., 1:, :, 1:-2]
    check((q, k, v, grad_out, grad_lse))


def test_outputs_merge_heads_without_a_copy(device):
    for grid in (SHORT, LONG):
        out, lse, *grads = run(inputs(*grid, device, H=2), 0.0, None, 0.3)
        for x in (out, *grads):
            assert x.movedim(1, -2).flatten(-2).data_ptr() == x.data_ptr()
        assert lse.is_contiguous() and lse.dtype == torch.float32


@grids
def test_every_element_is_written(grid, device):
    """What torch.empty returns is NaN here, and none of it is left."""
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        assert torch.empty(1, device=device).isnan().all()
        assert torch.empty_like(torch.ones(1, device=device)).isnan().all()
        actual = check(inputs(*grid, device, H=2, D=24))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in actual)


@pytest.mark.parametrize("axis", range(5), ids=["B", "H", "outer", "line", "inner"])
def test_empty(axis, device):
    shape = [2, 2, 2, 3, 2, 16]
    shape[axis] = 0
    x = torch.randn(shape, device=device)
    for y, expected in zip(run((x, x, x, x, x[..., 0]), 0.0, None, 1.0), (x, x[..., 0], x, x, x), strict=True):
        assert y.shape == expected.shape


@grids
def test_twice_the_same_bits(grid, device):
    x, settings = inputs(*grid, device, D=24), (0.2, torch.tensor([SEED], device=device), 0.3)
    for first, second in zip(run(x, *settings), run(x, *settings), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize("axis", range(5), ids=["B", "H", "outer", "line", "inner"])
def test_offsets_beyond_int32(axis):
    q, k, v, grad_out, grad_lse = inputs(2, 2, 2, "cpu", B=2, H=2)
    check((*far_apart([q, k, v, grad_out], axis), grad_lse))
