"""Formulas of our ops for PyTorch's counter of floating-point operations, registered when it is imported.

Nothing here imports it: it would bring Triton.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

COUNTER = "torch.utils.flop_counter"
_untold: dict[Any, Callable[..., int]] = {}


def register(op: Any, formula: Callable[..., int]) -> None:
    """The `formula` of an op (all its overloads), of its arguments: how many operations it takes."""
    _untold[op] = formula
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER])


def values(x: Tensor | None) -> Tensor | None:
    """`x` if it holds values, which fake tensors and those on "meta" do not."""
    return None if x is None or x.is_meta or type(x) is not Tensor else x


def keys_read(key_lengths: Tensor | None, batch: int, length: int) -> int:
    """How many keys all samples read, of `length` each."""
    lengths = values(key_lengths)
    return batch * length if lengths is None else int(lengths.clamp(0, length).sum())


def _tell(counter: types.ModuleType) -> None:
    for op, formula in _untold.items():
        counter.register_flop_formula(op, get_raw=True)(formula)
        for mode in _get_current_dispatch_mode_stack():  # what counts already has a copy of the formulas
            if hasattr(mode, "counter"):
                mode.counter.flop_registry[op] = counter.flop_registry[op]
    _untold.clear()


class _OnImport(importlib.abc.MetaPathFinder):
    """Runs the counter's own import, then registers the formulas."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # importlib.util.find_spec comes here, too, and imports nothing: this finder stays until the import.
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: types.ModuleType) -> None:
                execute(module)
                _tell(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _OnImport())
