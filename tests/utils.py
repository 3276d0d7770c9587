"""What tests of operators share: how close is close enough, and a readable answer when it is not."""

import mmap

import torch
from torch import Tensor

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's; Python has its name from 3.13 on
BUDGET = 2  # how many times the error of the plain PyTorch formula a kernel may have


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    """No element is further than `tolerance` from `expected`; says which is worst, and how many are."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    # Equal infinities are equal; a NaN is infinitely wrong.
    error = torch.where(actual == expected, 0.0, (actual - expected).abs()).nan_to_num(nan=torch.inf)
    failing = error > tolerance
    if failing.any():
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: {actual[index]:.9g} at {index}, expected {expected[index]:.9g}, "
            f"which is {error[index]:.3g} away where {tolerance:.3g} is allowed; "
            f"so are {int(failing.sum())} of {failing.numel()} elements ({failing.double().mean():.2%})"
        )


def error_budget(truth: Tensor, formula: Tensor, intermediate: float = 0.0) -> float:
    """The error that a kernel may have: twice that of the plain `formula` in the same dtype, plus rounding.

    `truth` is the reference in float64. Rounding is one unit in the last place of the largest element for its
    dtype, and a few of float32, in which kernels accumulate in another order than the formula; the latter of
    `intermediate`, if the result is the difference of larger numbers.
    """
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach().cpu()
    error = torch.where(truth.isfinite(), formula.detach().cpu().double() - truth, 0.0)
    largest = magnitude(truth)
    float32_rounding = 4 * torch.finfo(torch.float32).eps * max(largest, intermediate)
    return BUDGET * magnitude(error) + torch.finfo(formula.dtype).eps * largest + float32_rounding


def magnitude(*tensors: Tensor) -> float:
    """The largest finite absolute value in `tensors`."""
    return max(float(x.detach().abs().nan_to_num(0, 0, 0).max()) for x in tensors if x.numel() > 0)


def assert_within_budget(
    actual: Tensor, truth: Tensor, formula: Tensor, name: str = "tensor", intermediate: float = 0.0
) -> None:
    """`actual` is as close to the float64 `truth` as :func:`error_budget` asks, and has the dtype of `formula`."""
    assert actual.dtype == formula.dtype, f"{name}: {actual.dtype}, expected {formula.dtype}"
    assert_close(actual, truth, error_budget(truth, formula, intermediate), name)


def far_apart(tensors: list[Tensor], axis: int) -> list[Tensor]:
    """Views equal to the float32 `tensors`, whose one step along `axis` is longer than 2**31 elements.

    They lie in memory that is mapped but, but for a few pages, not there.
    """
    memory = mmap.mmap(-1, 4 * (2**31 + 2**16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    storage = torch.frombuffer(memory, dtype=torch.float32)
    views = []
    for i, x in enumerate(tensors):
        strides = list(x.stride())
        strides[axis] = 2**31 + 64
        views.append(storage.as_strided(x.shape, strides, 4096 * i).copy_(x))
    return views
