"""The attention operators under test: how to make inputs, and where one is not called like the others."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.kernels.backends import CppLaunchers, Launchers
from tests.kernels.cases import Case, Operator, Sizes, Tensors, grouped
from tests.layouts import bias_without_table, layout_of
from tests.utils import magnitude
from vattn import reference
from vattn.position_bias import num_offsets
from vattn.reference.dropout import dropout_keep

SEED = 0x123456789ABCDEF
WINDOW, TOKENS = (2, 3, 4), 24  # a grid of 24 tokens


class Attention(Operator):
    """Any of them: how it is made from the shapes of its tensors, of which the first is that of out."""

    results: ClassVar[tuple[str, ...]] = ("out", "lse")
    settings: ClassVar[tuple[str, ...]] = ("dropout_p", "seed", "scale")
    scored: ClassVar[tuple[str, ...]] = ("query", "key")  # scores grow with them

    def random(
        self, device: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], dropout_p: float = 0.0,
        seed: int = SEED, scale: float | None = None, **settings: Any,
    ) -> Case:  # fmt: skip
        tensors = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
        out = next(iter(tensors.values()))
        grads = {"out": torch.randn_like(out), "lse": torch.randn(out.shape[:-1], device=device)}
        settings |= {
            "dropout_p": dropout_p,
            "seed": torch.tensor([seed], device=device) if dropout_p > 0 else None,
            "scale": out.shape[-1] ** -0.5 if scale is None else scale,
        }
        return Case(self, tensors, grads, settings)

    def reference(self, tensors: Tensors, settings: Sizes) -> Tensors:
        function = getattr(reference, self.name)
        found = function(*grouped(tensors), **settings, return_lse=True)
        return dict(zip(self.results, found, strict=True))

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        # The backward finds weights again as exp(s - lse), which the rounding of lse in float32 changes by its own
        # size; ds = p * (dp - delta), which may be 0, is the difference of numbers as large as other gradients; and the
        # out in delta has been rounded, so that where they cancel half a unit in the last place of the terms is left.
        rounded = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 4
        largest = magnitude(*gradients.values(), torch.zeros(1))
        return dict.fromkeys(gradients, largest * max(magnitude(truth["lse"], torch.ones(1)), rounded))

    def intermediate_of_tangents(self, case: Case, truth: Tensors, tangents: Tensors) -> dict[str, float]:
        # As of gradients; in dout = p dv + (p * ds) v - dlse * out the last two may cancel but for the half unit in
        # the last place by which out has been rounded.
        rounded = torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps / 8
        exponent = magnitude(truth["lse"], torch.ones(1))
        of_lse = magnitude(tangents["lse"], torch.zeros(1))
        of_out = max(magnitude(tangents["out"], torch.zeros(1)), of_lse * magnitude(truth["out"], torch.ones(1)))
        return {"out": of_out * max(exponent, rounded), "lse": of_lse * exponent}

    def show_dropout(self, device: str, seed: int) -> tuple[Case, Tensor, Tensor]:
        """A case with equal scores and unit vectors for values, and where out and the gradient of value are not 0."""
        raise NotImplementedError


def showing(case: Case, units: Tensor) -> Case:
    """`case` with equal scores, and with the gradient `units` of out."""
    zeros = {name: torch.zeros_like(x) for name, x in case.tensors.items() if name.split("[")[0] != "values"}
    zeros.pop("value", None)
    return dataclasses.replace(case, tensors=case.tensors | zeros, grads={"out": units})


def batch_heads(B: int, H: int, device: str) -> Tensor:
    """The numbers (B, H, 1, 1) of heads, as dropout counts them."""
    return torch.arange(B * H, device=device).view(B, H, 1, 1)


class LeapAttention(Attention):
    name = "leap_attention"
    settings = ("leap", "group_size", "fold_div", "dropout_p", "seed", "scale")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, T: int = 3, N: int = 19,
        D: int = 16, leap: int = 1, group_size: int = 2, fold_div: int = 0, **common: Any,
    ) -> Case:  # fmt: skip
        shapes = dict.fromkeys(("query", "key", "value"), (B, H, T, N, D))
        return self.random(device, dtype, shapes, leap=leap, group_size=group_size, fold_div=fold_div, **common)

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


class AxialAttention(Attention):
    """The kernels see a grid as (B, H, outer, line, inner, D)."""

    name = "axial_attention"

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, outer: int = 1, line: int = 3,
        inner: int = 2, D: int = 16, **common: Any,
    ) -> Case:  # fmt: skip
        shapes = dict.fromkeys(("query", "key", "value"), (B, H, outer, line, inner, D))
        return self.random(device, dtype, shapes, **common)

    def reference(self, tensors: Tensors, settings: Sizes) -> Tensors:
        return super().reference(tensors, settings | {"dim": 1})

    def show_dropout(self, device: str, seed: int, line: int = 4) -> tuple[Case, Tensor, Tensor]:
        """Tokens count through the grid in raster order."""
        H, outer, inner, dropout_p = 2, 2, 2, 0.3
        case = self.make(device, H=H, outer=outer, line=line, D=line, dropout_p=dropout_p, seed=seed)
        units = torch.eye(line, device=device)[:, None].expand_as(case.tensors["query"])
        tokens = torch.arange(outer * line * inner, device=device).view(outer, line, inner).transpose(1, 2)
        bh = batch_heads(1, H, device)[..., None, None]
        keep = dropout_keep(case.settings["seed"], bh, tokens[..., :, None], tokens[..., None, :], dropout_p)
        return showing(case.replace(value=units), units), keep.transpose(3, 4), keep.mT.transpose(3, 4)


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

    def show_dropout(self, device: str, seed: int, keys: Sequence[int] = (10, 0, 30)) -> tuple[Case, Tensor, Tensor]:
        """Keys count through the segments."""
        B, H, L, dropout_p = 2, 2, sum(keys), 0.3
        case = self.make(device, B=B, H=H, queries=L, keys=keys, D=L, dropout_p=dropout_p, seed=seed)
        units, tokens = torch.eye(L, device=device).expand(B, H, L, L), torch.arange(L, device=device)
        case = case.replace(**{f"values[{i}]": x for i, x in enumerate(units.split(keys, 2))})
        keep = dropout_keep(case.settings["seed"], batch_heads(B, H, device), tokens[:, None], tokens, dropout_p)
        return showing(case, units), keep, keep.mT


class NodeSparseAttention(Attention):
    name = "node_sparse_attention"
    settings = ("kept", "dropout_p", "seed", "scale")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, queries: int = 2,
        keys: int = 2, count: int = 2, D: int = 16, duplicates: bool = False, **common: Any,
    ) -> Case:  # fmt: skip
        """Each sample keeps `count` of the keys, in any order."""
        kept = torch.rand(B, keys, device=device).argsort(1)[:, :count]
        if duplicates:
            kept = torch.randint(0, keys, (B, count), device=device)
        shapes = {"query": (B, H, queries, D), **dict.fromkeys(("key", "value"), (B, H, keys, D))}
        return self.random(device, dtype, shapes, kept=kept, **common)

    def show_dropout(self, device: str, seed: int) -> tuple[Case, Tensor, Tensor]:
        """Keys count as they are numbered, not as they are listed."""
        B, H, L, dropout_p = 2, 2, 33, 0.3
        case = self.make(device, B=B, H=H, queries=L, keys=L, count=20, D=L, dropout_p=dropout_p, seed=seed)
        units, tokens = torch.eye(L, device=device).expand(B, H, L, L), torch.arange(L, device=device)
        keep = dropout_keep(case.settings["seed"], batch_heads(B, H, device), tokens[:, None], tokens, dropout_p)
        kept = case.settings["kept"][:, None, None]
        keep &= torch.zeros(B, 1, 1, L, dtype=torch.bool, device=device).scatter_(3, kept, True)
        return showing(case.replace(value=units), units), keep, keep.mT


class EdgeSparseAttention(Attention):
    name = "edge_sparse_attention"
    scored = ("query", "key", "table")

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, rows: list[list[int]] | None = None,
        more: Sequence[list[list[int]]] = (), block_size: int = 5, B: int = 1, H: int = 1, G: int = 1, N: int = 4,
        D: int = 16, window: tuple[int, ...] = WINDOW, positions: Tensor | None = None, causal: bool = False,
        deterministic: bool = False, **common: Any,
    ) -> Case:  # fmt: skip
        """`rows` are what the blocks of all heads read, or those of the first and `more`. No window means no bias."""
        lists = [[0]] if rows is None else rows
        layout = layout_of([*lists, *(row for head in more for row in head)], N, block_size, G, 1 + len(more))
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
            layout.row_offsets, layout.columns, transposed.row_offsets, transposed.columns, layout.block_size,
            layout.num_global, table, s["window"], s["positions"], s["causal"], s["dropout_p"], s["seed"], s["scale"],
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
            case.grads["out"], case.grads.get("lse"), *tensors, results["out"], results["lse"], *settings,
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
            layout.row_offsets, layout.columns, None, None, layout.block_size, layout.num_global,
            case.tensors.get("table"), s["window"], s["positions"], s["causal"], s["dropout_p"], s["seed"], s["scale"],
        )  # fmt: skip
        return dict(zip(self.results, found, strict=True))

    def reference(self, tensors: Tensors, settings: Sizes) -> Tensors:
        taken = {name: settings[name] for name in ("layout", "positions", "causal", "dropout_p", "scale", "seed")}
        if "table" in tensors:
            heads, num_global = tensors["query"].shape[1], settings["layout"].num_global
            bias = taken["position_bias"] = bias_without_table(settings["window"], max(heads, 1), num_global)
            bias.table = tensors["table"]  # type: ignore[assignment]
        names = (*self.results, "importance") if settings["layout"].num_global > 0 else self.results
        found = reference.edge_sparse_attention(
            tensors["query"], tensors["key"], tensors["value"], **taken, return_lse=True,
            return_importance="importance" in names,
        )  # fmt: skip
        return dict(zip(names, found, strict=True))

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        # Importance, too, is exp(s - lse) of a rounded lse.
        return {"importance": magnitude(truth["lse"], torch.ones(1)), **super().intermediate(case, truth, gradients)}

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
