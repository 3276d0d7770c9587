"""Nothing forgets an operator: all that there is one of for each, for all that ``vattn.ops`` lists."""

import importlib.util
import inspect
import pathlib

import pytest
import torch

import vattn
from benchmarks import registry
from tests.kernels.test_kernel_report import KERNELS
from vattn import _library, info
from vattn._attention import Attention

ROOT = pathlib.Path(__file__).parents[1]


def test_the_list_is_that_of_the_public_functions():
    public = {name for name in vattn.__all__ if inspect.isfunction(getattr(vattn, name))}
    assert public == set(vattn.ops.OPERATORS) == set(vattn.ops.__all__)
    assert set(info.collect()["operators"]) == public


@pytest.mark.parametrize("op", vattn.ops.OPERATORS)
def test_every_operator_has(op):
    """A reference, an op, kernels, a docstring with an example, tests, and a place in the documents."""
    assert hasattr(vattn.reference, op)
    assert op in vattn.reference.__all__
    assert hasattr(torch.ops.vattn, op)
    assert "Example:" in (getattr(vattn, op).__doc__ or "")
    assert importlib.util.find_spec(f"vattn.ops.{op}")
    assert importlib.util.find_spec(f"vattn.reference.{op}")
    assert importlib.util.find_spec(f"vattn.kernels.{op}")
    assert _library._C is None or torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{op}", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{op}", "CUDA")
    tests = importlib.import_module(f"tests.operators.{op}")
    assert hasattr(tests, "call")
    assert hasattr(tests, "OPERATOR") or op == "select_tokens"  # which is CUDA C++, and has tests of its own
    assert f"\n## {op}\n" in (ROOT / "docs" / "operators.md").read_text()
    assert op in (ROOT / "README.md").read_text()
    assert op in (ROOT / "CHANGELOG.md").read_text()


def test_every_operator_is_measured():
    assert set(registry.operator_names()) == set(vattn.ops.OPERATORS)


def test_every_triton_kernel_is_compiled():
    attentions = {op for op, x in vattn.ops.OPERATORS.items() if isinstance(x, Attention) and x.pairs is not None}
    assert set(KERNELS) == attentions | {"token_importance"}
    report = importlib.util.find_spec("benchmarks.kernel_cases")
    assert report is not None and report.origin is not None
    text = pathlib.Path(report.origin).read_text()
    assert [op for op in vattn.ops.OPERATORS if f'    "{op}": Operator(' not in text] == ["select_tokens"]
