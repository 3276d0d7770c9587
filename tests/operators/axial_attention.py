"""Axial attention: how the tests make its inputs and call it, and which sizes they try."""

import functools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.calls import Call, leaves
from tests.kernels.attention import Attention, batch_heads, showing
from tests.kernels.cases import Case, Draw, Sizes
from tests.kernels.sizes import BLOCK_K, BLOCK_Q, CPP_ROWS, CPP_TILE, around, without
from vattn.reference.dropout import dropout_keep


class AxialAttention(Attention):
    """A grid is (B, H, outer, line, inner, D), as the kernels see any."""

    name = "axial_attention"
    settings = ("dim", "dropout_p", "seed", "scale")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, outer: int = 1, line: int = 3,
        inner: int = 2, D: int = 16, **common: Any,
    ) -> Case:  # fmt: skip
        shapes = dict.fromkeys(("query", "key", "value"), (B, H, outer, line, inner, D))
        return self.random(device, dtype, shapes, dim=1, **common)

    def draw(self, draw: Draw) -> Sizes:
        grid = {
            name: draw(st.integers(0, most), label=name) for name, most in (("outer", 5), ("line", 40), ("inner", 5))
        }
        return super().draw(draw) | grid

    def show_dropout(self, device: str, seed: int, line: int = 4) -> tuple[Case, Tensor, Tensor]:
        """Tokens count through the grid in raster order."""
        H, outer, inner, dropout_p = 2, 2, 2, 0.3
        case = self.make(device, H=H, outer=outer, line=line, D=line, dropout_p=dropout_p, seed=seed)
        units = torch.eye(line, device=device)[:, None].expand_as(case.tensors["query"])
        tokens = torch.arange(outer * line * inner, device=device).view(outer, line, inner).transpose(1, 2)
        bh = batch_heads(1, H, device)[..., None, None]
        keep = dropout_keep(case.settings["seed"], bh, tokens[..., :, None], tokens[..., None, :], dropout_p)
        return showing(case.replace(value=units), units), keep.transpose(3, 4), keep.mT.transpose(3, 4)


SHORT_LINES = {"outer": 2, "line": 3, "inner": 3}  # several in a tile
LONG_LINES = {"outer": 1, "line": 20, "inner": 2}  # one in several tiles
OPERATOR = AxialAttention(
    narrow={"short lines": SHORT_LINES, "a long line": {"outer": 1, "line": BLOCK_Q + 5, "inner": 1}},
    cases={"short lines": SHORT_LINES, "long lines": LONG_LINES},
    lengths={
        f"lines of {n}": {"outer": 2, "line": n, "inner": 3} if n <= CPP_ROWS else {"outer": 1, "line": n, "inner": 2}
        for n in sorted({3, 5, 8, *around(CPP_ROWS, BLOCK_K, CPP_TILE)})
    },
    strided={"short lines": {"B": 2, "H": 2} | SHORT_LINES, "long lines": {"B": 2, "H": 2} | LONG_LINES},
    far={"B": 2, "H": 2, "outer": 2, "line": 2, "inner": 2},
    empty=without({"B": 2, "H": 2} | SHORT_LINES, "B", "H", "outer", "line", "inner"),
    axes=("B", "H", "outer", "line", "inner"),
)


def call(dtype: torch.dtype) -> Call:
    axial = functools.partial(vattn.axial_attention, dim=0, return_lse=True)
    return Call(axial, leaves(*[(1, 2, 3, 4, 6)] * 3, dtype=dtype))
