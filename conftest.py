"""What the examples in docstrings may use without importing it."""

from typing import Any

import pytest
import torch

import vattn


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace: dict[str, Any], request: pytest.FixtureRequest) -> None:
    doctest_namespace.update(torch=torch, vattn=vattn)
    if "distributed" in request.node.path.parts:
        from vattn.distributed._ranks import PaperRanks

        doctest_namespace["group"] = PaperRanks(rank=0, size=1)
    if request.node.path.name == "timm.py":
        reason = "timm needs torchvision, see `make test-timm`"
        doctest_namespace["timm"] = pytest.importorskip("timm", reason=reason, exc_type=ImportError)
