"""The operators under test: those of ``vattn.ops`` whose module in tests/operators says how the kernels are called."""

import importlib
from collections.abc import Collection, Iterable

import pytest

from tests.kernels.cases import Operator
from vattn.ops import OPERATORS as NAMES

_modules = [importlib.import_module(f"tests.operators.{name}") for name in NAMES]
OPERATORS: list[Operator] = [module.OPERATOR for module in _modules if hasattr(module, "OPERATOR")]


def over(
    field: str, operators: Iterable[Operator] = OPERATORS, marks: Collection[pytest.MarkDecorator] = ()
) -> pytest.MarkDecorator:  # fmt: skip
    """Parametrize by the named sizes of `field` of `operators`."""
    return pytest.mark.parametrize(
        ("operator", "sizes"),
        [
            pytest.param(op, sizes, id=f"{op.name}-{name}", marks=marks)
            for op in operators
            for name, sizes in getattr(op, field).items()
        ],
    )
