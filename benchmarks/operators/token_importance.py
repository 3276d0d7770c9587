"""Token importance as SViTT's text encoder uses it: which tokens of a video the words attend to.

    leaves  query (B, Lq, H * D) and key (B, Lk, H * D), as linear layers leave them
    output  (B, Lk), float32

A peer has the probabilities in memory.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

import vattn
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class ImportanceCase(Case):
    """Lq queries and Lk keys, H heads of size D."""

    B: int
    Lq: int
    Lk: int
    H: int = 12
    D: int = 64

    output_dtype: ClassVar[torch.dtype | None] = torch.float32

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [(self.B, length, self.H * self.D) for length in (self.Lq, self.Lk)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.Lk)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * self.Lq

    @property
    def forward_flops(self) -> int:
        return 2 * 2 * self.num_rows * self.Lk * self.D  # scores for the sums, and again for the weights

    def heads(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Views (B, H, L, D)."""
        query, key = (x.unflatten(-1, (self.H, self.D)).transpose(1, 2) for x in leaves)
        return query, key

    def reference(self, *leaves: Tensor) -> Tensor:
        return vattn.reference.token_importance(*self.heads(leaves))


def _vattn(case: ImportanceCase, device: torch.device) -> Run:
    return lambda *leaves: vattn.token_importance(*case.heads(leaves))


def _softmax(case: ImportanceCase, device: torch.device) -> Run:
    def run(*leaves: Tensor) -> Tensor:
        query, key = case.heads(leaves)
        return (query @ key.mT * case.D**-0.5).softmax(-1, dtype=torch.float32).mean((1, 2))

    return run


OPERATOR = Operator(
    name="token_importance",
    cases={
        "default": [ImportanceCase(2, 32, 1569), ImportanceCase(2, 785, 785)],
        "gpu": [ImportanceCase(64, 32, 1569), ImportanceCase(32, 785, 785)],
        "quick": [ImportanceCase(2, 3, 20, H=2, D=8)],
    },
    providers=[Provider("vattn", "vattn", _vattn), Provider("softmax", "peer", _softmax)],
)
