"""The merge of attention over parts, as splits of a context need it.

leaves  for each part an output (B, H, N, D), then for each part an lse (B, H, N)
output  (B, H, N, D)
"""

import dataclasses

import torch
from torch import Tensor

import vattn
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class MergeCase(Case):
    """Outputs of N queries from several parts of the keys, H heads of size D."""

    B: int
    N: int
    parts: int
    H: int = 12
    D: int = 64

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [self.output_shape] * self.parts + [self.output_shape[:-1]] * self.parts

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.H, self.N, self.D)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * self.N

    @property
    def forward_flops(self) -> int:
        return 0  # no products of matrices: memory is all it costs

    def lists(self, leaves: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs, and lses in float32 at least."""
        lses = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in leaves[self.parts :])
        return leaves[: self.parts], tuple(lses)

    def reference(self, *leaves: Tensor) -> Tensor:
        return vattn.reference.merge_attention(*self.lists(leaves))[0]


def _vattn(case: MergeCase, device: torch.device) -> Run:
    return lambda *leaves: vattn.merge_attention(*case.lists(leaves))[0]


def _softmax(case: MergeCase, device: torch.device) -> Run:
    def run(*leaves: Tensor) -> Tensor:
        outs, lses = case.lists(leaves)
        weights = torch.stack(lses).softmax(0)[..., None]
        return (torch.stack(outs) * weights).sum(0).to(outs[0].dtype)

    return run


OPERATOR = Operator(
    name="merge_attention",
    cases={
        "default": [MergeCase(2, 1568, 2), MergeCase(2, 1568, 8)],
        "gpu": [MergeCase(32, 1568, 2), MergeCase(32, 1568, 8)],
        "quick": [MergeCase(2, 5, 3, H=2, D=8)],
    },
    providers=[Provider("vattn", "vattn", _vattn), Provider("softmax", "peer", _softmax)],
)
