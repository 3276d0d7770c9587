"""Token importance: how the tests make its inputs and call it, and which sizes they try."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.calls import Call, leaves
from tests.kernels.attention import HEAD_DIMS
from tests.kernels.cases import Case, Draw, Operator, Sizes, Tensors
from tests.kernels.sizes import BLOCK_K, BLOCK_Q, LONG, around, one_long, without
from tests.layouts import bias_without_table
from tests.utils import magnitude
from vattn import reference
from vattn.position_bias import num_offsets


class TokenImportance(Operator):
    name = "token_importance"
    results = ("importance",)
    settings = ("table", "window", "num_global", "positions", "key_lengths", "lse", "scale")
    differentiable = False

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, queries: int = 2,
        keys: int = 2, D: int = 16, G: int = 0, window: tuple[int, ...] = (), positions: Tensor | None = None,
        key_lengths: Tensor | None = None, lse: Tensor | None = None, scale: float | None = None,
    ) -> Case:  # fmt: skip
        query, key = (torch.randn(B, H, length, D, device=device).to(dtype) for length in (queries, keys))
        table = torch.randn(num_offsets(window) + 2 * G + G * G, H, device=device) if window else None
        scale = D**-0.5 if scale is None else scale
        settings: dict[str, Any] = {"table": table, "window": window, "num_global": G, "positions": positions}
        settings |= {"key_lengths": key_lengths, "lse": lse, "scale": scale}
        return Case(self, {"query": query, "key": key}, {}, settings)

    def draw(self, draw: Draw) -> Sizes:
        limits = {"B": (0, 3), "H": (1, 3), "queries": (0, 150), "keys": (0, 150)}
        sizes = {name: draw(st.integers(*ends), label=name) for name, ends in limits.items()}
        sizes |= {"D": draw(st.sampled_from(HEAD_DIMS), label="D"), "scale": draw(st.sampled_from([None, 0.0, -0.3]))}
        if draw(st.booleans(), label="with a bias"):
            sizes |= {"window": (3, 7, 8), "G": draw(st.integers(0, 2), label="G")}
            sizes["queries"] = sizes["keys"] = max(sizes["queries"], sizes["G"])
            if draw(st.booleans(), label="with positions"):
                sizes["positions"] = torch.randint(0, 168, (sizes["B"], sizes["keys"] - sizes["G"]))
        if draw(st.booleans(), label="with key_lengths"):
            sizes["key_lengths"] = torch.randint(0, sizes["keys"] + 1, (sizes["B"],))
        if draw(st.booleans(), label="with lse"):
            sizes["lse"] = 6 + torch.randn(sizes["B"], sizes["H"], sizes["queries"])
        return sizes

    def reference(self, tensors: Tensors, settings: Sizes, functions: Any = reference) -> Tensors:
        taken = {name: settings[name] for name in ("positions", "key_lengths", "lse", "scale")}
        if settings["window"]:
            heads = tensors["query"].shape[1]
            bias = taken["position_bias"] = bias_without_table(settings["window"], heads, settings["num_global"])
            bias.table = settings["table"].to(torch.promote_types(tensors["query"].dtype, torch.float32))
        return {"importance": functions.token_importance(*tensors.values(), **taken)}

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        # As in the backward of attention, exp(s - lse) carries the rounding of a score and of lse, which are larger.
        query, key = (x.double() for x in case.tensors.values())
        largest = magnitude(query @ key.mT * case.settings["scale"], torch.ones(1))
        return {"importance": largest * magnitude(truth["importance"], torch.zeros(1))}


OPERATOR = TokenImportance(
    narrow={"keys": {"B": 2, "H": 2, "queries": 18, "keys": 37}},
    head_dims=(1, 64, 80, 256),
    cases={"plain": {"queries": 20, "keys": 20}, "bias": {"queries": 20, "keys": 20, "G": 1, "window": (1, 1, 19)}},
    paths={"few queries": {"queries": 9, "keys": LONG}, "few keys": {"queries": LONG, "keys": 3}},
    lengths=one_long("keys", "queries", [0, *around(BLOCK_Q, BLOCK_K)], 3),
    strided={"plain": {"B": 2, "H": 2, "queries": 20, "keys": 20}},
    far={"B": 2, "H": 2, "queries": 2, "keys": 2},
    empty=without({"queries": 3, "keys": 4}, "B", "H", "queries", "keys"),
)


def call(dtype: torch.dtype) -> Call:
    return Call(vattn.token_importance, leaves((2, 2, 3, 5), (2, 2, 4, 5), dtype=dtype))
