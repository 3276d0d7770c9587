"""Leap attention: how the tests make its inputs and call it, and which sizes they try."""

import functools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.calls import Call, leaves
from tests.kernels.attention import Attention, batch_heads, showing
from tests.kernels.cases import Case, Draw, Sizes, Tensors
from tests.kernels.sizes import BLOCK_K, BLOCK_Q, CPP_TILE, around, without
from tests.utils import magnitude
from vattn import reference
from vattn.reference.dropout import dropout_keep


class LeapAttention(Attention):
    name = "leap_attention"
    settings = ("leap", "group_size", "fold_div", "dropout_p", "seed", "scale")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, T: int = 3, N: int = 19,
        D: int = 16, leap: int = 1, group_size: int = 2, fold_div: int = 0, **common: Any,
    ) -> Case:  # fmt: skip
        shapes = dict.fromkeys(("query", "key", "value"), (B, H, T, N, D))
        return self.random(device, dtype, shapes, leap=leap, group_size=group_size, fold_div=fold_div, **common)

    def draw(self, draw: Draw) -> Sizes:
        sizes = super().draw(draw)
        T, N = draw(st.integers(0, 7), label="T"), draw(st.integers(0, 70), label="N")
        numbers = {name: draw(st.integers(1, T + 1), label=name) for name in ("leap", "group_size")}
        return {**sizes, "T": T, "N": N, **numbers, "fold_div": draw(st.integers(0, sizes["D"] + 1), label="fold_div")}

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        largest = magnitude(*gradients.values(), torch.zeros(1))
        return dict.fromkeys(gradients, largest * magnitude(truth["lse"], torch.ones(1)))

    def show_dropout(self, device: str, seed: int) -> tuple[Case, Tensor, Tensor]:
        B, H, T, N, D, dropout_p = 2, 2, 4, 16, 32, 0.3
        case = self.make(device, B=B, H=H, T=T, N=N, D=D, leap=2, dropout_p=dropout_p, seed=seed)
        # Two frames of 16 tokens have the 32 unit vectors: 0 1, 2 3, which groups 0 2, 1 3 see as 0 1, too.
        units = torch.eye(2 * N, device=device).view(2, 1, N, D).expand(2, 2, N, D).flatten(0, 1).expand(B, H, T, N, D)
        tokens = torch.arange(T * N, device=device).view(T, N)
        keep_out, keep_value = torch.zeros(2, B, H, T, N, D, dtype=torch.bool, device=device)
        for frames in reference.leap_groups(T, 2, 2):
            members = tokens[frames].flatten()
            keep = dropout_keep(case.settings["seed"], batch_heads(B, H, device), members[:, None], members, dropout_p)
            keep_out[:, :, frames], keep_value[:, :, frames] = (x.unflatten(2, (2, N)) for x in (keep, keep.mT))
        return showing(case.replace(value=units), units), keep_out, keep_value


OPERATOR = LeapAttention(
    narrow={"still": {"N": 17}, "shift": {"N": 7, "fold_div": 4}},  # groups of two frames and of one
    cases={"still": {"N": 19}, "shift": {"N": 11, "leap": 2, "fold_div": 4}},
    paths={
        "all channels shift": {"T": 5, "N": 7, "D": 24, "leap": 2, "fold_div": 1},
        "half of the channels shift each way": {"T": 5, "N": 7, "D": 24, "leap": 2, "fold_div": 2},
        "a fold of no channel": {"T": 5, "N": 7, "D": 24, "leap": 2, "fold_div": 25},
    },
    lengths={f"{n} tokens": {"T": 2, "N": n, "group_size": 1} for n in around(BLOCK_Q, BLOCK_K, CPP_TILE)},
    strided={"shift": {"B": 2, "H": 2, "N": 6, "leap": 2, "fold_div": 4}},
    far={"B": 2, "H": 2, "T": 2, "N": 2, "fold_div": 4},
    empty=without({"T": 2, "N": 2, "fold_div": 4}, "B", "H", "T", "N"),
    axes=("B", "H", "T", "N"),
)


def call(dtype: torch.dtype) -> Call:
    leap = functools.partial(vattn.leap_attention, leap=2, fold_div=3, return_lse=True)
    return Call(leap, leaves(*[(1, 2, 3, 2, 6)] * 3, dtype=dtype))
