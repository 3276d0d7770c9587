"""What a benchmark is made of: a case is a workload, a provider a way to compute it, an operator both."""

import abc
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from benchmarks import operators
from benchmarks.records import Line

Run = Callable[..., Tensor]


class Case(abc.ABC):
    """A workload: a frozen dataclass of sizes. Its output has the batch as its first axis, and so have its leaves.

    Attributes:
        num_parameters: how many of the last leaves do not, but are the same for all samples.
        output_dtype: of the output, None for that of the leaves. Another one has no gradient.
    """

    num_parameters: ClassVar[int] = 0
    output_dtype: ClassVar[torch.dtype | None] = None

    @property
    def name(self) -> str:
        """Its sizes, readable and unique within the operator."""
        return " ".join(f"{key}={value}" for key, value in dataclasses.asdict(self).items())  # type: ignore[call-overload]

    @property
    @abc.abstractmethod
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        """The inputs as the layer before leaves them: gradients are taken with respect to these."""

    @property
    @abc.abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """The output as the layer after wants it; providers return it contiguous."""

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """Softmax rows: the elements of lse."""

    @property
    @abc.abstractmethod
    def forward_flops(self) -> int:
        """The arithmetic of the two matrix products of the forward."""

    @abc.abstractmethod
    def reference(self, *leaves: Tensor) -> Tensor:
        """The definition, ``vattn.reference``, in the dtype of `leaves`."""

    def judged(self, out: Tensor, *leaves: Tensor) -> Tensor:
        """What the gate compares: the output, or what it comes to where several outputs are equally right."""
        return out


CaseT = TypeVar("CaseT", bound=Case)


def _unchanged(case: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


def _output(case: Any, out: Tensor) -> Tensor:
    return out


def _reference(case: Any, *leaves: Tensor) -> Tensor:
    return case.reference(*leaves)


def _nothing(lines: Sequence[Line]) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Provider(Generic[CaseT]):
    """One way to compute an operator.

    Attributes:
        name: as in tables and on the command line.
        role: "vattn"; "peer", what one would write instead, of which the best one counts; "other", compared by
            itself; "limit", excused from a part of the work.
        build: from the case and the device to ``run(*leaves) -> output``. All that depends on sizes alone (index
            tensors, block masks, compilation) happens here and is not timed.
        devices: the device types that it is for.
        before, after: a limit's untimed work: from the leaves to what `run` takes, from what it returns to the
            output. The gate goes through both.
        definition: what the gate compares with, in the dtype of the leaves. A limit may do other work than the case
            asks for, and then does that right.
    """

    name: str
    role: Literal["vattn", "peer", "other", "limit"]
    build: Callable[[CaseT, torch.device], Run]
    devices: tuple[str, ...] = ("cpu", "cuda")
    before: Callable[..., tuple[Tensor, ...]] = _unchanged
    after: Callable[[CaseT, Tensor], Tensor] = _output
    definition: Callable[..., Tensor] = _reference


@dataclasses.dataclass(frozen=True)
class Operator(Generic[CaseT]):
    """An operator's named sets of cases ("default" for a CPU, "gpu", "quick" for tests) and its providers.

    Attributes:
        remarks: what else is to be said below the table of these lines, which are of one case and pass.
    """

    name: str
    cases: Mapping[str, Sequence[CaseT]]
    providers: Sequence[Provider[CaseT]]
    remarks: Callable[[Sequence[Line]], list[str]] = _nothing


def operator_names() -> list[str]:
    """The operators that have benchmarks: the modules of ``benchmarks.operators``."""
    return sorted(module.name for module in pkgutil.iter_modules(operators.__path__))


def load_operator(name: str) -> Operator[Any]:
    """The ``OPERATOR`` of ``benchmarks.operators.<name>``."""
    return importlib.import_module(f"benchmarks.operators.{name}").OPERATOR
