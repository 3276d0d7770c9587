"""One set of tests for all kernels of an operator: Triton's launchers and the C++ behind ``torch.ops`` look alike."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

from vattn import _library

CPP = {
    name: SimpleNamespace(
        forward=getattr(torch.ops.vattn, name), backward=getattr(torch.ops.vattn, f"{name}_backward", None)
    )
    for name in (
        "axial_attention",
        "edge_sparse_attention",
        "latent_attention",
        "leap_attention",
        "merge_attention",
        "nearest_code",
        "node_sparse_attention",
        "periodic_shift",
        "token_importance",
    )
}


def operator(module: ModuleType) -> str | None:
    """The operator whose kernels `module` tests: it has imported them under the operator's name."""
    return next((name for name in CPP if module.__name__.endswith(f"test_{name}")), None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if operator(metafunc.module):
        metafunc.parametrize("kernels", ["triton", "cpp"], indirect=True)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels are under test; for C++ they take the place of Triton's in the module of the test."""
    which = getattr(request, "param", "triton")
    name = operator(request.module)
    if which == "cpp" and name:
        if "cpu" not in _library.KERNEL_DEVICES:
            pytest.skip("the extension is not built")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{name}", "CPU"):
            pytest.skip(f"the extension has no {name}")
        monkeypatch.setattr(request.module, name, CPP[name])
    return which


@pytest.fixture
def device(kernels: str) -> str:
    """Where the kernels under test run."""
    return "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"
