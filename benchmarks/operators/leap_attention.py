"""Leap attention with its periodic shift, between the qkv projection and the output projection.

    leaf    (B, T, N, 3, H, D)     as a linear layer leaves it
    output  (B, T, N, H * D)       as the next linear layer takes it

Every provider reads the same leaf, pairs the frames, attends, undoes the pairing and shifts. What PyTorch can
do without a copy is done without one: with ``leap=1`` the frames of a pair already lie side by side.
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
class LeapCase(Case):
    """B clips of T frames of N tokens, H heads of size D, in pairs of frames `leap` apart."""

    B: int
    T: int
    N: int
    H: int
    D: int
    leap: int
    fold_div: int = 4

    def __post_init__(self) -> None:
        if self.T % (2 * self.leap) != 0:
            raise ValueError(f"LeapCase: T must be a multiple of 2 * leap (the peers need whole pairs), got T={self.T}")

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [(self.B, self.T, self.N, 3, self.H, self.D)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.T, self.N, self.H * self.D)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * self.T * self.N

    @property
    def forward_flops(self) -> int:
        return 2 * 2 * self.num_rows * (2 * self.N) * self.D

    def reference(self, *leaves: Tensor) -> Tensor:
        out = vattn.reference.leap_attention(*_heads(leaves[0]), self.leap, fold_div=self.fold_div)
        assert isinstance(out, Tensor)
        return out.movedim(1, -2).flatten(-2)


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``(B, H, T, N, D)`` of query, key and value. Unbinding in place keeps the gradient contiguous."""
    query, key, value = qkv.unbind(3)
    return query.movedim(-2, 1), key.movedim(-2, 1), value.movedim(-2, 1)


def _shift(x: Tensor, fold_div: int) -> Tensor:
    """The periodic shift of ``x (B, T, ..., D)``, written as one would: slices into zeros; with 0 there is none."""
    if fold_div == 0:
        return x.contiguous()
    fold = x.shape[-1] // fold_div
    out = torch.zeros_like(x)
    out[:, :-1, ..., :fold] = x[:, 1:, ..., :fold]
    out[:, 1:, ..., fold : 2 * fold] = x[:, :-1, ..., fold : 2 * fold]
    out[..., 2 * fold :] = x[..., 2 * fold :]
    return out


def _pair(case: LeapCase, qkv: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value as ``(B * T/2, H, 2N, D)``: at most one copy, of whole frames."""
    spans = qkv.unflatten(1, (-1, 2, case.leap))  # (B, T / 2leap, 2, leap, N, 3, H, D)
    pairs = spans.transpose(2, 3).reshape(-1, 2 * case.N, 3, case.H, case.D)
    return tuple(x.transpose(1, 2) for x in pairs.unbind(2))


def _unpair(case: LeapCase, out: Tensor) -> Tensor:
    """From ``(B * T/2, H, 2N, D)`` to ``(B, T, N, H, D)``: at most one copy, of whole frames."""
    spans = out.transpose(1, 2).reshape(case.B, -1, case.leap, 2, case.N, case.H, case.D)
    return spans.transpose(2, 3).reshape(case.B, case.T, case.N, case.H, case.D)


def _finish(case: LeapCase, out: Tensor) -> Tensor:
    """From ``(B * T/2, H, 2N, D)`` to the output."""
    return _shift(_unpair(case, out), case.fold_div).flatten(-2)


def _vattn(case: LeapCase, device: torch.device) -> Run:
    def run(qkv: Tensor) -> Tensor:
        out = vattn.leap_attention(*_heads(qkv), case.leap, fold_div=case.fold_div)
        assert isinstance(out, Tensor)
        return out.movedim(1, -2).flatten(-2)

    return run


def _sdpa(case: LeapCase, device: torch.device, backend: SDPBackend | None = None) -> Run:
    attend = sdpa.attention(backend)

    def run(qkv: Tensor) -> Tensor:
        return _finish(case, attend(*_pair(case, qkv)))

    return run


def _sdpa_pregathered(case: LeapCase, device: torch.device, backend: SDPBackend | None = None) -> Run:
    """Attention alone, on pairs that already lie side by side: what a perfect gather and shift would leave."""
    return sdpa.attention(backend)


def _pregather(case: LeapCase, qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in _pair(case, qkv))


def _official(case: LeapCase, device: torch.device) -> Run:
    """The formula of the authors' code: frames by index, the scores in memory, the frames back by index."""
    early = [t for t in range(case.T) if t // case.leap % 2 == 0]
    paired = torch.tensor(early + [t + case.leap for t in early], device=device)
    restored = paired.argsort()
    scale = case.D**-0.5

    def run(qkv: Tensor) -> Tensor:
        frames = (x[:, paired].movedim(-2, 2) for x in qkv.unbind(3))  # (B, T, H, N, D), early then late
        query, key, value = (torch.cat(x.chunk(2, 1), 3) for x in frames)  # (B, T/2, H, 2N, D)
        weights = (query @ key.transpose(-2, -1) * scale).softmax(-1)
        out = torch.cat((weights @ value).chunk(2, 3), 1)[:, restored]
        return _shift(out, case.fold_div).transpose(2, 3).flatten(-2)

    return run


def _flex(case: LeapCase, device: torch.device) -> Run:
    """FlexAttention over the whole clip, with a block mask of the leap groups; the shift is compiled with it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def group(token: Tensor) -> Tensor:
        frame = token // case.N
        return frame // (2 * case.leap) * (2 * case.leap) + frame % case.leap

    def same_group(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return group(query) == group(key)

    tokens = case.T * case.N
    mask = create_block_mask(same_group, None, None, tokens, tokens, device=device)

    def run(qkv: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in qkv.flatten(1, 2).unbind(2))  # (B, H, T * N, D)
        out = flex_attention(query, key, value, block_mask=mask).transpose(1, 2)
        return _shift(out.unflatten(1, (case.T, case.N)), case.fold_div).flatten(-2)

    torch.compiler.reset()  # each case compiles the same code: do not run into the limit of recompilations
    return torch.compile(run, fullgraph=True, dynamic=False)


OPERATOR = Operator(
    name="leap_attention",
    cases={
        "default": [
            LeapCase(1, 8, 197, 12, 64, 4),
            LeapCase(1, 8, 197, 12, 64, 1),
            LeapCase(2, 16, 197, 12, 64, 4),
            LeapCase(1, 8, 196, 6, 64, 2),
            LeapCase(1, 8, 49, 6, 128, 2),
            LeapCase(1, 32, 256, 8, 80, 8),
        ],
        "gpu": [
            LeapCase(32, 8, 197, 12, 64, 4),
            LeapCase(32, 8, 197, 12, 64, 1),
            LeapCase(16, 16, 196, 12, 64, 4),
            LeapCase(8, 32, 196, 16, 64, 8),
            LeapCase(16, 8, 197, 16, 128, 4),
            LeapCase(4, 16, 784, 12, 64, 4),
            LeapCase(2, 32, 784, 16, 128, 8),
            LeapCase(2, 64, 784, 12, 64, 16),
        ],
        "quick": [LeapCase(1, 4, 9, 2, 16, 2), LeapCase(2, 4, 5, 1, 8, 1)],
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
        Provider("sdpa-pregathered", "limit", _sdpa_pregathered, before=_pregather, after=_finish),
        *(
            Provider(
                f"{name}-pregathered",
                "limit",
                functools.partial(_sdpa_pregathered, backend=backend),
                devices=("cuda",),
                before=_pregather,
                after=_finish,
            )
            for name, backend in sdpa.BACKENDS.items()
        ),
    ],
)
