"""Edge-sparse attention over ranks, against one process; and the plan of what is sent."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.distributed.processes import Found, SentBytes, World, results, run_cases
from tests.distributed.simulated import run_ranks
from tests.layouts import layout_of, layouts
from vattn import BlockLayout, RelativePositionBias3D, distributed
from vattn.distributed._edge_plan import make_plan

SIZES = (2, 3, 4)
EXACT = 1e-10


@dataclasses.dataclass
class Problem:
    """A call on all tokens, and the shards of its blocks."""

    layout: BlockLayout
    lengths: Sequence[int]
    window: tuple[int, int, int] | None = None
    positions: Tensor | None = None
    causal: bool = False
    dropout_p: float = 0.0
    grad: str = "full"
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        torch.manual_seed(self.layout.num_tokens)
        self.G, length = self.layout.num_global, self.layout.num_global + self.layout.num_tokens
        self.inputs = [torch.randn(2, 3, length, 8, dtype=self.dtype, requires_grad=True) for _ in range(3)]
        self.tangents = [torch.randn_like(x) for x in self.inputs]
        self.bias = None
        if self.window is not None:
            self.bias = RelativePositionBias3D(self.window, 3, self.G).to(self.dtype)
            torch.nn.init.normal_(self.bias.table)
        self.weights = torch.randn(len(self.lengths), 2, 3, length, 9, dtype=self.dtype)
        if self.grad == "full":
            self.weights[1:, :, :, : self.G] = 0
        for rank in range(len(self.lengths)):  # each for its own tokens
            begin, end = self.ends(rank)
            self.weights[rank, :, :, self.G : self.G + begin] = 0
            self.weights[rank, :, :, self.G + end :] = 0

    def ends(self, rank: int) -> tuple[int, int]:
        return sum(self.lengths[:rank]), sum(self.lengths[: rank + 1])

    def part(self, x: Tensor, rank: int) -> Tensor:
        """What a rank has of tokens, along the third axis."""
        begin, end = self.ends(rank)
        return torch.cat([x[:, :, : self.G], x[:, :, self.G + begin : self.G + end]], 2)

    def call(self, function: Any, inputs: Sequence[Tensor], bias: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
        """Out beside lse, and importance where there is a global token."""
        out, lse, *importance = function(
            *inputs, self.layout, position_bias=bias, positions=self.positions, causal=self.causal,
            dropout_p=self.dropout_p, return_lse=True, return_importance=self.G > 0, **more,
        )  # fmt: skip
        lse = torch.where(lse == -torch.inf, 7.0, lse)
        return torch.cat([out, lse[..., None]], -1), importance[0] if importance else None

    @functools.cached_property
    def truth(self) -> dict[str, Any]:
        torch.manual_seed(7)
        out, importance = self.call(vattn.edge_sparse_attention, self.inputs, self.bias)
        leaves = [*self.inputs, *([] if self.bias is None else [self.bias.table])]
        grads = torch.autograd.grad(out, leaves, self.weights.sum(0), materialize_grads=True)
        return {"out": out.detach(), "importance": importance, "grads": grads}

    def differences(self, rank: int, group: Any, add_up: Any, known: bool = False) -> dict[str, float]:
        """How far the results of a rank are from those of one process."""
        wanted = self.truth
        own = [self.part(x, rank).detach().requires_grad_() for x in self.inputs]
        bias = self.bias
        more = {"group": group, "grad": self.grad, "lengths": list(self.lengths) if known else None}
        torch.manual_seed(7 + rank)
        out, importance = self.call(distributed.edge_sparse_attention, own, bias, **more)
        leaves = [*own, *([] if bias is None else [bias.table])]
        weights = self.weights.sum(0) if self.grad == "full" else self.weights[rank]
        grads = list(torch.autograd.grad(out, leaves, self.part(weights, rank)))
        found = {"out": largest(out, self.part(wanted["out"], rank))}
        if importance is not None:
            begin, end = self.ends(rank)
            found["importance"] = largest(importance, wanted["importance"][:, begin:end])
        for i, (mine, whole) in enumerate(zip(grads, wanted["grads"], strict=True)):
            if self.grad == "partial":
                mine = add_up(mine) if i == 3 else torch.cat([add_up(mine[:, :, : self.G]), mine[:, :, self.G :]], 2)
            found[f"grad of {'query key value table'.split()[i]}"] = largest(
                mine, whole if i == 3 else self.part(whole, rank)
            )
        return found

    def difference_of_tangents(self, rank: int, group: Any) -> float:
        with forward_ad.dual_level():
            duals = list(map(forward_ad.make_dual, self.inputs, self.tangents))
            own = [forward_ad.make_dual(self.part(x, rank), self.part(t, rank)) for x, t in zip(self.inputs, self.tangents, strict=True)]
            torch.manual_seed(7)
            whole, _ = self.call(vattn.edge_sparse_attention, duals, self.bias)
            torch.manual_seed(7 + rank)
            mine, _ = self.call(distributed.edge_sparse_attention, own, self.bias, group=group, grad=self.grad)
            mine, whole = (forward_ad.unpack_dual(x).tangent for x in (mine, whole))
        return largest(mine, self.part(whole, rank))


def largest(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found - wanted).detach().abs().amax()) if found.numel() > 0 else 0.0


def shards(layout: BlockLayout, blocks: Sequence[int]) -> list[int]:
    """The tokens of each rank, of so many blocks each."""
    ends = [min(sum(blocks[: i + 1]) * layout.block_size, layout.num_tokens) for i in range(len(blocks))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layout = draw(layouts(heads=3, max_blocks=6, max_block_size=4), label="layout")
    size = draw(st.sampled_from(SIZES), label="ranks")
    cuts = sorted(draw(st.lists(st.integers(0, layout.num_blocks), min_size=size - 1, max_size=size - 1)))
    blocks = [b - a for a, b in zip([0, *cuts], [*cuts, layout.num_blocks], strict=True)]
    window = draw(st.sampled_from([None, (2, 3, 4)]), label="window")
    positions = None
    if draw(st.booleans(), label="positions"):
        shape = draw(st.sampled_from([(layout.num_tokens,), (2, layout.num_tokens)]))
        positions = torch.randint(24, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return Problem(
        layout, shards(layout, blocks), window, positions, causal=draw(st.booleans(), label="causal"),
        dropout_p=draw(st.sampled_from([0.0, 0.4]), label="dropout_p"),
        grad=draw(st.sampled_from(["full", "partial"]), label="grad"),
    )  # fmt: skip


@settings(max_examples=60)
@given(problems())
def test_ranks_find_what_one_process_finds(problem: Problem) -> None:
    assert problem.truth  # found before threads share torch's generator

    def one(ranks: Any) -> dict[str, float]:
        return problem.differences(ranks.rank, ranks, ranks.add_up)

    for found in run_ranks(len(problem.lengths), one):
        assert max(found.values()) < EXACT, found
