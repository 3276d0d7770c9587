"""The kernels of merging attention over parts, called directly."""

import pytest
import torch

from tests.utils import assert_within_budget, magnitude
from vattn import reference
from vattn.kernels import merge_attention
from vattn.kernels.merge_attention import MAX_PARTS

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def parts_of(count, shape, device, dtype=torch.float32):
    outs = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    return outs, [torch.randn(shape[:-1], device=device) * 3 for _ in range(count)]


def formula(outs, lses, grad_out, grad_lse, dtype):
    """out, lse and gradients by the reference in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    outs, lses = [x.to(dtype).requires_grad_() for x in outs], [x.to(wide).requires_grad_() for x in lses]
    out, lse = reference.merge_attention(outs, lses)
    if grad_lse is None:
        return out, lse, *torch.autograd.grad(out, outs + lses, grad_out.to(dtype))
    return out, lse, *torch.autograd.grad([out, lse], outs + lses, [grad_out.to(dtype), grad_lse.to(wide)])


def check(outs, lses, grad_out=None, grad_lse=None):
    """The kernels are within budget, forward and backward; returns what they computed."""
    grad_out = torch.randn_like(outs[0]) if grad_out is None else grad_out
    out, lse = merge_attention.forward(outs, lses)
    grad_outs, grad_lses = merge_attention.backward(grad_out, grad_lse, outs, lses, out, lse)
    actual = (out, lse, *grad_outs, *grad_lses)
    truth = formula(outs, lses, grad_out, grad_lse, torch.float64)
    plain = formula(outs, lses, grad_out, grad_lse, outs[0].dtype)
    # A gradient of lse is w_i <g, out_i - out>: the difference of sums, one over the out that forward has rounded
    # to its dtype, by up to half a unit in the last place (the budget counts four of float32).
    rounded = torch.finfo(out.dtype).eps / torch.finfo(torch.float32).eps / 8
    intermediate = magnitude((grad_out.double() * truth[0]).abs().sum(-1)) * max(1.0, rounded)
    for i, (a, t, p) in enumerate(zip(actual, truth, plain, strict=True)):
        assert a.shape == t.shape
        assert_within_budget(a, t, p, f"tensor {i}", intermediate if i >= 2 + len(outs) else 0.0)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_counts(count, dtype, device):
    outs, lses = parts_of(count, (2, 3, 4, 5, 24), device, dtype)
    check(outs, lses, grad_lse=torch.randn_like(lses[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_parts_than_one_kernel_takes(dtype, device):
    check(*parts_of(2 * MAX_PARTS + 3, (3, 7), device, dtype))


@pytest.mark.parametrize("shape", [(16,), (1, 1), (5, 256), (130, 64)], ids=str)
def test_shapes(shape, device):
    check(*parts_of(2, shape, device))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_empty(shape, device):
    outs, lses = parts_of(2, shape, device)
    out, lse = merge_attention.forward(outs, lses)
    assert out.shape == shape
    torch.testing.assert_close(lse, torch.logaddexp(*lses))


def test_parts_without_keys(device):
    """-inf has no weight; where every part is -inf, out is 0, lse -inf, and gradients 0, not NaN."""
    outs, lses = parts_of(3, (4, 5, 16), device)
    lses[0][:2] = lses[1][:1] = lses[2][:1] = -torch.inf
    out, lse, *grads = check(outs, lses)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert all(x.isfinite().all() and (x[0] == 0).all() for x in grads)


def test_far_apart(device):
    outs, lses = parts_of(2, (4, 16), device)
    check(outs, [lses[0] + 1000, lses[1] - 1000])


def test_layouts(device):
    """Parts that lie alike are read where they lie, others are copied; gradients lie like their parts."""
    B, H, N, D = 2, 3, 5, 16
    as_projected = [torch.randn(B, N, H, D, device=device).transpose(1, 2) for _ in range(2)]
    odd = [
        as_projected[0],
        torch.randn(B, H, D, N, device=device).mT,
        torch.randn(B, H, N, 1, device=device).expand(-1, -1, -1, D),
    ]
    for outs in (as_projected, odd):
        lses = [torch.randn(N, B, H, device=device).permute(1, 2, 0) for _ in outs]
        grad_out = torch.ones((), device=device).expand(B, H, N, D)
        out, _, *grads = check(outs, lses, grad_out, torch.ones((), device=device).expand(B, H, N))
        assert out.stride() == torch.empty_like(outs[0]).stride()
        for grad, part in zip(grads[: len(outs)], outs, strict=True):
            assert grad.stride() == torch.empty_like(part).stride()


def test_twice_the_same_bits(device):
    outs, lses = parts_of(3, (4, 5, 16), device)
    grad_out = torch.randn_like(outs[0])
    for first, second in zip(check(outs, lses, grad_out), check(outs, lses, grad_out), strict=True):
        assert torch.equal(first, second)
