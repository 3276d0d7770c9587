"""What only leap attention has: groups of frames, and a shift of what it writes."""

import pytest

from tests.kernels.checks import check, check_jvp
from tests.operators.leap_attention import OPERATOR as LEAP


@pytest.mark.parametrize(
    ("num_frames", "leap", "group_size"),
    [(5, 1, 1), (5, 2, 2), (6, 2, 2), (7, 2, 3), (6, 3, 2), (5, 1, 5), (4, 7, 2), (4, 1, 9), (6, 5, 3), (1, 1, 1)],
)
def test_groups(num_frames, leap, group_size, backend):
    """Whole, incomplete and single-frame groups; tiles that straddle several frames."""
    check(backend, LEAP.make(backend.device, T=num_frames, N=7, leap=leap, group_size=group_size, fold_div=4))


@pytest.mark.parametrize("fold_div", [1, 2, 3, 24, 25])
def test_fold_div(fold_div, backend):
    """All channels shifted, a third, one, none: slices that overlap the end of the head dim are clipped."""
    check(backend, LEAP.make(backend.device, T=4, N=5, D=24, leap=2, fold_div=fold_div))


@pytest.mark.parametrize(("num_frames", "leap", "group_size"), [(5, 2, 2), (7, 2, 3), (4, 7, 2), (1, 1, 1)])
def test_tangents_of_groups(num_frames, leap, group_size, backend):
    sizes = {"T": num_frames, "N": 7, "leap": leap, "group_size": group_size, "fold_div": 4}
    check_jvp(backend, LEAP.make(backend.device, **sizes))


@pytest.mark.parametrize("fold_div", [1, 3, 25])
def test_the_shift_moves_tangents_as_the_output(fold_div, backend):
    check_jvp(backend, LEAP.make(backend.device, T=4, N=5, D=24, leap=2, fold_div=fold_div))
