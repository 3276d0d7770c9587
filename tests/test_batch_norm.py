"""Batch norms of the models: PyTorch's, in whatever PyTorch runs them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vattn.models.batch_norm import BatchNorm2d, BatchNorm3d

KINDS = [pytest.param(BatchNorm2d, nn.BatchNorm2d, 2, id="2d"), pytest.param(BatchNorm3d, nn.BatchNorm3d, 3, id="3d")]


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("kind, expected, axes", KINDS)
def test_is_that_of_pytorch(kind: Any, expected: Any, axes: int, momentum: float | None) -> None:
    """With no momentum, too, which update_bn of torch.optim.swa_utils sets."""
    norms = kind(3), expected(3)
    for norm in norms:
        norm.momentum = momentum
    for step in range(3):
        x = torch.randn(2, 3, *[4] * axes, generator=torch.Generator().manual_seed(step))
        assert torch.equal(*(norm(x) for norm in norms))
    assert all(map(torch.equal, *(norm.state_dict().values() for norm in norms)))
    assert torch.equal(*(norm.eval()(x) for norm in norms))


def test_one_graph() -> None:
    norm, expected = BatchNorm2d(3), nn.BatchNorm2d(3)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for step in range(2):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(compiled(x), expected(x))
    torch.testing.assert_close(norm.state_dict(), expected.state_dict())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_second_run_moves_nothing(use_reentrant: bool) -> None:
    norm, expected, x = BatchNorm2d(3), nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    found: Any = checkpoint(norm, x, use_reentrant=use_reentrant)
    found.sin().sum().backward()
    expected(x)
    assert all(map(torch.equal, norm.state_dict().values(), expected.state_dict().values()))


def test_nothing() -> None:
    norm = BatchNorm2d(3)
    before = {name: x.clone() for name, x in norm.state_dict().items()}
    norm(torch.zeros(0, 3, 4, 4)).sum().backward()
    assert all(map(torch.equal, norm.state_dict().values(), before.values()))
    assert norm.weight.grad is not None and not norm.weight.grad.any()
