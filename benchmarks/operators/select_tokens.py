"""The selection of tokens, between two layers of SViTT's encoders.

    leaves  tokens (B, 1 + N, C), the first one global
    output  (B, 1 + K, C)

The importance of tokens is drawn, but always the same.
"""

import dataclasses

import torch
from torch import Tensor

import vattn
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class SelectCase(Case):
    """K of N tokens stay, and the global one."""

    B: int
    N: int
    K: int
    C: int = 768

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [(self.B, 1 + self.N, self.C)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, 1 + self.K, self.C)

    @property
    def num_rows(self) -> int:
        return 0

    @property
    def forward_flops(self) -> int:
        return 0

    def importance(self, like: Tensor) -> Tensor:
        """``(B, N)``, the same for all samples of `like`."""
        return torch.rand(self.N, generator=torch.Generator().manual_seed(0)).to(like.device).repeat(len(like), 1)

    def reference(self, *leaves: Tensor) -> Tensor:
        return vattn.reference.select_tokens(leaves[0], self.importance(leaves[0]), self.K)[0]


def _vattn(case: SelectCase, device: torch.device) -> Run:
    importance = case.importance(torch.empty(case.B, device=device))
    return lambda tokens: vattn.select_tokens(tokens, importance, case.K)[0]


def _topk(case: SelectCase, device: torch.device) -> Run:
    importance = case.importance(torch.empty(case.B, device=device))

    def run(tokens: Tensor) -> Tensor:
        index = importance.topk(case.K).indices.sort(1).values
        index = torch.nn.functional.pad(index + 1, (1, 0))  # the global token stays
        return tokens.gather(1, index[..., None].expand(-1, -1, case.C))

    return run


OPERATOR = Operator(
    name="select_tokens",
    cases={
        "default": [SelectCase(2, 1568, 784), SelectCase(8, 1568, 157)],
        "gpu": [SelectCase(64, 1568, 784), SelectCase(64, 1568, 157)],
        "quick": [SelectCase(2, 9, 4, C=6)],
    },
    providers=[Provider("vattn", "vattn", _vattn), Provider("topk", "peer", _topk)],
)
