"""What only the nearest code has: vectors of any shape, ties, distances that cancel, and NaN."""

import dataclasses

import pytest
import torch

from tests.kernels.checks import check
from tests.operators.nearest_code import OPERATOR as CODES


def case_of(x, codebook):
    return dataclasses.replace(CODES.make(x.device), tensors={"x": x, "codebook": codebook})


def nearest(backend, x, codebook):
    """The kernels find what the reference finds in float64; returns it."""
    return check(backend, case_of(x, codebook))["index"]


def vectors(shape, codes, device, dtype=torch.float32, at=0.0):
    """Random vectors and as many `codes`, around `at`."""
    codebook = torch.randn(codes, shape[-1], device=device) + at
    return (torch.randn(shape, device=device) + at).to(dtype), codebook.to(dtype)


def test_many_vectors(backend):
    """More than an item of work, or a program, has."""
    nearest(backend, *vectors((300, 2), 40, backend.device))


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 4, 5, 8), (0, 8), (2, 0, 3, 8)], ids=str)
def test_shapes(shape, backend):
    assert nearest(backend, *vectors(shape, 10, backend.device)).shape == shape[:-1]


def test_more_axes_than_kernels_take(backend):
    x, codebook = vectors((2, 1, 3, 1, 1, 2, 1, 1, 1, 2, 4), 10, backend.device)
    nearest(backend, x.permute(*range(9, -1, -1), 10), codebook)


@pytest.mark.parametrize("layout", ["channels first", "slices", "broadcast", "codes by column"])
def test_strides_of_grids(layout, backend):
    """Convolutions leave channels before tokens."""
    device = backend.device
    x, codebook = vectors((2, 2, 5, 7, 24), 30, device)
    if layout == "channels first":
        x = torch.randn(2, 24, 2, 5, 7, device=device).movedim(1, -1)
    elif layout == "slices":
        x, codebook = torch.randn(2, 2, 6, 8, 48, device=device)[:, :, 1:, :-1, ::2], codebook[::2]
    elif layout == "broadcast":
        x = x[:, :1].expand(x.shape)
    else:
        codebook = codebook.T.contiguous().T
    nearest(backend, x, codebook)


def test_ties_go_to_the_lowest_index(backend):
    """Vectors and codes on a small lattice, many of them equal."""
    x = torch.randint(0, 3, (60, 4), device=backend.device).float()
    codebook = torch.randint(0, 3, (40, 4), device=backend.device).float()
    index = nearest(backend, x, codebook)
    distances = (x[:, None] - codebook).square().sum(-1)
    equal = distances == distances.amin(1, keepdim=True)
    assert (equal.sum(1) > 1).any()
    assert torch.equal(index, equal.int().argmax(1))
    assert (nearest(backend, x, torch.ones(40, 4, device=backend.device)) == 0).all()


@pytest.mark.parametrize("at", [10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_far_from_zero(dtype, at, backend):
    """|c|^2 - 2 x c in float32 has not a digit left of the distances."""
    nearest(backend, *vectors((70, 32), 90, backend.device, dtype, at))


def test_pairs_of_close_codes(backend):
    """Their distances differ by less than the products of the vectors round to."""
    codebook = torch.randn(30, 16, device=backend.device).repeat_interleave(2, 0) * 100
    codebook[1::2] += 1e-3 * torch.randn(30, 16, device=backend.device)
    nearest(backend, codebook + 1e-3 * torch.randn_like(codebook), codebook)


def test_nan(backend):
    """A code that is NaN is nobody's nearest, and a vector that is NaN has the first one."""
    x, codebook = vectors((70, 8), 70, backend.device)
    codebook[[0, 3, 69]] = torch.nan
    x[[2, 65]] = torch.nan
    index = nearest(backend, x, codebook)
    assert (index[[2, 65]] == 0).all()
    assert not torch.isin(index[:2], torch.tensor([0, 3, 69], device=backend.device)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinities(dtype, backend):
    """As NaN: such a code is nobody's nearest, and such a vector has the first one, or none is better."""
    x, codebook = vectors((70, 8), 70, backend.device, dtype)
    x[5, 2], x[6, 3], x[67] = torch.inf, -torch.inf, torch.inf
    codebook[7, 1], codebook[8], codebook[0, 0] = torch.inf, -torch.inf, torch.inf
    index = nearest(backend, x, codebook)
    assert (index[[5, 6, 67]] == 0).all()
    assert not torch.isin(index[:5], torch.tensor([0, 7, 8], device=backend.device)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_no_code_is_finite(value, backend):
    x, codebook = vectors((70, 8), 70, backend.device)
    assert (nearest(backend, x, torch.full_like(codebook, value)) == 0).all()
    assert (nearest(backend, torch.full_like(x, value), codebook) == 0).all()
