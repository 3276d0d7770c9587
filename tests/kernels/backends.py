"""The backends whose kernels are under test: each has an operator's launchers, of the same names and arguments."""

import importlib
from typing import Any, NamedTuple, Protocol

import pytest
import torch

from vattn import _library

# What a backend has of one operator: forward, backward, jvp. One that is missing raises an AttributeError.
Launchers = Any


class Backend(Protocol):
    name: str

    @property
    def device(self) -> str:
        """Where its kernels run."""

    def launchers(self, operator: str) -> Launchers:
        """Those of `operator`; skips the test where this installation has none."""


class Triton:
    """Triton's kernels: on a GPU, or interpreted on the CPU where there is none."""

    name = "triton"

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def launchers(self, operator: str) -> Launchers:
        return importlib.import_module(f"vattn.kernels.{operator}")


class CppLaunchers(NamedTuple):
    """The C++ kernels of one operator, behind ``torch.ops``."""

    operator: str

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.vattn, self.operator if name == "forward" else f"{self.operator}_{name}")


class Cpp:
    """The compiled extension."""

    name, device = "cpp", "cpu"

    def launchers(self, operator: str) -> Launchers:
        if "cpu" not in _library.KERNEL_DEVICES:
            pytest.skip("the extension is not built")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{operator}", "CPU"):
            pytest.skip(f"the extension has no {operator}")
        return CppLaunchers(operator)


BACKENDS: dict[str, Backend] = {"triton": Triton(), "cpp": Cpp()}
