"""The merge of attention over parts: how the tests make its inputs and call it, and which sizes they try."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.calls import Call, leaves
from tests.kernels.cases import Case, Draw, Operator, Sizes, Tensors, grouped
from tests.utils import magnitude
from vattn import reference
from vattn.kernels.merge_attention import MAX_PARTS


class MergeAttention(Operator):
    name = "merge_attention"
    results = ("out", "lse")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, count: int = 2, B: int = 1, H: int = 1,
        N: int = 5, D: int = 16, shape: tuple[int, ...] | None = None,
    ) -> Case:  # fmt: skip
        shape = (B, H, N) if shape is None else shape
        outs = {f"outs[{i}]": torch.randn(*shape, D, device=device).to(dtype) for i in range(count)}
        lses = {f"lses[{i}]": torch.randn(shape, device=device) * 3 for i in range(count)}
        grads = {"out": torch.randn_like(outs["outs[0]"]), "lse": torch.randn(shape, device=device)}
        return Case(self, outs | lses, grads, {})

    def draw(self, draw: Draw) -> Sizes:
        return {
            "count": draw(st.integers(1, 5), label="count"),
            "shape": tuple(draw(st.lists(st.integers(0, 6), max_size=4), label="shape")),
            "D": draw(st.integers(1, 256), label="D"),
        }

    def reference(self, tensors: Tensors, settings: Sizes, functions: Any = reference) -> Tensors:
        return dict(zip(self.results, functions.merge_attention(*grouped(tensors)), strict=True))

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        # A gradient of lse is w_i <g, out_i - out>: the difference of sums, one over the out that forward has rounded
        # to its dtype, by up to half a unit in the last place (the budget counts four of float32).
        rounded = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 8
        sums = magnitude((case.grads["out"].double() * truth["out"]).abs().sum(-1), torch.zeros(1))
        return {name: sums * max(1.0, rounded) for name in gradients if name.startswith("dlses")}

    def intermediate_of_tangents(self, case: Case, truth: Tensors, tangents: Tensors) -> dict[str, float]:
        # The tangent of out has sum_i w_i dlse_i out_i - dlse out, whose out has been rounded likewise.
        rounded = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 8
        parts = [x for name, x in case.tensors.items() if name.startswith("outs")]
        largest = magnitude(tangents["lse"], torch.zeros(1)) * magnitude(*parts, torch.zeros(1))
        return {"out": largest * max(1.0, rounded)}

    def lies_well(self, case: Case, name: str, x: Tensor) -> bool:
        """Out lies like the first part, a gradient like its part."""
        if "lse" in name:
            return x.is_contiguous()
        return x.stride() == torch.empty_like(case.tensors["outs[0]" if name == "out" else name]).stride()


OPERATOR = MergeAttention(
    narrow={"two parts": {"H": 3, "N": 7}},
    cases={f"{n} parts": {"count": n, "B": 2, "N": 7} for n in (1, 2, 3, 8)},
    paths={"more parts than one kernel takes": {"count": 2 * MAX_PARTS + 3, "H": 3, "N": 7}},
    lengths={
        "one row": {"shape": ()},
        "one number": {"shape": (1,), "D": 1},
        "wide rows": {"shape": (5,), "D": 256},
        "many rows": {"shape": (130,), "D": 64},
        "many axes": {"shape": (2, 3, 4, 5), "D": 24},
        "twelve axes": {"shape": (1, 2, 1, 1, 2, 1, 1, 1, 2, 1, 3), "D": 8},
    },
    strided={"two parts": {"B": 2, "H": 2, "N": 5}},
    far={"B": 2, "H": 2, "N": 2},
    empty={"no row": {"shape": (0,), "D": 8}, "no row of a head": {"shape": (2, 0), "D": 8}},
)


def call(dtype: torch.dtype) -> Call:
    def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return vattn.merge_attention(tensors[:2], tensors[2:])

    wide = torch.promote_types(dtype, torch.float32)
    return Call(merge, [*leaves(*[(2, 3, 5, 6)] * 2, dtype=dtype), *leaves(*[(2, 3, 5)] * 2, dtype=wide)])
