"""Axial attention as VideoGPT's VQ-VAE uses it, between the query, key and value projections and the output projection.

    leaves  query, key and value (B, T, height, width, H * D), as linear layers leave them
    output  (B, T, height, width, H * D)

Scaled dot product attention and the official formula are given lines as samples. Along the width that is a view for the
former; along the other axes tokens are copied there and back. In this very layout another view needs no copy along any
axis: it has what lies inside of a line as further heads. As ``sdpa-views`` it is compared by itself.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import vattn
from benchmarks import sdpa
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class AxialCase(Case):
    """B grids of T * height * width tokens, H heads of size D, in lines along axis `dim` of the grid."""

    B: int
    T: int
    height: int
    width: int
    dim: int
    H: int = 2
    D: int = 120

    def __post_init__(self) -> None:
        if self.dim > 2:
            raise ValueError(f"AxialCase: dim must be 0, 1 or 2, got dim={self.dim}")

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.T, self.height, self.width)

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [self.output_shape] * 3

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, *self.grid, self.H * self.D)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * math.prod(self.grid)

    @property
    def forward_flops(self) -> int:
        return 2 * 2 * self.num_rows * self.grid[self.dim] * self.D

    def heads(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Views (B, H, T, height, width, D)."""
        return tuple(x.unflatten(-1, (self.H, self.D)).movedim(-2, 1) for x in leaves)

    def merge(self, out: Tensor) -> Tensor:
        """From (B, H, T, height, width, D) to the output."""
        return out.movedim(1, -2).flatten(-2).contiguous()

    def reference(self, *leaves: Tensor) -> Tensor:
        query, key, value = self.heads(leaves)
        out = vattn.reference.axial_attention(query, key, value, self.dim)
        assert isinstance(out, Tensor)
        return self.merge(out)


def _vattn(case: AxialCase, device: torch.device) -> Run:
    def run(*leaves: Tensor) -> Tensor:
        query, key, value = case.heads(leaves)
        out = vattn.axial_attention(query, key, value, case.dim)
        assert isinstance(out, Tensor)
        return case.merge(out)

    return run


def _by_line(case: AxialCase, attend: sdpa.Attend) -> Run:
    """`attend` on lines as samples, (lines, H, line, D): one copy there and one back, but along the width none."""
    others = [size for axis, size in enumerate(case.grid) if axis != case.dim]

    def run(*leaves: Tensor) -> Tensor:
        lines = (x.movedim(1 + case.dim, -2).flatten(0, -3).unflatten(-1, (case.H, case.D)) for x in leaves)
        query, key, value = (x.transpose(1, 2) for x in lines)
        out = attend(query, key, value).transpose(1, 2).flatten(-2)
        return out.unflatten(0, (case.B, *others)).movedim(-2, 1 + case.dim).contiguous()

    return run


def _sdpa(case: AxialCase, device: torch.device, backend: SDPBackend | None = None) -> Run:
    return _by_line(case, sdpa.attention(backend))


def _sdpa_views(case: AxialCase, device: torch.device, backend: SDPBackend | None = None) -> Run:
    """Without a copy: (B * outer, inner * H, line, D), for the axes of the grid outside and inside of the line."""
    attend = sdpa.attention(backend)
    outer, line = math.prod(case.grid[: case.dim]), case.grid[case.dim]

    def run(*leaves: Tensor) -> Tensor:
        query, key, value = (x.view(case.B * outer, line, -1, case.D).transpose(1, 2) for x in leaves)
        return attend(query, key, value).transpose(1, 2).reshape(case.output_shape)

    return run


def _official(case: AxialCase, device: torch.device) -> Run:
    """The formula of the authors' code: lines and heads as samples, by a copy, and the scores in memory."""

    def run(*leaves: Tensor) -> Tensor:
        moved = [x.movedim(2 + case.dim, -2) for x in case.heads(leaves)]  # (B, H, others, line, D)
        query, key, value = (x.flatten(0, -3) for x in moved)
        weights = (query @ key.transpose(-2, -1) * case.D**-0.5).softmax(-1)
        return case.merge((weights @ value).view(moved[0].shape).movedim(-2, 2 + case.dim))

    return run


def _flex(case: AxialCase, device: torch.device) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each case compiles the same code: do not run into the limit of recompilations
    # The template for the CPU takes the shape of what a query is a view of for the query's own: the views stay outside.
    return _by_line(case, torch.compile(flex_attention, fullgraph=True, dynamic=False))


def _along_each_axis(B: int, T: int, height: int, width: int, D: int = 120) -> list[AxialCase]:
    return [AxialCase(B, T, height, width, dim, D=D) for dim in range(3)]


OPERATOR = Operator(
    name="axial_attention",
    cases={
        "default": [
            *_along_each_axis(2, 4, 32, 32),
            *_along_each_axis(2, 8, 32, 32),
            *_along_each_axis(2, 16, 16, 16, 64),
        ],
        "gpu": [
            *_along_each_axis(32, 4, 32, 32),
            *_along_each_axis(16, 8, 32, 32),
            *_along_each_axis(16, 16, 16, 16, 64),
            *_along_each_axis(8, 16, 64, 64, 128),
        ],
        "quick": [AxialCase(2, 2, 9, 4, 1, D=32), *(AxialCase(1, 3, 2, 5, dim, H=1, D=8) for dim in range(3))],
    },
    providers=[
        Provider("vattn", "vattn", _vattn),
        Provider("sdpa", "peer", _sdpa),
        *(
            Provider(f"sdpa-{name}", "peer", functools.partial(_sdpa, backend=backend), devices=("cuda",))
            for name, backend in sdpa.BACKENDS.items()
        ),
        Provider("official", "peer", _official),
        Provider("sdpa-views", "other", _sdpa_views),
        Provider("flex", "peer", _flex),
    ],
)
