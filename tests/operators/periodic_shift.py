"""The periodic shift: how the tests make its inputs and call it, and which sizes they try."""

import functools
from typing import Any

import torch
from hypothesis import strategies as st

import vattn
from tests.calls import Call, leaves
from tests.kernels.backends import Launchers
from tests.kernels.cases import Case, Draw, Operator, Sizes, Tensors
from tests.kernels.sizes import without
from vattn import reference


class PeriodicShift(Operator):
    """It is its own derivative, and its transpose is another setting of the same launcher."""

    name = "periodic_shift"
    results = ("out",)
    settings = ("fold_div", "transpose")
    exact = True

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, T: int = 4, N: int = 5,
        D: int = 24, fold_div: int = 3, transpose: bool = False,
    ) -> Case:  # fmt: skip
        x, grad = torch.randn(2, B, H, T, N, D, device=device).to(dtype)
        return Case(self, {"x": x}, {"out": grad}, {"fold_div": fold_div, "transpose": transpose})

    def backward(self, launchers: Launchers, case: Case, results: Tensors) -> Tensors:
        fold_div, transpose = self._settings(case)
        return {"x": launchers.forward(case.grads["out"], fold_div, not transpose)}

    def jvp(self, launchers: Launchers, case: Case, results: Tensors, tangents: Tensors) -> Tensors:
        return {"out": launchers.forward(tangents["x"], *self._settings(case))}

    def draw(self, draw: Draw) -> Sizes:
        sizes = {"B": (0, 3), "H": (1, 3), "T": (0, 6), "N": (0, 9), "D": (0, 70), "fold_div": (1, 80)}
        return {name: draw(st.integers(*ends), label=name) for name, ends in sizes.items()}

    def reference(self, tensors: Tensors, settings: Sizes, functions: Any = reference) -> Tensors:
        settings = {name: x for name, x in settings.items() if x}  # no public function has a transpose
        return {"out": functions.periodic_shift(tensors["x"], **settings)}


OPERATOR = PeriodicShift(
    narrow={"shift": {"T": 3, "N": 2}},
    cases={"shift": {"fold_div": 4}, "transpose": {"fold_div": 4, "transpose": True}},
    strided={"shift": {"B": 2, "H": 3, "fold_div": 4}},
    far={"B": 2, "H": 2, "T": 2, "N": 2},
    empty=without({"B": 2, "H": 2, "T": 2, "N": 2, "D": 8, "fold_div": 2}, "B", "H", "T", "N", "D"),
    axes=("B", "H", "T", "N"),
)


def call(dtype: torch.dtype) -> Call:
    return Call(functools.partial(vattn.periodic_shift, fold_div=3), leaves((1, 2, 4, 2, 6), dtype=dtype))
