"""The kernels of leap attention, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64; the budget is twice the error of the reference in the kernel's own dtype.
"""

import pytest
import torch

from tests.utils import assert_within_budget, far_apart, magnitude
from vattn import reference
from vattn.kernels import configs, leap_attention
from vattn.reference.dropout import dropout_keep

pytestmark = pytest.mark.gpu

SEED = 0x123456789ABCDEF
BLOCK_Q, BLOCK_K = configs.INTERPRETER.BLOCK_Q, configs.INTERPRETER.BLOCK_K
CPP_TILE = 64  # csrc/cpu/flash.h


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(shape, device, dtype=torch.float32):
    """query, key, value, grad_out and grad_lse of `shape` (B, H, T, N, D)."""
    query, key, value, grad_out = torch.randn(4, *shape, device=device).to(dtype)
    return query, key, value, grad_out, torch.randn(shape[:-1], device=device)


def formula(tensors, dtype, leap, group_size, fold_div, dropout_p, seed, scale):
    """out, lse and gradients by the reference in `dtype`."""
    *qkv, grad_out, grad_lse = tensors
    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out, lse = reference.leap_attention(
        *qkv, leap, group_size=group_size, fold_div=fold_div, dropout_p=dropout_p, scale=scale, return_lse=True,
        seed=seed,
    )  # fmt: skip
    if grad_lse is None:
        return out, lse, *torch.autograd.grad(out, qkv, grad_out.to(dtype))
    return out, lse, *torch.autograd.grad([out, lse], qkv, [grad_out.to(dtype), grad_lse.to(lse.dtype)])


def run(tensors, *settings):
    """out, lse and gradients by the kernels; `settings` as the launchers take them, from `leap` on."""
    query, key, value, grad_out, grad_lse = tensors
    out, lse = leap_attention.forward(query, key, value, *settings)
    return out, lse, *leap_attention.backward(grad_out, grad_lse, query, key, value, out, lse, *settings)


def check(tensors, leap=1, group_size=2, fold_div=0, dropout_p=0.0, seed=None, scale=None):
    """The kernels are within budget, forward and backward; returns what they computed."""
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    settings = (leap, group_size, fold_div, dropout_p, seed, scale)
    actual = run(tensors, *settings)
    truth = formula(tensors, torch.float64, *settings)
    plain = formula(tensors, tensors[0].dtype, *settings)
    # The backward finds weights again as exp(s - lse), which the rounding of lse in float32 changes by its own
    # size; and ds = p * (dp - delta), which may be 0, is the difference of numbers as large as other gradients.
    intermediate = magnitude(*truth[2:]) * max(1.0, magnitude(truth[1]))
    for name, a, t, p in zip(("out", "lse", "dq", "dk", "dv"), actual, truth, plain, strict=True):
        assert_within_budget(a, t, p, name, intermediate if name.startswith("d") else 0.0)
    return actual


@pytest.mark.parametrize("fold_div", [0, 4], ids=["still", "shift"])
@pytest.mark.parametrize("head_dim", [1, 16, 33, 64, 72, 80, 96, 120, 128, 144, 256])
def test_head_dims(head_dim, fold_div, device):
    """Whole, split and masked columns, with an incomplete group."""
    check(inputs((1, 1, 3, 19, head_dim), device), leap=1, group_size=2, fold_div=fold_div)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_dtypes(dtype, head_dim, device):
    check(inputs((1, 2, 3, 23, head_dim), device, dtype), leap=2, fold_div=4)


@pytest.mark.parametrize(
    "num_tokens", sorted({1, 2, *(b + i for b in (BLOCK_Q, BLOCK_K, CPP_TILE) for i in (-1, 0, 1))})
)
def test_tile_edges(num_tokens, device):
    """Groups a token shorter or longer than a tile."""
    check(inputs((1, 1, 2, num_tokens, 16), device), group_size=1)


@pytest.mark.parametrize(
    ("num_frames", "leap", "group_size"),
    [(5, 1, 1), (5, 2, 2), (6, 2, 2), (7, 2, 3), (6, 3, 2), (5, 1, 5), (4, 7, 2), (4, 1, 9), (6, 5, 3), (1, 1, 1)],
)
def test_groups(num_frames, leap, group_size, device):
    """Whole, incomplete and single-frame groups; tiles that straddle several frames."""
    check(inputs((1, 2, num_frames, 7, 16), device), leap=leap, group_size=group_size, fold_div=4)


@pytest.mark.parametrize("fold_div", [1, 2, 3, 24, 25])
def test_fold_div(fold_div, device):
    """All channels shifted, a third, one, none: slices that overlap the end of the head dim are clipped."""
    check(inputs((2, 1, 4, 5, 24), device), leap=2, fold_div=fold_div)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-4, 5.0])
def test_scale(scale, device):
    check(inputs((1, 1, 4, 13, 16), device), leap=2, scale=scale)


def test_large_scores_do_not_overflow(device):
    query, key, *rest = inputs((1, 1, 2, 40, 16), device)
    check((query * 100, key * 100, *rest))


def test_gradient_of_out_only(device):
    check((*inputs((1, 1, 4, 13, 16), device)[:4], None), leap=2, fold_div=4)


@pytest.mark.parametrize("fold_div", [0, 4], ids=["still", "shift"])
@pytest.mark.parametrize("dropout_p", [0.2, 0.9, 1.0])
def test_dropout(dropout_p, fold_div, device):
    seed = torch.tensor([SEED], device=device)
    check(inputs((2, 2, 5, 11, 16), device), 2, fold_div=fold_div, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("seed", [0, -1, SEED])
def test_dropout_mask_is_that_of_the_reference(seed, device):
    """Bit by bit, forward and backward: with equal scores and unit vectors for values, out shows the mask."""
    B, H, T, N, D, dropout_p = 2, 2, 4, 16, 32, 0.3
    query = torch.zeros(B, H, T, N, D, device=device)
    units = torch.eye(2 * N, device=device).view(2, 1, N, D).expand(2, 2, N, D).flatten(0, 1)  # frames 0 1, 2 3
    units = units.expand(B, H, T, N, D)
    settings = (2, 2, 0, dropout_p, torch.tensor([seed], device=device), 1.0)
    out, _, _, _, dv = run((query, query, units, units, None), *settings)

    bh = torch.arange(B * H, device=device).view(B, H, 1, 1)
    tokens = torch.arange(T * N, device=device).view(T, N)
    for frames in reference.leap_groups(T, 2, 2):
        members = tokens[frames].flatten()
        keep = dropout_keep(settings[4], bh, members[:, None], members, dropout_p)
        assert torch.equal(out[:, :, frames].flatten(2, 3) > 0, keep)
        assert torch.equal(dv[:, :, frames].flatten(2, 3) > 0, keep.mT)


@pytest.mark.parametrize("layout", ["qkv", "heads first", "broadcast", "last axis", "frames backward"])
def test_strides(layout, device):
    """Inputs and output gradients as views; each means what its contiguous copy means."""
    B, H, T, N, D = shape = (2, 2, 4, 9, 16)
    query, key, value, grad_out, grad_lse = inputs(shape, device)
    if layout == "qkv":
        query, key, value = torch.randn(B, T, N, 3, H, D, device=device).permute(3, 0, 4, 1, 2, 5)
        grad_out = grad_out.movedim(1, 3).contiguous().movedim(3, 1)
        grad_lse = grad_lse.movedim(1, 3).contiguous().movedim(3, 1)
    elif layout == "heads first":
        query, key, value, grad_out = (
            x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value, grad_out)
        )
    elif layout == "broadcast":
        query, key = query[:, :1].expand(shape), key[:1, :, :1].expand(shape)
        grad_out, grad_lse = (
            torch.ones((), device=device).expand(shape),
            torch.ones((), device=device).expand(shape[:-1]),
        )
    elif layout == "last axis":
        query, value, grad_out = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, value, grad_out))
    else:
        query, key, grad_out = (torch.randn(B, H, T + 1, N, D + 3, device=device)[:, :, 1:, :, 1:-2] for _ in range(3))
    check((query, key, value, grad_out, grad_lse), leap=2, fold_div=4)


def test_outputs_merge_heads_without_a_copy(device):
    out, lse, *grads = check(inputs((2, 3, 2, 5, 16), device))
    for x in (out, *grads):
        assert x.movedim(1, -2).flatten(-2).data_ptr() == x.data_ptr()
    assert lse.is_contiguous()


@pytest.mark.parametrize("fold_div", [0, 1, 2, 4, 25])
def test_every_element_is_written(fold_div, device):
    """What torch.empty returns is NaN here, and none of it is left."""
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        assert torch.empty(1, device=device).isnan().all()
        assert torch.empty_like(torch.ones(1, device=device)).isnan().all()
        actual = check(inputs((1, 2, 5, 7, 24), device), leap=2, fold_div=fold_div)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in actual)


@pytest.mark.parametrize("axis", range(4), ids=["B", "H", "T", "N"])
def test_empty(axis, device):
    shape = [2, 2, 2, 2, 16]
    shape[axis] = 0
    for x, like in zip(run(inputs(shape, device), 1, 2, 4, 0.0, None, 1.0), [0, -1, 0, 0, 0], strict=True):
        assert list(x.shape) == (shape[:-1] if like else shape)


def test_twice_the_same_bits(device):
    tensors = inputs((1, 2, 3, 21, 24), device)
    settings = (1, 2, 4, 0.2, torch.tensor([SEED], device=device), 0.3)
    for first, second in zip(run(tensors, *settings), run(tensors, *settings), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize("axis", range(4), ids=["B", "H", "T", "N"])
def test_offsets_beyond_int32(axis):
    near = [x.contiguous() for x in inputs((2, 2, 2, 2, 16), "cpu")]
    check((*far_apart(near[:4], axis), near[4]), leap=1, fold_div=4)
