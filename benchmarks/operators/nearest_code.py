"""The nearest code of each vector, as in a VQ-VAE.

    leaves  x (B, N, C), the vectors of B samples; codebook (K, C)
    output  (B, N), int64

Two codes may be equally near but for rounding: what is judged is the distance to the code that was found.
"""

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor

import vattn
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class NearestCase(Case):
    """B samples of N vectors of C channels, and K codes."""

    B: int
    N: int
    C: int
    K: int

    num_parameters: ClassVar[int] = 1
    output_dtype: ClassVar[torch.dtype | None] = torch.int64

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [(self.B, self.N, self.C), (self.K, self.C)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.N)

    @property
    def num_rows(self) -> int:
        return 0

    @property
    def forward_flops(self) -> int:
        return 2 * self.B * self.N * self.K * self.C

    def reference(self, *leaves: Tensor) -> Tensor:
        """The formula with products: ``vattn.reference`` sums differences, and at these sizes takes minutes."""
        x, codebook = leaves
        return _expanded(x, codebook, elements=2**22)

    def judged(self, out: Tensor, *leaves: Tensor) -> Tensor:
        x, codebook = leaves
        return (x.double() - codebook[out].double()).square().sum(-1).sqrt()


def _expanded(x: Tensor, codebook: Tensor, elements: int) -> Tensor:
    """``argmin |c|^2 - 2 x c``, |x|^2 being that of all codes, for vectors with `elements` distances at a time."""
    squares = codebook.square().sum(-1)
    chunks = x.flatten(0, -2).split(max(1, elements // len(codebook)))
    found = [torch.addmm(squares, vectors, codebook.t(), alpha=-2).argmin(-1) for vectors in chunks]
    return torch.cat(found).view(x.shape[:-1])


def _vattn(case: NearestCase, device: torch.device) -> Run:
    return vattn.nearest_code


def _cdist(case: NearestCase, device: torch.device) -> Run:
    def run(x: Tensor, codebook: Tensor) -> Tensor:
        return torch.cdist(x.flatten(0, -2), codebook).argmin(-1).view(case.output_shape)

    return run


def _in_chunks(case: NearestCase, device: torch.device, mebibytes: int) -> Run:
    return functools.partial(_expanded, elements=mebibytes * 2**20 // 4)


_CHUNKS = (2, 32)  # MiB: of 0.5, 2, 8 and 32 one of these was the fastest on a CPU, at every size

OPERATOR = Operator(
    name="nearest_code",
    cases={
        "default": [NearestCase(8, 4096, C, K) for C in (256, 64) for K in (256, 2048, 16384)],
        "gpu": [NearestCase(32, 4096, C, K) for C in (256, 64) for K in (256, 2048, 16384)],
        "quick": [NearestCase(2, 5, 4, 7), NearestCase(1, 70, 16, 130)],
    },
    providers=[
        Provider("vattn", "vattn", _vattn),
        Provider("cdist", "peer", _cdist),
        *(Provider(f"expanded-{size}MiB", "peer", functools.partial(_in_chunks, mebibytes=size)) for size in _CHUNKS),
    ],
)
