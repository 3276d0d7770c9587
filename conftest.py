"""What the examples in docstrings may use without importing it."""

from typing import Any

import pytest
import torch

import vattn


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, vattn=vattn)
