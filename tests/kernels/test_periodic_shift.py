"""The kernels of the periodic shift, called directly; they move numbers, so they must be exact."""

import pytest
import torch

from vattn import reference
from vattn.kernels import periodic_shift

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("transpose", [False, True], ids=["shift", "transpose"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "fold_div"),
    [((2, 3, 4, 5, 64), 4), ((1, 2, 3, 7, 24), 1), ((1, 1, 2, 3, 5), 2), ((2, 1, 5, 1, 1), 1), ((1, 1, 1, 2, 8), 9),
     ((1, 2, 3, 2, 300), 3)],
)  # fmt: skip
def test_equals_the_reference(shape, fold_div, dtype, transpose, device):
    x = torch.randn(shape, device=device).to(dtype)
    out = periodic_shift.forward(x, fold_div, transpose)
    assert torch.equal(out, reference.periodic_shift(x, fold_div, transpose))
    assert out.movedim(1, -2).flatten(-2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("transpose", [False, True], ids=["shift", "transpose"])
def test_every_element_is_written(transpose, device):
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    try:
        out = periodic_shift.forward(torch.randn(2, 3, 4, 5, 24, device=device), 3, transpose)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isfinite().all()


def test_strides(device):
    """Views of every kind: permuted, broadcast, backward in memory, the last axis not contiguous."""
    x = torch.randn(2, 3, 4, 5, 24, device=device)
    views = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, :1, :, :1].expand(x.shape),
        x.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.randn(2, 3, 5, 5, 27, device=device)[:, :, 1:, :, 1:-2],
    ]
    for view in views:
        assert torch.equal(periodic_shift.forward(view, 4, False), reference.periodic_shift(view, 4))


@pytest.mark.parametrize("axis", range(5), ids=["B", "H", "T", "N", "D"])
def test_empty(axis, device):
    shape = [2, 2, 2, 2, 8]
    shape[axis] = 0
    assert list(periodic_shift.forward(torch.empty(shape, device=device), 2, False).shape) == shape
