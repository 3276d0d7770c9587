"""Node-sparse attention as SViTT's text encoder uses it: words read the tokens of a video that were kept.

    leaves  query (B, Lq, H * D), then key and value (B, Lk, H * D), as linear layers leave them
    output  (B, Lq, H * D)

A peer gathers the kept keys and values first, which are the same for all heads of a sample.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import vattn
from benchmarks import sdpa
from benchmarks.registry import Case, Operator, Provider, Run


@dataclasses.dataclass(frozen=True)
class NodeCase(Case):
    """Lq queries over K of Lk keys, H heads of size D."""

    B: int
    Lq: int
    Lk: int
    K: int
    H: int = 12
    D: int = 64

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [(self.B, length, self.H * self.D) for length in (self.Lq, self.Lk, self.Lk)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.Lq, self.H * self.D)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * self.Lq

    @property
    def forward_flops(self) -> int:
        return 2 * 2 * self.num_rows * self.K * self.D

    def kept(self, like: Tensor) -> Tensor:
        """Which keys the samples of `like` read: all the same ones, drawn, but always the same."""
        order = torch.randperm(self.Lk, generator=torch.Generator().manual_seed(0))
        return order[: self.K].sort().values.to(like.device).expand(len(like), -1)

    def heads(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Views (B, H, L, D)."""
        return tuple(x.unflatten(-1, (self.H, self.D)).transpose(1, 2) for x in leaves)

    def reference(self, *leaves: Tensor) -> Tensor:
        query, key, value = self.heads(leaves)
        out = vattn.reference.node_sparse_attention(query, key, value, self.kept(query))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(-2)


def _vattn(case: NodeCase, device: torch.device) -> Run:
    kept = case.kept(torch.empty(case.B, device=device))

    def run(*leaves: Tensor) -> Tensor:
        query, key, value = case.heads(leaves)
        out = vattn.node_sparse_attention(query, key, value, kept)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(-2)

    return run


def _sdpa(case: NodeCase, device: torch.device, backend: SDPBackend | None = None) -> Run:
    attend, index = sdpa.attention(backend), case.kept(torch.empty(case.B, device=device))[..., None]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gathered = (x.gather(1, index.expand(-1, -1, x.shape[2])) for x in (key, value))
        return attend(*case.heads((query, *gathered))).transpose(1, 2).flatten(-2)

    return run


OPERATOR = Operator(
    name="node_sparse_attention",
    cases={
        "default": [NodeCase(2, 32, 1569, K) for K in (157, 784)] + [NodeCase(1, 785, 785, 392)],
        "gpu": [NodeCase(64, 32, 1569, K) for K in (157, 784)] + [NodeCase(32, 785, 785, 392)],
        "quick": [NodeCase(2, 3, 20, 7, H=2, D=8)],
    },
    providers=[
        Provider("vattn", "vattn", _vattn),
        Provider("sdpa", "peer", _sdpa),
        *(
            Provider(f"sdpa-{name}", "peer", functools.partial(_sdpa, backend=backend), devices=("cuda",))
            for name, backend in sdpa.BACKENDS.items()
        ),
    ],
)
