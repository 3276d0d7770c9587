"""The correctness gate: no provider is timed before its result is right.

Right means: against ``vattn.reference`` in float64, an error of at most twice that of the same formula in the
provider's dtype, plus one rounding. The output and every gradient are compared, all samples of the batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.registry import Case

Pass = Literal["forward", "forward+backward"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The tensor that fares worst against its budget: its error, and the budget. `complaint` is why it is red."""

    error: float
    budget: float
    complaint: str | None


class Gate:
    """The right output and gradients of one case, and how far off each may be."""

    def __init__(self, case: Case, leaves: Sequence[Tensor], grad_out: Tensor) -> None:
        self.case = case
        self.grad_out = grad_out
        samples = [_sample(case, leaves, grad_out, i, torch.float64) for i in range(grad_out.shape[0])]
        self.expected = [torch.cat(parts) for parts in zip(*samples, strict=True)]
        plain_samples = [_sample(case, leaves, grad_out, i, grad_out.dtype) for i in range(grad_out.shape[0])]
        plain = [torch.cat(parts) for parts in zip(*plain_samples, strict=True)]
        rounding = torch.finfo(grad_out.dtype).eps
        self.budgets = [
            2 * _error(x, expected) + rounding * expected.abs().max().item()
            for x, expected in zip(plain, self.expected, strict=True)
        ]

    def judge(self, out: Tensor, grads: tuple[Tensor, ...] = ()) -> Verdict:
        """The verdict on a provider's output and, if it was asked for them, its gradients."""
        if tuple(out.shape) != self.case.output_shape or not out.is_contiguous():
            complaint = f"output must be contiguous {self.case.output_shape}, got {tuple(out.shape)}"
            return Verdict(math.inf, self.budgets[0], complaint)
        names = ["output", *(f"gradient {i}" for i in range(len(grads)))]
        verdicts = []
        for name, x, expected, budget in zip(names, (out, *grads), self.expected, self.budgets, strict=False):
            error = _error(x, expected)
            complaint = f"{name} is off by {error:.2e}, allowed {budget:.2e}"
            verdicts.append(Verdict(error, budget, None if error <= budget else complaint))
        # NaN is not at most anything, and comes first.
        return max(verdicts, key=lambda verdict: (math.isnan(verdict.error), verdict.error / verdict.budget))


def _sample(
    case: Case, leaves: Sequence[Tensor], grad_out: Tensor, index: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Output and gradients of the reference for one sample: its scores are large, the batch's would be larger."""
    one = slice(index, index + 1)
    sample = [x[one].to(dtype).requires_grad_() for x in leaves]
    out = case.reference(*sample)
    return out.detach(), *torch.autograd.grad(out, sample, grad_out[one].to(dtype))


def _error(x: Tensor, expected: Tensor) -> float:
    return (x.to(torch.float64) - expected).abs().max().item()
