"""Node-sparse attention: how the tests make its inputs and call it, and which sizes they try."""

import functools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.calls import Call, leaves
from tests.kernels.attention import Attention, batch_heads, showing
from tests.kernels.cases import Case, Draw, Sizes
from tests.kernels.sizes import LONG, without
from vattn.reference.dropout import dropout_keep


class NodeSparseAttention(Attention):
    name = "node_sparse_attention"
    settings = ("kept", "kept_lengths", "dropout_p", "seed", "scale")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, queries: int = 2,
        keys: int = 2, count: int = 2, D: int = 16, duplicates: bool = False, kept_lengths: Tensor | None = None,
        **common: Any,
    ) -> Case:  # fmt: skip
        """Each sample keeps `count` of the keys, in any order; behind its length it lists anything."""
        kept = torch.rand(B, keys, device=device).argsort(1)[:, :count]
        if duplicates:
            kept = torch.randint(0, keys, (B, count), device=device)
        if kept_lengths is not None:
            kept_lengths = kept_lengths.to(device)
            behind = torch.arange(count, device=device) >= kept_lengths[:, None]
            kept = torch.where(behind, torch.randint(-(2**62), 2**62, (B, count), device=device), kept)
        shapes = {"query": (B, H, queries, D), **dict.fromkeys(("key", "value"), (B, H, keys, D))}
        return self.random(device, dtype, shapes, kept=kept, kept_lengths=kept_lengths, **common)

    def draw(self, draw: Draw) -> Sizes:
        names = (("queries", 200), ("keys", 300), ("count", 200))
        sizes = super().draw(draw) | {name: draw(st.integers(0, most), label=name) for name, most in names}
        sizes["duplicates"] = sizes["keys"] > 0 and draw(st.booleans(), label="duplicates")
        count = sizes["count"] = sizes["count"] if sizes["duplicates"] else min(sizes["count"], sizes["keys"])
        if draw(st.booleans(), label="with kept_lengths"):
            of_samples = st.lists(st.integers(0, count), min_size=sizes["B"], max_size=sizes["B"])
            sizes["kept_lengths"] = torch.tensor(draw(of_samples, label="kept_lengths"), dtype=torch.int64)
        return sizes

    def show_dropout(self, device: str, seed: int) -> tuple[Case, Tensor, Tensor]:
        """Keys count as they are numbered, not as they are listed."""
        B, H, L, dropout_p = 2, 2, 33, 0.3
        case = self.make(device, B=B, H=H, queries=L, keys=L, count=20, D=L, dropout_p=dropout_p, seed=seed)
        units, tokens = torch.eye(L, device=device).expand(B, H, L, L), torch.arange(L, device=device)
        keep = dropout_keep(case.settings["seed"], batch_heads(B, H, device), tokens[:, None], tokens, dropout_p)
        kept = case.settings["kept"][:, None, None]
        keep &= torch.zeros(B, 1, 1, L, dtype=torch.bool, device=device).scatter_(3, kept, True)
        return showing(case.replace(value=units), units), keep, keep.mT


FEW_QUERIES: Sizes = {"queries": 3, "keys": LONG + 10, "count": LONG}
FEW_KEYS: Sizes = {"queries": LONG // 2, "keys": 40, "count": 7, "duplicates": True}
OPERATOR = NodeSparseAttention(
    narrow={"kept": {"queries": 5, "keys": 30, "count": 11}},
    head_dims=(21, 64, 80, 256),
    cases={"duplicates": {"queries": 18, "keys": 40, "count": 33, "duplicates": True}},
    paths={
        "few queries": FEW_QUERIES,
        "few keys": FEW_KEYS,
        "one tile of keys": {"B": 2, "queries": 40, "keys": 300, "count": 201, "duplicates": True},
        "few queries of lengths": {**FEW_QUERIES, "B": 2, "kept_lengths": torch.tensor([LONG // 3, LONG])},
        "few keys of lengths": {**FEW_KEYS, "B": 3, "kept_lengths": torch.tensor([0, 3, 7])},
    },
    strided={"kept": {"B": 2, "H": 2, "queries": 20, "keys": 20, "count": 9}},
    far={"B": 2, "H": 2, "queries": 2, "keys": 2, "count": 2},
    empty=without({"queries": 3, "keys": 4, "count": 2}, "B", "H", "queries")
    | {"no keys": {"queries": 3, "keys": 0, "count": 0}},
)


def call(dtype: torch.dtype) -> Call:
    nodes = functools.partial(vattn.node_sparse_attention, kept=torch.tensor([[2, 0, 2], [3, 1, 0]]), return_lse=True)
    return Call(nodes, leaves((2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5), dtype=dtype))
