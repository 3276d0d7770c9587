"""Latent attention as MeBT uses it, between the query, key and value projections and the output projection.

    leaves  query (B, Lq, H * D), then key and value (B, Lk, H * D) of each segment, as linear layers leave them
    output  (B, Lq, H * D)

The encoder reads a long context into 256 latents, the decoder reads the latents from many positions, and lt2l
reads latents and targets, which lie in two tensors: a peer concatenates them.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import vattn
from benchmarks import sdpa
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class LatentCase(Case):
    """Lq queries over the keys of segments of the lengths Lk, H heads of size D."""

    mode: str
    B: int
    Lq: int
    Lk: tuple[int, ...]
    H: int = 16
    D: int = 64

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        lengths = [self.Lq, *(length for length in self.Lk for _ in range(2))]
        return [(self.B, length, self.H * self.D) for length in lengths]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.Lq, self.H * self.D)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * self.Lq

    @property
    def forward_flops(self) -> int:
        return 2 * 2 * self.num_rows * sum(self.Lk) * self.D

    def heads(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views (B, H, L, D) of the query and of the keys and the values of all segments."""
        query, *segments = (x.unflatten(-1, (self.H, self.D)).transpose(1, 2) for x in leaves)
        return query, tuple(segments[::2]), tuple(segments[1::2])

    def reference(self, *leaves: Tensor) -> Tensor:
        out = vattn.reference.latent_attention(*self.heads(leaves))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(-2)


def _vattn(case: LatentCase, device: torch.device) -> Run:
    def run(*leaves: Tensor) -> Tensor:
        out = vattn.latent_attention(*case.heads(leaves))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(-2)

    return run


def _dense(case: LatentCase, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """`attend` on one key and one value tensor, concatenated if need be."""

    def run(*leaves: Tensor) -> Tensor:
        query, *segments = case.heads(leaves)
        key, value = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in segments)
        return attend(query, key, value).transpose(1, 2).flatten(-2)

    return run


def _sdpa(case: LatentCase, device: torch.device, backend: SDPBackend | None = None) -> Run:
    return _dense(case, sdpa.attention(backend))


def _official(case: LatentCase, device: torch.device) -> Run:
    """The formula of the authors' code: the scores in memory."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(-2, -1) * case.D**-0.5).softmax(-1) @ value

    return _dense(case, attend)


def _flex(case: LatentCase, device: torch.device) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each case compiles the same code: do not run into the limit of recompilations
    # The template for the CPU takes the shape of what a query is a view of for the query's own: the views stay outside.
    return _dense(case, torch.compile(flex_attention, fullgraph=True, dynamic=False))


def _cases(B: int) -> list[LatentCase]:
    return [
        LatentCase("encode", B, 256, (8192,)),
        LatentCase("encode", B, 256, (32768,)),
        LatentCase("decode", B, 8192, (256,)),
        LatentCase("decode", B, 32768, (256,)),
        LatentCase("lt2l", B, 256, (256, 8192)),
    ]


OPERATOR = Operator(
    name="latent_attention",
    cases={
        "default": _cases(1),
        "gpu": [*_cases(1), *_cases(8)],
        "quick": [LatentCase("encode", 1, 8, (70,), 2, 16), LatentCase("lt2l", 2, 5, (5, 9), 1, 8)],
    },
    providers=[
        Provider("vattn", "vattn", _vattn),
        Provider("sdpa", "peer", _sdpa),
        *(
            Provider(f"sdpa-{name}", "peer", functools.partial(_sdpa, backend=backend), devices=("cuda",))
            for name, backend in sdpa.BACKENDS.items()
        ),
        Provider("official", "peer", _official),
        Provider("flex", "peer", _flex),
    ],
)
