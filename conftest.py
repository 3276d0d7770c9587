"""Triton's interpreter where there is no GPU, and what the examples in docstrings may use without importing it."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before vattn imports triton, whose decorators look

import vattn


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, vattn=vattn)
