"""How float32 matrices are multiplied where the hardware has no instruction for them.

A tf32 number has float32's exponent and ten bits of its mantissa. A float32 number is the sum of two of them, but for
rounding of its own size, and a product of two is three products of those: what the kernels ask of NVIDIA's hardware.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.utils import assert_within_budget, magnitude
from vattn import reference
from vattn.kernels import launch, leap_attention

DROPPED = 23 - 10  # bits of the mantissa


@pytest.fixture
def matmul_precision():
    """``torch.set_float32_matmul_precision``, undone after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def tf32(x: Tensor) -> Tensor:
    """`x` to the nearest tf32 number, away from zero where there are two."""
    return cut((x.contiguous().view(torch.int32) + (1 << (DROPPED - 1))).view(torch.float32))


def cut(x: Tensor) -> Tensor:
    """`x` without the bits that a tf32 number has no room for, as the hardware reads it."""
    return (x.contiguous().view(torch.int32) & -(1 << DROPPED)).view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two tf32 numbers whose sum is `x`, but for rounding."""
    return tf32(x), cut(x - tf32(x))


def one_product(a: Tensor, b: Tensor) -> Tensor:
    return tf32(a) @ tf32(b)


def three_products(a: Tensor, b: Tensor) -> Tensor:
    (a, rest_a), (b, rest_b) = split(a), split(b)
    return a @ b + (rest_a @ b + a @ rest_b)


def pairs_of_frames(
    query: Tensor, key: Tensor, value: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:  # fmt: skip
    """Leap attention at leap 1, group_size 2, with `multiply` for its products of matrices."""
    query, key, value = (x.unflatten(2, (-1, 2)).flatten(3, 4) for x in (query, key, value))  # (B, H, T/2, 2 N, D)
    scores = multiply(query * query.shape[-1] ** -0.5, key.mT)
    return multiply(scores.softmax(-1), value).unflatten(3, (2, -1)).flatten(2, 3)


def inputs(head_dim: int, device: str = "cpu", num_tokens: int = 197) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 1, 2, 4, num_tokens, head_dim, device=device)


def test_two_numbers_of_ten_bits_are_one_of_float32():
    x = inputs(64)
    near, rest = split(x)
    for part in (near, rest):
        assert torch.equal(tf32(part), part)
    torch.testing.assert_close(near, x, rtol=2.0**-11, atol=0.0)
    torch.testing.assert_close(near + rest, x, rtol=2.0**-21, atol=0.0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_three_products_are_within_the_budget_of_float32(head_dim):
    """And one is not: the tolerance of the tests can tell."""
    tensors = inputs(head_dim)
    truth = reference.leap_attention(*tensors.double(), leap=1)
    formula = reference.leap_attention(*tensors, leap=1)
    assert_within_budget(pairs_of_frames(*tensors, torch.matmul), truth, formula)
    assert_within_budget(pairs_of_frames(*tensors, three_products), truth, formula)
    with pytest.raises(AssertionError, match=r"which is .* away where .* is allowed"):
        assert_within_budget(pairs_of_frames(*tensors, one_product), truth, formula)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_kernels_are_within_the_budget_of_float32(head_dim, device, matmul_precision):
    """Whatever it is multiplied with, forward and backward."""
    matmul_precision("highest")
    tensors = inputs(head_dim, device, num_tokens=197 if device == "cuda" else 19)
    settings, grad_out = (1, 2, 0, 0.0, None, head_dim**-0.5), torch.randn_like(tensors[0])
    out, lse = leap_attention.forward(*tensors, *settings)
    actual = out, *leap_attention.backward(grad_out, None, *tensors, out, lse, *settings)

    def formula(dtype):
        qkv = [x.to(dtype).requires_grad_() for x in tensors]
        expected = reference.leap_attention(*qkv, leap=1)
        return expected, *torch.autograd.grad(expected, qkv, grad_out.to(dtype))

    truth, plain = formula(torch.float64), formula(torch.float32)
    intermediate = magnitude(*truth[1:], lse)
    for name, a, t, p in zip(("out", "dq", "dk", "dv"), actual, truth, plain, strict=True):
        assert_within_budget(a, t, p, name, intermediate if name.startswith("d") else 0.0)


@pytest.mark.parametrize(
    ("setting", "hip", "precision"),
    [("highest", None, "tf32x3"), ("high", None, "tf32"), ("highest", "6.4", "ieee"), ("high", "6.4", "tf32")],
    ids=["nvidia-highest", "nvidia-high", "amd-highest", "amd-high"],
)
def test_precision_is_that_of_torch(setting, hip, precision, matmul_precision, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    matmul_precision(setting)
    assert launch.precision() == precision


def test_precision_is_that_of_the_newer_setting():
    """Which PyTorch forbids to mix with the older one, so that asking that would raise."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert launch.precision() == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert launch.precision() == "tf32x3"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
