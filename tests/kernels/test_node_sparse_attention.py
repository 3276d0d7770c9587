"""The kernels of node-sparse attention, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64; the budget is twice the error of the reference in the kernel's own dtype. Triton's
kernels are those of latent attention, whose tests try the rest.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.utils import assert_within_budget, far_apart, magnitude
from vattn import reference
from vattn.kernels import configs, node_sparse_attention
from vattn.reference.dropout import dropout_keep

pytestmark = pytest.mark.gpu

SEED = 0x123456789ABCDEF
BLOCK_K = configs.INTERPRETER.BLOCK_K
LONG = 4 * configs.TILES_WORTH_A_SPLIT * BLOCK_K + 5  # four splits: see the tests of latent attention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    kept: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


def inputs(queries, keys, count, device, B=1, H=1, D=16, dtype=torch.float32, duplicates=False):
    """Random tensors, of whose `keys` keys each sample keeps `count`, in any order."""
    query, grad_out = (torch.randn(B, H, queries, D, device=device).to(dtype) for _ in range(2))
    key, value = (torch.randn(B, H, keys, D, device=device).to(dtype) for _ in range(2))
    kept = torch.rand(B, keys, device=device).argsort(1)[:, :count]
    if duplicates:
        kept = torch.randint(0, keys, (B, count), device=device)
    return Inputs(query, key, value, kept, grad_out, torch.randn(B, H, queries, device=device))


def formula(x, dtype, dropout_p, seed, scale):
    """out, lse and gradients by the reference in `dtype`."""
    tensors = [y.detach().to(dtype).requires_grad_() for y in x[:3]]
    out, lse = reference.node_sparse_attention(
        *tensors, x.kept, dropout_p=dropout_p, scale=scale, return_lse=True, seed=seed
    )
    results, grads = [out], [x.grad_out.to(dtype)]
    if x.grad_lse is not None:
        results, grads = [out, lse], [*grads, x.grad_lse.to(lse.dtype)]
    return out, lse, *torch.autograd.grad(results, tensors, grads, materialize_grads=True)


def run(x, dropout_p=0.0, seed=None, scale=0.3):
    """out, lse and gradients by the kernels."""
    out, lse = node_sparse_attention.forward(*x[:4], dropout_p, seed, scale)
    grads = node_sparse_attention.backward(x.grad_out, x.grad_lse, *x[:3], out, lse, x.kept, dropout_p, seed, scale)
    return out, lse, *grads


def check(x, dropout_p=0.0, seed=None, scale=None):
    """The kernels are within budget, forward and backward; returns what they computed."""
    scale = x.query.shape[-1] ** -0.5 if scale is None else scale
    actual = run(x, dropout_p, seed, scale)
    truth, plain = (formula(x, dtype, dropout_p, seed, scale) for dtype in (torch.float64, x.query.dtype))
    rounded = torch.finfo(x.query.dtype).eps / torch.finfo(torch.float32).eps / 4  # as for latent attention
    intermediate = magnitude(*truth[2:]) * max(1.0, magnitude(truth[1]), rounded) if x.query.numel() else 0.0
    for name, a, t, p in zip(("out", "lse", "dq", "dk", "dv"), actual, truth, plain, strict=True):
        assert_within_budget(a, t, p, name, intermediate if name.startswith("d") else 0.0)
    return actual


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [*((D, torch.float32) for D in (21, 64, 80, 256)), (64, torch.bfloat16), (80, torch.float16)],
    ids=str,
)
def test_head_dims(head_dim, dtype, device):
    check(inputs(5, 30, 11, device, H=2, D=head_dim, dtype=dtype))


@pytest.mark.parametrize("count", [0, 1, BLOCK_K - 1, BLOCK_K, BLOCK_K + 1, 70])
def test_counts(count, device):
    """None, some and all of the keys; those that were not kept have a gradient of 0."""
    x = inputs(5, 70, count, device, B=2)
    *_, dk, dv = check(x)
    kept = torch.zeros(2, 70, dtype=torch.bool, device=device).scatter_(1, x.kept, True)
    for grad in (dk, dv):
        assert torch.equal((grad[:, 0] != 0).any(-1), kept)


@pytest.mark.parametrize("queries", [3, LONG // 2], ids=["few queries", "split queries"])
def test_duplicates(queries, device):
    """A key that is listed three times counts three times, and has three times the gradient."""
    x = inputs(queries, 9, 20, device, B=2, duplicates=True)
    x.kept[0, 3] = x.kept[0, 11] = x.kept[0, 19]
    check(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits(dtype, device):
    """Of many keys over few queries, and of many queries over few keys."""
    check(inputs(3, LONG + 10, LONG, device, dtype=dtype))
    check(inputs(LONG // 2, 40, 7, device, dtype=dtype))


def test_one_tile(device):
    """As many listed keys as stay on chip."""
    x = inputs(40, 300, 201, device, B=2, H=2, duplicates=True)
    check(x)
    check(x, 0.3, torch.tensor([SEED], device=device))


@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
def test_dropout(dropout_p, device):
    x = inputs(18, 40, 33, device, B=2, H=2, duplicates=True)
    check(x, dropout_p, torch.tensor([SEED], device=device))


def test_dropout_mask_is_that_of_the_reference(device):
    """Bit by bit: keys count as they are numbered, not as they are listed."""
    B, H, L, dropout_p = 2, 2, 33, 0.3
    units = torch.eye(L, device=device).expand(B, H, L, L)
    kept = torch.rand(B, L, device=device).argsort(1)[:, :20]
    x = Inputs(torch.zeros_like(units), torch.zeros_like(units), units, kept, units, None)
    seed = torch.tensor([SEED], device=device)
    out, _, _, _, dv = run(x, dropout_p, seed)
    bh, tokens = torch.arange(B * H, device=device).view(B, H, 1, 1), torch.arange(L, device=device)
    keep = dropout_keep(seed, bh, tokens[:, None], tokens, dropout_p)
    keep &= torch.zeros(B, 1, 1, L, dtype=torch.bool, device=device).scatter_(3, kept[:, None, None], True)
    assert torch.equal(out > 0, keep)
    assert torch.equal(dv > 0, keep.mT)


@pytest.mark.parametrize("layout", ["qkv", "last axis", "kept"])
def test_strides(layout, device):
    B, H, L, D = (2, 2, 20, 16)
    x = inputs(L, L, 9, device, B, H, D)
    if layout == "qkv":
        query, key, value = torch.randn(B, L, 3, H, D, device=device).permute(2, 0, 3, 1, 4)
        x = x._replace(query=query, key=key, value=value)
    elif layout == "last axis":
        x = x._replace(**{name: getattr(x, name).mT.contiguous().mT for name in ("query", "key", "value", "grad_out")})
    else:
        x = x._replace(kept=x.kept.T.contiguous().T)
    check(x)


@pytest.mark.parametrize(("queries", "keys", "count"), [(7, 40, 33), (3, LONG, LONG), (LONG // 2, 20, 3)], ids=str)
def test_twice_the_same_bits(queries, keys, count, device):
    """And every element is written: what torch.empty returns is NaN here."""
    x = inputs(queries, keys, count, device, duplicates=True)
    settings = (0.2, torch.tensor([SEED], device=device))
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        first, second = run(x, *settings), run(x, *settings)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}, {"queries": 0}, {"keys": 0, "count": 0}], ids=str)
def test_empty(sizes, device):
    """Keys that nobody reads have a gradient of 0."""
    x = inputs(**{"queries": 3, "keys": 4, "count": 2, "device": device, **sizes})
    out, lse, dq, dk, dv = run(x)
    assert out.shape == dq.shape == x.query.shape and lse.shape == x.query.shape[:-1]
    assert dk.shape == dv.shape == x.key.shape and (dk == 0).all() and (dv == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize("axis", range(3), ids=["B", "H", "L"])
def test_offsets_beyond_int32(axis):
    x = inputs(2, 2, 2, "cpu", B=2, H=2)
    query, key, value, grad_out = far_apart([x.query, x.key, x.value, x.grad_out], axis)
    check(x._replace(query=query, key=key, value=value, grad_out=grad_out))
