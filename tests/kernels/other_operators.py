"""The operators under test that are not attention: how to make inputs, call launchers, and get the truth."""

import torch
from torch import Tensor

from tests.kernels.backends import Launchers
from tests.kernels.cases import Case, Operator, Sizes, Tensors, grouped
from tests.layouts import bias_without_table
from tests.utils import magnitude
from vattn import reference
from vattn.position_bias import num_offsets


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

    def reference(self, tensors: Tensors, settings: Sizes) -> Tensors:
        return dict(zip(self.results, reference.merge_attention(*grouped(tensors)), strict=True))

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


class PeriodicShift(Operator):
    """It is its own derivative, and its transpose is another setting of the same launcher."""

    name = "periodic_shift"
    results = ("out",)
    settings = ("fold_div", "transpose")
    exact = True

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, T: int = 4, N: int = 5,
        D: int = 24, fold_div: int = 3, transpose: bool = False,
    ) -> Case:  # fmt: skip
        x, grad = torch.randn(2, B, H, T, N, D, device=device).to(dtype)
        return Case(self, {"x": x}, {"out": grad}, {"fold_div": fold_div, "transpose": transpose})

    def backward(self, launchers: Launchers, case: Case, results: Tensors) -> Tensors:
        fold_div, transpose = self._settings(case)
        return {"x": launchers.forward(case.grads["out"], fold_div, not transpose)}

    def jvp(self, launchers: Launchers, case: Case, results: Tensors, tangents: Tensors) -> Tensors:
        return {"out": launchers.forward(tangents["x"], *self._settings(case))}

    def reference(self, tensors: Tensors, settings: Sizes) -> Tensors:
        return {"out": reference.periodic_shift(tensors["x"], **settings)}


class TokenImportance(Operator):
    name = "token_importance"
    results = ("importance",)
    settings = ("table", "window", "num_global", "positions", "key_lengths", "scale")
    differentiable = False

    def make(
        self, device: str, dtype: torch.dtype = torch.float32, *, B: int = 1, H: int = 1, queries: int = 2,
        keys: int = 2, D: int = 16, G: int = 0, window: tuple[int, ...] = (), positions: Tensor | None = None,
        key_lengths: Tensor | None = None, scale: float | None = None,
    ) -> Case:  # fmt: skip
        query, key = (torch.randn(B, H, length, D, device=device).to(dtype) for length in (queries, keys))
        table = torch.randn(num_offsets(window) + 2 * G + G * G, H, device=device) if window else None
        scale = D**-0.5 if scale is None else scale
        settings = {"table": table, "window": window, "num_global": G, "positions": positions}
        return Case(self, {"query": query, "key": key}, {}, settings | {"key_lengths": key_lengths, "scale": scale})

    def reference(self, tensors: Tensors, settings: Sizes) -> Tensors:
        taken = {name: settings[name] for name in ("positions", "key_lengths", "scale")}
        if settings["window"]:
            heads = tensors["query"].shape[1]
            bias = taken["position_bias"] = bias_without_table(settings["window"], heads, settings["num_global"])
            bias.table = settings["table"].to(torch.promote_types(tensors["query"].dtype, torch.float32))
        return {"importance": reference.token_importance(*tensors.values(), **taken)}

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        # As in the backward of attention, exp(s - lse) carries the rounding of a score and of lse, which are larger.
        query, key = (x.double() for x in case.tensors.values())
        largest = magnitude(query @ key.mT * case.settings["scale"], torch.ones(1))
        return {"importance": largest * magnitude(truth["importance"], torch.zeros(1))}


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

    def reference(self, tensors: Tensors, settings: Sizes) -> Tensors:
        return {"index": reference.nearest_code(*tensors.values())}
