"""Edge-sparse attention: how the tests make its inputs and call it, and which sizes they try."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.calls import Call, leaves
from tests.kernels.attention import Attention, batch_heads, showing
from tests.kernels.backends import CppLaunchers, Launchers
from tests.kernels.cases import Case, Draw, Sizes, Tensors
from tests.kernels.sizes import BLOCK_K, BLOCK_Q, LONG_EDGES, around, without
from tests.layouts import bias_without_table, layout_of, layouts, random_order
from tests.utils import magnitude
from vattn import BlockLayout, reference
from vattn.position_bias import num_offsets
from vattn.reference.dropout import dropout_keep

WINDOW, TOKENS = (2, 3, 4), 24  # a grid of 24 tokens


class EdgeSparseAttention(Attention):
    name = "edge_sparse_attention"
    scored = ("query", "key", "table")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, rows: list[list[int]] | None = None,
        more: Sequence[list[list[int]]] = (), block_size: int = 5, B: int = 1, H: int = 1, G: int = 1, N: int = 4,
        D: int = 16, window: tuple[int, ...] = WINDOW, positions: Tensor | None = None, causal: bool = False,
        deterministic: bool = False, layout: BlockLayout | None = None, samples: int = 1,
        blocks: Sequence[int] | None = None, **common: Any,
    ) -> Case:  # fmt: skip
        """`rows` are what the blocks of all heads read, or those of the first and `more`, or all is in `layout`.

        Each of `samples` has as many of these lists. With `blocks` there is an order, of blocks of so many tokens. No
        window means no bias.
        """
        lists = [[[0]] if rows is None else rows, *more]
        if layout is None:
            order = None if blocks is None else random_order(blocks, block_size)
            flat = [row for rows in lists for row in rows]
            layout = layout_of(flat, N, block_size, G, len(lists) // samples, samples, order)
        G, N = layout.num_global, layout.num_tokens
        shapes = dict.fromkeys(("query", "key", "value"), (B, H, G + N, D))
        case = self.random(
            device, dtype, shapes, layout=layout.to(device), window=window, positions=positions, causal=causal,
            deterministic=deterministic, **common,
        )  # fmt: skip
        if not window:
            return case
        return case.replace(table=torch.randn(num_offsets(window) + 2 * G + G * G, H, device=device))

    def _call(self, case: Case) -> tuple[list[Tensor | None], list[Any]]:
        """The tensors but for the table, and the settings of forward and backward."""
        s, layout = case.settings, case.settings["layout"]
        transposed = layout.transpose()
        tensors: list[Tensor | None] = [*case.tensors.values(), None]
        *tensors, table = tensors[:4]
        return tensors, [
            layout.row_offsets, layout.columns, transposed.row_offsets, transposed.columns, layout.order,
            layout.block_size, layout.num_global, table, s["window"], s["positions"], s["causal"], s["dropout_p"],
            s["seed"], s["scale"],
        ]  # fmt: skip

    def forward(self, launchers: Launchers, case: Case) -> Tensors:
        tensors, settings = self._call(case)
        importance = case.settings["layout"].num_global > 0
        *results, seen = launchers.forward(*tensors, *settings, importance)
        assert importance or seen.shape == (0,)
        return dict(zip(self.results, results, strict=True)) | ({"importance": seen} if importance else {})

    def backward(self, launchers: Launchers, case: Case, results: Tensors) -> Tensors:
        tensors, settings = self._call(case)
        always = isinstance(launchers, CppLaunchers)  # deterministic
        *grads, table = launchers.backward(
            case.grads["out"], case.grads.get("lse"), *tensors, results["out"], results["lse"], *settings, False,
            **({} if always else {"deterministic": case.settings["deterministic"]}),
        )  # fmt: skip
        if "table" in case.tensors:
            grads.append(table)
        else:
            assert table.shape == (0,)
        return dict(zip(case.tensors, grads, strict=True))

    def jvp(self, launchers: Launchers, case: Case, results: Tensors, tangents: Tensors) -> Tensors:
        s, layout = case.settings, case.settings["layout"]
        of_inputs, inputs = ([x[name] for name in ("query", "key", "value")] for x in (tangents, case.tensors))
        found = launchers.jvp(
            *of_inputs, tangents.get("table"), *inputs, results["out"], results["lse"],
            layout.row_offsets, layout.columns, None, None, layout.order, layout.block_size, layout.num_global,
            case.tensors.get("table"), s["window"], s["positions"], s["causal"], s["dropout_p"], s["seed"], s["scale"],
            False,
        )  # fmt: skip
        return dict(zip(self.results, found, strict=True))

    def draw(self, draw: Draw) -> Sizes:
        sizes = super().draw(draw)
        largest = draw(st.sampled_from([3, 20, 70]), label="largest")
        layout = draw(
            layouts(sizes["H"], max_block_size=largest, samples=max(sizes["B"], 1), orders=True), label="layout"
        )
        B, N = sizes["B"], layout.num_tokens
        sizes |= {"layout": layout, "causal": draw(st.booleans(), label="causal")}
        window = draw(st.sampled_from([(), (), (1, 1, 1), (2, 3, 5), (8, 7, 9)]), label="window")
        shape = draw(st.sampled_from([(N,), (B, N), None]), label="shape of positions") if window else None
        if shape is not None:
            sizes["positions"] = torch.randint(0, math.prod(window), shape)
        return sizes | {"window": window if shape is not None or math.prod(window) >= N else ()}

    def reference(self, tensors: Tensors, settings: Sizes, functions: Any = reference) -> Tensors:
        names: tuple[str, ...] = ("layout", "positions", "causal", "dropout_p", "scale", "seed")
        taken = {name: settings[name] for name in names if name in settings}
        if "table" in tensors:
            heads, num_global = tensors["query"].shape[1], settings["layout"].num_global
            bias = taken["position_bias"] = bias_without_table(settings["window"], max(heads, 1), num_global)
            bias.table = tensors["table"]  # type: ignore[assignment]
        names = (*self.results, "importance") if settings["layout"].num_global > 0 else self.results
        found = functions.edge_sparse_attention(
            tensors["query"], tensors["key"], tensors["value"], **taken, return_lse=True,
            return_importance="importance" in names,
        )  # fmt: skip
        return dict(zip(names, found, strict=True))

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        # Importance, too, is exp(s - lse) of a rounded lse. A row of the table sums as many terms as it has pairs, of
        # both signs.
        found = super().intermediate(case, truth, gradients)
        if "dtable" in found:
            rounded = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 4  # of the out in delta
            factor = max(magnitude(truth["lse"], torch.ones(1)), rounded)
            found["dtable"] = max(found["dtable"], factor * magnitude(self.absolute_terms(case), torch.zeros(1)))
        return {"importance": magnitude(truth["lse"], torch.ones(1)), **found}

    def absolute_terms(self, case: Case) -> Tensor:
        """For each row of the table, the sum of p (|dout . value| + |dout . out| + 1) over its pairs of tokens."""
        tensors, layout = {name: x.detach().double() for name, x in case.tensors.items()}, case.settings["layout"]
        table = tensors.pop("table").requires_grad_()
        bias = bias_without_table(case.settings["window"], max(table.shape[1], 1), layout.num_global)
        bias.table = table  # type: ignore[assignment]
        positions = case.settings["positions"]
        dense = bias(torch.arange(layout.num_tokens) if positions is None else positions)
        dense = dense.expand(*tensors["query"].shape[:2], -1, -1)
        leaf = dense.detach().requires_grad_()
        taken: dict[str, Any] = {name: case.settings[name] for name in ("layout", "causal", "scale")}
        taken["position_bias"] = lambda _: leaf
        _, lse = reference.edge_sparse_attention(
            tensors["query"], tensors["key"], tensors["value"], **taken, return_lse=True
        )  # fmt: skip
        (p,) = torch.autograd.grad(lse, leaf, torch.ones_like(lse), materialize_grads=True)
        products = case.grads["out"].double().abs() @ tensors["value"].abs().mT
        terms = p * (products + (p * products).sum(-1, keepdim=True) + 1)
        return torch.autograd.grad(dense, table, terms)[0]

    def show_dropout(self, device: str, seed: int) -> tuple[Case, Tensor, Tensor]:
        """Tokens count from the first global one."""
        G, N, dropout_p = 2, 30, 0.3
        case = self.make(
            device, rows=[[0, 3], [2], [1, 0], [3]], block_size=8, N=N, G=G, H=2, D=G + N, window=(),
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
        units, tokens = torch.eye(G + N, device=device).expand(1, 2, -1, -1), torch.arange(G + N, device=device)
        keep = dropout_keep(case.settings["seed"], batch_heads(1, 2, device), tokens[:, None], tokens, dropout_p)
        keep &= case.settings["layout"].to_mask()
        return showing(case.replace(value=units), units), keep, keep.mT


def ring_of_blocks(block_size: int) -> Sizes:
    """Every block reads itself and the next one; the last one is short, or there is one and it is larger than all."""
    tokens = 6 if block_size == 1 else min(2 * block_size - 3, 35)
    blocks = -(-tokens // block_size)
    rows = [[i, (i + 1) % blocks] for i in range(blocks)]
    return {"rows": rows, "block_size": block_size, "N": tokens, "G": 2, "window": (5, 7, 1)}


OPERATOR = EdgeSparseAttention(
    narrow={"a block": {"rows": [[0, 0]], "block_size": 11, "N": 11}},
    cases={
        "bias": {"rows": [[0, 1], [1, 1]], "block_size": 7, "N": 13},
        "plain": {"rows": [[0, 1], [1]], "block_size": 7, "N": 13, "window": ()},
    },
    paths={
        "causal": {"rows": [[1, 0], [1]], "block_size": 7, "N": 13, "B": 2, "causal": True},
        "global tokens alone": {"rows": [[], []], "block_size": 7, "N": 13, "window": (1, 1, 13)},
        "samples": {"rows": [[1, 0], [1]], "more": [[[], [0]]], "samples": 2, "B": 2, "block_size": 7, "N": 13},
        "order": {"rows": [[2, 0, 3], [1, 1, 0], [0], [1, 3]], "blocks": [7, 3, 0, 3], "block_size": 7, "N": 13},
        "full blocks in an order": {"rows": [[1, 0], [1]], "blocks": [9, 9], "block_size": 9, "N": 18, "causal": True},
        "splits": {"rows": [[], []], "G": 2, "window": (1, 9, 29), "block_size": LONG_EDGES - 20, "N": LONG_EDGES - 2},
    },
    lengths={f"blocks of {size}": ring_of_blocks(size) for size in around(BLOCK_Q, BLOCK_K) if size != 2},
    strided={"bias": {"B": 2, "H": 2, "rows": [[0], [0]], "block_size": 5, "N": 8}},
    far={"B": 2, "H": 2, "rows": [[0]], "block_size": 2, "N": 1},
    empty=without({"rows": [[0]], "N": 4}, "B", "H") | {"no tokens": {"rows": [], "N": 0, "G": 0}},
    repeatable={"deterministic": True},
)


def call(dtype: torch.dtype) -> Call:
    layout = layout_of([[0, 2, 2], [], [1, 0]], num_tokens=5, block_size=2, num_global=1)
    bias = bias_without_table((1, 2, 3), num_heads=2)

    def edges(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
        bias.table = table  # type: ignore[assignment]
        return vattn.edge_sparse_attention(query, key, value, layout, position_bias=bias, return_lse=True)

    return Call(edges, leaves((1, 2, 6, 3), (1, 2, 6, 3), (1, 2, 6, 3), (18, 2), dtype=dtype))
