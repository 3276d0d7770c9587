"""The correctness gate: no provider is timed before its result is right.

Right means: against ``vattn.reference`` in float64, an error of at most twice that of the same formula in the
provider's dtype, plus one rounding. The output and every gradient are compared, all samples of the batch. Others than
vattn get `LEEWAY` times that: they shall not be left out for the order in which they add up.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.registry import Case

Pass = Literal["forward", "forward+backward"]
LEEWAY = 4.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The tensor that fares worst against its budget: its error, and the budget. `complaint` is why it is red."""

    error: float
    budget: float
    complaint: str | None

    @property
    def share(self) -> float:
        """The error per budget, which is 0 for what must be 0: the gradient of a leaf that nothing reads."""
        return self.error / self.budget if self.budget > 0 else math.inf if self.error > 0 else 0.0


class Gate:
    """The right output and gradients of one case, by `definition`, and how far off each may be."""

    def __init__(
        self, case: Case, leaves: Sequence[Tensor], grad_out: Tensor, definition: Callable[..., Tensor]
    ) -> None:
        self.case = case
        self.leaves = leaves
        self.grad_out = grad_out
        self.expected = _output_and_gradients(case, leaves, grad_out, definition, torch.float64)
        plain = _output_and_gradients(case, leaves, grad_out, definition, grad_out.dtype)
        rounding = torch.finfo(grad_out.dtype).eps
        self.budgets = [
            2 * _error(x, expected) + rounding * expected.abs().max().item()
            for x, expected in zip(plain, self.expected, strict=True)
        ]

    def judge(self, out: Tensor, grads: tuple[Tensor, ...] = (), leeway: float = 1.0) -> Verdict:
        """The verdict on a provider's output and, if it was asked for them, its gradients."""
        budgets = [leeway * budget for budget in self.budgets]
        if tuple(out.shape) != self.case.output_shape or not out.is_contiguous():
            complaint = f"output must be contiguous {self.case.output_shape}, got {tuple(out.shape)}"
            return Verdict(math.inf, budgets[0], complaint)
        names = ["output", *(f"gradient {i}" for i in range(len(grads)))]
        verdicts = []
        out = self.case.judged(out, *self.leaves)
        for name, x, expected, budget in zip(names, (out, *grads), self.expected, budgets, strict=False):
            error = _error(x, expected)
            complaint = f"{name} is off by {error:.2e}, allowed {budget:.2e}"
            verdicts.append(Verdict(error, budget, None if error <= budget else complaint))
        # NaN is not at most anything, and comes first.
        return max(verdicts, key=lambda verdict: (math.isnan(verdict.error), verdict.share))


def _output_and_gradients(
    case: Case, leaves: Sequence[Tensor], grad_out: Tensor, definition: Callable[..., Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Of the definition, sample by sample: the scores of one are large, the batch's would be larger."""
    of_samples = len(leaves) - case.num_parameters
    samples = []
    for index in range(grad_out.shape[0]):
        one = slice(index, index + 1)
        sample = [x[one] if i < of_samples else x for i, x in enumerate(leaves)]
        inputs = [x.to(dtype).detach().requires_grad_(case.output_dtype is None) for x in sample]
        out = definition(case, *inputs)
        grads: tuple[Tensor, ...] = ()
        if case.output_dtype is None:
            grads = torch.autograd.grad(out, inputs, grad_out[one].to(dtype), materialize_grads=True)
        samples.append((case.judged(out.detach(), *sample), *grads))
    joined = [torch.cat if i <= of_samples else _sum for i in range(len(samples[0]))]  # the output comes first
    return [join(parts) for join, parts in zip(joined, zip(*samples, strict=True), strict=True)]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _error(x: Tensor, expected: Tensor) -> float:
    return (x.to(torch.float64) - expected).abs().max().item()
