"""The kernels of the nearest code, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64, and the kernels must find its index.
"""

import pytest
import torch

from vattn import reference
from vattn.kernels import configs, nearest_code

pytestmark = pytest.mark.gpu

BLOCK_Q, BLOCK_K = configs.INTERPRETER.BLOCK_Q, configs.INTERPRETER.BLOCK_K
CPP_TILE = 64  # csrc/cpu/flash.h


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check(x, codebook):
    """The kernels find what the reference finds in float64; returns it."""
    index = nearest_code.forward(x, codebook)
    truth = reference.nearest_code(x.double(), codebook.double())
    assert index.dtype == torch.int64 and index.is_contiguous()
    assert torch.equal(index, truth)
    return index


def vectors(shape, codes, device, dtype=torch.float32, at=0.0):
    """Random vectors and as many `codes`, around `at`."""
    codebook = torch.randn(codes, shape[-1], device=device) + at
    return (torch.randn(shape, device=device) + at).to(dtype), codebook.to(dtype)


@pytest.mark.parametrize("channels", [1, 3, 16, 33, 64, 200, 256, 257, 1024])
def test_channels(channels, device):
    check(*vectors((19, channels), 37, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, device):
    check(*vectors((70, 48), 90, device, dtype))


@pytest.mark.parametrize("count", sorted({1, 2, *(b + i for b in (BLOCK_Q, BLOCK_K, CPP_TILE) for i in (-1, 0, 1))}))
def test_tile_edges(count, device):
    """As many vectors, or codes, as a tile has, and one more or less."""
    check(*vectors((count, 16), 5, device))
    check(*vectors((5, 16), count, device))


def test_many_vectors(device):
    """More than an item of work, or a program, has."""
    check(*vectors((300, 2), 40, device))


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 4, 5, 8)], ids=str)
def test_shapes(shape, device):
    assert check(*vectors(shape, 10, device)).shape == shape[:-1]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 3, 8)], ids=str)
def test_no_vectors(shape, device):
    assert check(*vectors(shape, 10, device)).shape == shape[:-1]


def test_more_axes_than_kernels_take(device):
    x, codebook = vectors((2, 1, 3, 1, 1, 2, 1, 1, 1, 2, 4), 10, device)
    check(x.permute(*range(9, -1, -1), 10), codebook)


@pytest.mark.parametrize("layout", ["channels first", "slices", "broadcast", "codes by column"])
def test_strides(layout, device):
    """Views mean what their contiguous copies mean; convolutions leave channels before tokens."""
    x, codebook = vectors((2, 2, 5, 7, 24), 30, device)
    if layout == "channels first":
        x = torch.randn(2, 24, 2, 5, 7, device=device).movedim(1, -1)
    elif layout == "slices":
        x, codebook = torch.randn(2, 2, 6, 8, 48, device=device)[:, :, 1:, :-1, ::2], codebook[::2]
    elif layout == "broadcast":
        x = x[:, :1].expand(x.shape)
    else:
        codebook = codebook.T.contiguous().T
    check(x, codebook)


def test_ties_go_to_the_lowest_index(device):
    """Vectors and codes on a small lattice, many of them equal."""
    x = torch.randint(0, 3, (60, 4), device=device).float()
    codebook = torch.randint(0, 3, (40, 4), device=device).float()
    index = check(x, codebook)
    distances = (x[:, None] - codebook).square().sum(-1)
    equal = distances == distances.amin(1, keepdim=True)
    assert (equal.sum(1) > 1).any()
    assert torch.equal(index, equal.int().argmax(1))
    assert (check(x, torch.ones(40, 4, device=device)) == 0).all()


@pytest.mark.parametrize("at", [10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_far_from_zero(dtype, at, device):
    """|c|^2 - 2 x c in float32 has not a digit left of the distances."""
    check(*vectors((70, 32), 90, device, dtype, at))


def test_pairs_of_close_codes(device):
    """Their distances differ by less than the products of the vectors round to."""
    codebook = torch.randn(30, 16, device=device).repeat_interleave(2, 0) * 100
    codebook[1::2] += 1e-3 * torch.randn(30, 16, device=device)
    check(codebook + 1e-3 * torch.randn_like(codebook), codebook)


def test_nan(device):
    """A code that is NaN is nobody's nearest, and a vector that is NaN has the first one."""
    x, codebook = vectors((70, 8), 70, device)
    codebook[[0, 3, 69]] = torch.nan
    x[[2, 65]] = torch.nan
    index = check(x, codebook)
    assert (index[[2, 65]] == 0).all()
    assert not torch.isin(index[:2], torch.tensor([0, 3, 69], device=device)).any()


def test_infinities_give_an_index(device):
    x, codebook = vectors((70, 8), 70, device)
    x[5, 2], x[6, 3], codebook[7, 1] = torch.inf, -torch.inf, torch.inf
    index = nearest_code.forward(x, codebook)
    assert ((index >= 0) & (index < 70)).all()


def test_every_element_is_written(device):
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        assert (torch.empty(1, dtype=torch.int64, device=device) == torch.iinfo(torch.int64).max).all()
        check(*vectors((67, 24), 70, device))
    finally:
        torch.use_deterministic_algorithms(False)


def test_twice_the_same_bits(device):
    x, codebook = vectors((67, 24), 70, device)
    assert torch.equal(nearest_code.forward(x, codebook), nearest_code.forward(x, codebook))
