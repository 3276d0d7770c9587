"""What an operator under test is: named sizes, of which it makes inputs, and two ways to compute.

One way is a backend's launchers, the other the reference in any dtype. Tensors, results and gradients are dictionaries
by name; the parts of a list are called ``keys[0]``, ``keys[1]`` and so on. The operators are in operators.py, what is
expected of them in test_contract.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.kernels.backends import Launchers
from vattn import reference

HEAD_DIMS = (1, 16, 33, 64, 72, 80, 96, 120, 128, 144, 256)  # whole, split and masked columns

Sizes = dict[str, Any]
Tensors = dict[str, Tensor]
Draw = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: what is differentiated, the gradients of the results (of some of them), and the settings."""

    operator: "Operator"
    tensors: Tensors
    grads: Tensors
    settings: dict[str, Any]

    def replace(self, **tensors: Tensor) -> "Case":
        """The same call with other `tensors`."""
        return dataclasses.replace(self, tensors=self.tensors | tensors)

    def gradient_of_out_only(self) -> "Case":
        return dataclasses.replace(self, grads={"out": self.grads["out"]})

    def random_tangents(self) -> Tensors:
        return {name: torch.randn(x.shape, device=x.device).to(x.dtype) for name, x in self.tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype


def grouped(tensors: Tensors) -> list[Any]:
    """The tensors as arguments: those called ``name[i]`` are one list."""
    groups: dict[str, Any] = {}
    for name, x in tensors.items():
        if name.endswith("]"):
            groups.setdefault(name.split("[")[0], []).append(x)
        else:
            groups[name] = x
    return list(groups.values())


def flat(results: Any) -> list[Tensor]:
    """The reverse of :func:`grouped`, for a tensor or a tuple of tensors and lists."""
    if isinstance(results, Tensor):
        return [results]
    return [x for result in results for x in flat(result)]


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """How to make inputs and compute, and the sizes that the contracts try."""

    name: ClassVar[str]
    results: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]] = ()  # as launchers take them
    differentiable: ClassVar[bool] = True
    exact: ClassVar[bool] = False  # it moves numbers, or returns integers
    make: ClassVar[Callable[..., Case]]  # of a device, a dtype (float32) and sizes: random tensors

    narrow: dict[str, Sizes]  # the smallest with several tiles, for many head dims
    cases: dict[str, Sizes]  # small ones, which every contract tries
    strided: dict[str, Sizes]  # two samples of two heads
    far: Sizes  # two of everything
    empty: dict[str, Sizes]
    lengths: dict[str, Sizes] = dataclasses.field(default_factory=dict)  # around the sizes of tiles
    paths: dict[str, Sizes] = dataclasses.field(default_factory=dict)  # further ways through the kernels
    repeatable: Sizes = dataclasses.field(default_factory=dict)  # to ask for the same bits twice
    head_dims: tuple[int, ...] = HEAD_DIMS
    axes: tuple[str, ...] = ("B", "H", "L")  # of the large tensors, but for the last one

    def forward(self, launchers: Launchers, case: Case) -> Tensors:
        found = launchers.forward(*grouped(case.tensors), *self._settings(case))
        return dict(zip(self.results, flat(found), strict=True))

    def backward(self, launchers: Launchers, case: Case, results: Tensors) -> Tensors:
        """The gradients of ``case.tensors``, by their names."""
        grads = [case.grads.get(name) for name in self.results]
        found = launchers.backward(*grads, *grouped(case.tensors), *results.values(), *self._settings(case))
        return dict(zip(case.tensors, flat(found), strict=True))

    def jvp(self, launchers: Launchers, case: Case, results: Tensors, tangents: Tensors) -> Tensors:
        """The tangents of the results, for `tangents` of ``case.tensors``."""
        outs = [results[name] for name in self.results]
        found = launchers.jvp(*grouped(tangents), *grouped(case.tensors), *outs, *self._settings(case))
        return dict(zip(self.results, found, strict=True))

    def draw(self, draw: Draw) -> Sizes:
        """Any sizes and settings, but for a seed; `draw` takes a strategy of hypothesis and a label."""
        raise NotImplementedError

    def reference(self, tensors: Tensors, settings: Sizes, functions: Any = reference) -> Tensors:
        """What the operator of `functions`, or its definition, makes of them. Without a seed, dropout draws one."""
        raise NotImplementedError

    def intermediate(self, case: Case, truth: Tensors, gradients: Tensors) -> dict[str, float]:
        """Of results and gradients that are differences of larger numbers, how large those are."""
        return {}

    def intermediate_of_tangents(self, case: Case, truth: Tensors, tangents: Tensors) -> dict[str, float]:
        """The same of the tangents of results."""
        return {}

    def lies_well(self, case: Case, name: str, x: Tensor) -> bool:
        """Whether result `name`, or the gradient of a tensor of that name, lies in memory as it should.

        Heads of out, and of gradients, merge without a copy; all else is contiguous.
        """
        if name == "out" or (name in case.tensors and x.ndim >= 4):
            return x.movedim(1, -2).flatten(-2).data_ptr() == x.data_ptr()
        return x.is_contiguous()

    def _settings(self, case: Case) -> list[Any]:
        return [case.settings[name] for name in self.settings]
