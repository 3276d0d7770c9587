"""The nearest code: how the tests make its inputs and call it, and which sizes they try."""

from typing import Any

import torch
from hypothesis import strategies as st

import vattn
from tests.calls import Call, leaves
from tests.kernels.cases import Case, Draw, Operator, Sizes, Tensors
from tests.kernels.sizes import BLOCK_K, BLOCK_Q, CPP_TILE, around, one_long, without
from vattn import reference


class NearestCode(Operator):
    """The kernels must find the index that the reference finds in float64."""

    name = "nearest_code"
    results = ("index",)
    differentiable = False
    exact = True

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, D: int = 16, codes: int = 10
    ) -> Case:  # fmt: skip
        x, codebook = torch.randn(B, H, D, device=device), torch.randn(codes, D, device=device)
        return Case(self, {"x": x.to(dtype), "codebook": codebook.to(dtype)}, {}, {})

    def draw(self, draw: Draw) -> Sizes:
        sizes = {"B": (0, 200), "H": (1, 3), "D": (1, 300), "codes": (1, 200)}
        return {name: draw(st.integers(*ends), label=name) for name, ends in sizes.items()}

    def reference(self, tensors: Tensors, settings: Sizes, functions: Any = reference) -> Tensors:
        return {"index": functions.nearest_code(*tensors.values())}


OPERATOR = NearestCode(
    narrow={"codes": {"B": 19, "codes": 37}},
    head_dims=(1, 3, 16, 33, 64, 200, 256, 257, 1024),
    cases={"codes": {"B": 67, "D": 24, "codes": 70}},
    lengths=one_long("B", "codes", around(BLOCK_Q, BLOCK_K, CPP_TILE), 5),
    strided={"codes": {"B": 2, "H": 35, "D": 24, "codes": 30}},
    far={"B": 2, "H": 2},
    empty=without({"D": 8}, "B", "H"),
    axes=("B", "H"),
)


def call(dtype: torch.dtype) -> Call:
    return Call(vattn.nearest_code, leaves((2, 5, 6), (7, 6), dtype=dtype))
