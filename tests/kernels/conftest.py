import pytest
import torch

from tests.kernels.backends import BACKENDS, Backend


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[pytest.param("triton", marks=pytest.mark.gpu), "cpp"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Whose kernels are under test. Of these, `-m gpu` runs Triton's."""
    return BACKENDS[request.param]
