"""The periodic shift by itself, as LAPS has it where it is not part of leap attention.

leaves  x (B, T, N, H * D)
output  (B, T, N, H * D)
"""

import dataclasses

import torch
from torch import Tensor

import vattn
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class ShiftCase(Case):
    """B clips of T frames of N tokens, H heads of size D."""

    B: int
    T: int
    N: int = 196
    H: int = 12
    D: int = 64
    fold_div: int = 4

    def __post_init__(self) -> None:
        if self.fold_div < 1:
            raise ValueError(f"ShiftCase: fold_div must be at least 1, got fold_div={self.fold_div}")

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [self.output_shape]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.T, self.N, self.H * self.D)

    @property
    def num_rows(self) -> int:
        return 0

    @property
    def forward_flops(self) -> int:
        return 0

    def heads(self, x: Tensor) -> Tensor:
        """A view (B, H, T, N, D)."""
        return x.unflatten(-1, (self.H, self.D)).movedim(-2, 1)

    def merge(self, out: Tensor) -> Tensor:
        """From (B, H, T, N, D) to the output."""
        return out.movedim(1, -2).flatten(-2).contiguous()

    def reference(self, *leaves: Tensor) -> Tensor:
        return self.merge(vattn.reference.periodic_shift(self.heads(leaves[0]), self.fold_div))


def _vattn(case: ShiftCase, device: torch.device) -> Run:
    return lambda x: case.merge(vattn.periodic_shift(case.heads(x), case.fold_div))


def _slices(case: ShiftCase, device: torch.device) -> Run:
    """The formula of the authors' code: zeros, and three assignments of slices."""
    fold = case.D // case.fold_div

    def run(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (case.H, case.D))
        out = torch.zeros_like(x)
        out[:, :-1, ..., :fold] = x[:, 1:, ..., :fold]
        out[:, 1:, ..., fold : 2 * fold] = x[:, :-1, ..., fold : 2 * fold]
        out[..., 2 * fold :] = x[..., 2 * fold :]
        return out.flatten(-2)

    return run


OPERATOR = Operator(
    name="periodic_shift",
    cases={
        "default": [ShiftCase(1, 8), ShiftCase(4, 8)],
        "gpu": [ShiftCase(32, 8), ShiftCase(32, 16)],
        "quick": [ShiftCase(2, 3, N=5, H=2, D=8)],
    },
    providers=[Provider("vattn", "vattn", _vattn), Provider("slices", "peer", _slices)],
)
