"""Sizes of the periodic shift that no other operator has."""

import pytest
import torch

from tests.kernels.checks import check
from tests.operators.periodic_shift import OPERATOR as SHIFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "fold_div"),
    [((2, 3, 4, 5, 64), 4), ((1, 2, 3, 7, 24), 1), ((1, 1, 2, 3, 5), 2), ((2, 1, 5, 1, 1), 1), ((1, 1, 1, 2, 8), 9),
     ((1, 2, 3, 2, 300), 3)],
)  # fmt: skip
def test_folds(shape, fold_div, dtype, backend):
    """From no channel to all, also transposed; one frame; more channels than a tile has."""
    sizes = dict(zip("BHTND", shape, strict=True))
    check(backend, SHIFT.make(backend.device, dtype, **sizes, fold_div=fold_div))
