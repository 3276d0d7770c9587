"""Latent attention: how the tests make its inputs and call it, and which sizes they try."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.calls import Call, leaves
from tests.kernels.attention import Attention, batch_heads, showing
from tests.kernels.cases import Case, Draw, Sizes
from tests.kernels.sizes import BLOCK_K, BLOCK_Q, CPP_TILE, LONG, WALK, around, without
from vattn.reference.dropout import dropout_keep


class LatentAttention(Attention):
    name = "latent_attention"
    scored = ("query", "keys[0]")
    settings = ("key_lengths", "dropout_p", "seed", "scale")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, queries: int = 2,
        keys: Sequence[int] = (2,), D: int = 16, key_lengths: Tensor | None = None, **common: Any,
    ) -> Case:  # fmt: skip
        shapes = {f"{name}[{i}]": (B, H, n, D) for name in ("keys", "values") for i, n in enumerate(keys)}
        shapes = {"query": (B, H, queries, D), **shapes}
        return self.random(device, dtype, shapes, key_lengths=key_lengths, **common)

    def draw(self, draw: Draw) -> Sizes:
        sizes = super().draw(draw) | {"queries": draw(st.integers(0, 300), label="queries")}
        keys = sizes["keys"] = draw(st.lists(st.integers(0, 300), min_size=1, max_size=4), label="keys")
        if len(keys) == 1 and draw(st.booleans(), label="with key_lengths"):
            of_samples = st.lists(st.integers(0, keys[0]), min_size=sizes["B"], max_size=sizes["B"])
            sizes["key_lengths"] = torch.tensor(draw(of_samples, label="key_lengths"), dtype=torch.int64)
        return sizes

    def show_dropout(self, device: str, seed: int, keys: Sequence[int] = (10, 0, 30)) -> tuple[Case, Tensor, Tensor]:
        """Keys count through the segments."""
        B, H, L, dropout_p = 2, 2, sum(keys), 0.3
        case = self.make(device, B=B, H=H, queries=L, keys=keys, D=L, dropout_p=dropout_p, seed=seed)
        units, tokens = torch.eye(L, device=device).expand(B, H, L, L), torch.arange(L, device=device)
        case = case.replace(**{f"values[{i}]": x for i, x in enumerate(units.split(keys, 2))})
        keep = dropout_keep(case.settings["seed"], batch_heads(B, H, device), tokens[:, None], tokens, dropout_p)
        return showing(case, units), keep, keep.mT


OPERATOR = LatentAttention(
    narrow={"keys": {"queries": 19, "keys": (37,)}},
    cases={"segments": {"queries": 19, "keys": (5, 30)}},
    paths={
        "an empty segment": {"queries": 20, "keys": (0, 37)},
        "no keys": {"queries": 20, "keys": (0,)},
        "few queries": {"queries": 3, "keys": (LONG,)},
        "few keys": {"queries": LONG // 2, "keys": (3,)},
        "one tile of keys": {"queries": WALK, "keys": (200, 9)},
    },
    lengths={f"{n} keys": {"queries": 3, "keys": (n,)} for n in around(BLOCK_Q, BLOCK_K, CPP_TILE)}
    | {f"{n} queries": {"queries": n, "keys": (3,)} for n in around(BLOCK_Q, BLOCK_K, CPP_TILE)},
    strided={"segments": {"B": 2, "H": 2, "queries": 9, "keys": (9, 28)}},
    far={"B": 2, "H": 2, "queries": 2, "keys": (2,)},
    empty=without({"B": 2, "H": 2, "queries": 3, "keys": (4, 0)}, "B", "H", "queries"),
)


def call(dtype: torch.dtype) -> Call:
    def latent(query: Tensor, *tensors: Tensor) -> Any:
        return vattn.latent_attention(query, tensors[:2], tensors[2:], return_lse=True)

    return Call(latent, leaves(*((1, 2, length, 6) for length in (3, 4, 2, 4, 2)), dtype=dtype))
