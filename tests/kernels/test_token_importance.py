"""The kernels of token importance, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64; the budget is twice the error of the reference in the kernel's own dtype.
"""

import pytest
import torch

from tests.utils import assert_within_budget, far_apart, magnitude
from vattn import RelativePositionBias3D, reference
from vattn.kernels import configs, token_importance

pytestmark = pytest.mark.gpu

BLOCK_Q, BLOCK_K = configs.INTERPRETER.BLOCK_Q, configs.INTERPRETER.BLOCK_K
LONG = 4 * configs.TILES_WORTH_A_SPLIT * BLOCK_K + 5  # four splits: see the tests of latent attention
WINDOW, TOKENS = (2, 3, 4), 24


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(queries, keys, device, B=1, H=1, D=16, dtype=torch.float32):
    """Random query and key."""
    return tuple(torch.randn(B, H, length, D, device=device).to(dtype) for length in (queries, keys))


def position_bias(num_global, heads, device):
    """A random table."""
    bias = RelativePositionBias3D(WINDOW, heads, num_global).to(device)
    bias.table.data.normal_()
    return bias


def check(query, key, bias=None, positions=None, key_lengths=None, scale=None):
    """The kernels are within budget; returns what they computed."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    table, window, num_global = (None, (), 0) if bias is None else (bias.table.detach(), bias.window, bias.num_global)
    actual = token_importance.forward(query, key, table, window, num_global, positions, key_lengths, scale)
    settings = {"position_bias": bias, "positions": positions, "key_lengths": key_lengths, "scale": scale}
    plain = reference.token_importance(query, key, **settings)
    if bias is not None:
        settings["position_bias"] = RelativePositionBias3D(window, bias.num_heads, num_global).to(table.device).double()
        settings["position_bias"].table.data.copy_(table)
    truth = reference.token_importance(query.double(), key.double(), **settings)
    # As in the backward of attention, exp(s - lse) carries the rounding of a score and of lse, which are larger.
    largest = magnitude(query.double() @ key.double().mT * scale, torch.ones(1))
    assert_within_budget(actual, truth, plain, "importance", largest * magnitude(truth, torch.zeros(1)))
    return actual


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [*((D, torch.float32) for D in (1, 64, 80, 256)), (64, torch.bfloat16), (80, torch.float16)],
    ids=str,
)
def test_head_dims(head_dim, dtype, device):
    check(*inputs(18, 37, device, B=2, H=2, D=head_dim, dtype=dtype))


@pytest.mark.parametrize("length", sorted({0, 1, *(b + i for b in (BLOCK_Q, BLOCK_K) for i in (-1, 0, 1))}))
def test_tile_edges(length, device):
    check(*inputs(3, length, device))
    check(*inputs(length, 3, device))


@pytest.mark.parametrize("num_global", [0, 1, BLOCK_Q + 1])
@pytest.mark.parametrize("kind", ["full", "shared", "of samples"])
def test_position_bias(kind, num_global, device):
    """Self-attention of global tokens and others, anywhere in the grid."""
    tokens = TOKENS if kind == "full" else 19
    x = inputs(num_global + tokens, num_global + tokens, device, B=2)
    positions = torch.stack([torch.randperm(TOKENS, device=device)[:tokens] for _ in range(2)])
    bias = position_bias(num_global, 1, device)
    check(*x, bias, {"full": None, "shared": positions[0], "of samples": positions}[kind])


@pytest.mark.parametrize("num_global", [None, 2], ids=["plain", "bias"])
def test_key_lengths(num_global, device):
    """What lies behind them gets nothing, and is not read."""
    bias = None if num_global is None else position_bias(num_global, 1, device)
    query, key = inputs(26, 26, device, B=4)
    lengths = torch.tensor([0, 1, 17, 26], device=device)
    importance = check(query, key, bias, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        assert (importance[b, length:] == 0).all()
        torch.testing.assert_close(importance[b].sum().cpu(), torch.tensor(float(length > 0)))
        key[b, :, length:] = torch.nan
    table, window, G = (None, (), 0) if bias is None else (bias.table.detach(), bias.window, bias.num_global)
    assert torch.equal(token_importance.forward(query, key, table, window, G, None, lengths, 0.25), importance)


@pytest.mark.parametrize(("queries", "keys"), [(3, LONG), (LONG, 3)], ids=str)
def test_splits(queries, keys, device):
    check(*inputs(queries, keys, device))


@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
@pytest.mark.parametrize("num_global", [None, 1], ids=["plain", "bias"])
def test_scale(num_global, scale, device):
    bias = None if num_global is None else position_bias(num_global, 1, device)
    check(*inputs(20, 20, device), bias, scale=scale)


def test_strides(device):
    query, key = torch.randn(2, 20, 2, 2, 16, device=device).permute(2, 0, 3, 1, 4)
    check(query, key)
    check(query.mT.contiguous().mT, key[:1].expand(2, 2, 20, 16))


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}, {"queries": 0}, {"keys": 0}], ids=str)
def test_empty(sizes, device):
    query, key = inputs(**{"queries": 3, "keys": 4, "device": device, **sizes})
    importance = token_importance.forward(query, key, None, (), 0, None, None, 1.0)
    assert importance.shape == (key.shape[0], key.shape[2]) and (importance == 0).all()


def test_twice_the_same_bits(device):
    """And every element is written: what torch.empty returns is NaN here."""
    x = inputs(9, LONG, device)
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        first, second = (token_importance.forward(*x, None, (), 0, None, None, 0.3) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second) and not first.isnan().any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize("axis", range(3), ids=["B", "H", "L"])
def test_offsets_beyond_int32(axis):
    check(*far_apart(list(inputs(2, 2, "cpu", B=2, H=2)), axis))
