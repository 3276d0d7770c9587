"""Forward mode beside reverse mode: ``python -m benchmarks.tangents`` prints a table, and stores nothing.

For one shape of each operator: the forward, forward and backward, and ``torch.func.jvp``: the forward and its tangent.
The peer is ``torch.func.jvp`` of PyTorch's attention: of its backends only the plain formula has a forward mode.
The peer gathers keys and pairs frames by copies, as one would; the bias is built before it is timed. Memory is that
beyond the results. A tangent that is wrong is not timed.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vattn
from benchmarks.measure import peak_memory, time_interleaved

COLUMNS = ("forward", "+ backward", "jvp", "jvp / (f + b)", "MiB", "peer's jvp", "MiB", "speedup")


@dataclasses.dataclass(frozen=True)
class Example:
    """A call of an operator, as a function of the inputs ``(query, key, value)``, and the same attention by `peer`."""

    name: str
    inputs: list[Tensor]
    attend: Callable[..., Any]
    peer: Callable[..., Tensor]


def _random(*shapes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """As linear layers leave them, channels of a head beside those of the next: (B, H, ..., D)."""
    return [torch.randn(B, *tokens, H, D, device=device).to(dtype).movedim(-2, 1) for B, H, *tokens, D in shapes]


def examples(dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """One typical shape of each operator."""
    random = functools.partial(_random, dtype=dtype, device=device)
    sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention

    yield Example(
        "leap_attention B=1 T=8 N=196 H=12 D=64 leap=4",
        random(*[(1, 12, 8, 196, 64)] * 3),
        functools.partial(vattn.leap_attention, leap=4),
        lambda *x: _frames(sdpa(*(_pairs(y) for y in x))),
    )
    yield Example(
        "latent_attention B=1 Lq=256 Lk=8192 H=16 D=64",
        random((1, 16, 256, 64), (1, 16, 8192, 64), (1, 16, 8192, 64)),
        vattn.latent_attention,
        sdpa,
    )
    kept = torch.randperm(3137, device=device)[:1000].sort().values[None]
    yield Example(
        "node_sparse_attention B=1 Lq=512 Lk=3137 K=1000 H=12 D=64",
        random((1, 12, 512, 64), (1, 12, 3137, 64), (1, 12, 3137, 64)),
        functools.partial(vattn.node_sparse_attention, kept=kept),
        lambda q, k, v: sdpa(q, k[:, :, kept[0]], v[:, :, kept[0]]),
    )
    for outer, line, inner in ((4, 32, 32), (1, 4, 1024)):
        yield Example(
            f"axial_attention B=2 outer={outer} line={line} inner={inner} H=2 D=120",
            random(*[(2, 2, outer, line, inner, 120)] * 3),
            functools.partial(vattn.axial_attention, dim=1),
            lambda *x: sdpa(*(y.transpose(3, 4) for y in x)).transpose(3, 4),
        )
    layout, window = vattn.BlockLayout.local_random(1568, 56, num_local=1, num_random=3).to(device), (8, 14, 14)
    bias = vattn.RelativePositionBias3D(window, num_heads=12).to(device).requires_grad_(False)
    torch.nn.init.normal_(bias.table)
    mask = (layout.token_counts().log().to(bias.table.dtype) + bias(torch.arange(1568, device=device))).to(dtype)
    yield Example(
        "edge_sparse_attention B=1 G=1 N=1568 block=56, 4 blocks each, bias, H=12 D=64",
        random(*[(1, 12, 1569, 64)] * 3),
        functools.partial(vattn.edge_sparse_attention, layout=layout, position_bias=bias),
        lambda *x: sdpa(*x, attn_mask=mask.to(x[0].dtype)),
    )


def _pairs(x: Tensor) -> Tensor:
    """(B, H, 8, N, D), of which frames 4 apart form pairs, as (B, H, 4, 2 * N, D)."""
    return x.unflatten(2, (2, 4)).transpose(2, 3).flatten(3, 4)


def _frames(x: Tensor) -> Tensor:
    return x.unflatten(3, (2, -1)).transpose(2, 3).flatten(2, 3)


def measure(example: Example, device: torch.device, rounds: int) -> list[str]:
    """The cells of one row; raises where the tangent is wrong."""
    inputs = example.inputs
    tangents, grad_out = [torch.randn_like(x) for x in inputs], torch.randn_like(inputs[0])

    def pushed(attend: Callable[..., Tensor], dtype: torch.dtype = inputs[0].dtype) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(attend, tuple(x.to(dtype) for x in inputs), tuple(x.to(dtype) for x in tangents))[1]

    exact = pushed(example.peer, torch.float64)
    error, plain = ((pushed(attend).double() - exact).abs().max() for attend in (example.attend, example.peer))
    budget = 2 * plain + torch.finfo(inputs[0].dtype).eps * exact.abs().max()
    if not error <= budget:
        raise RuntimeError(f"{example.name}: the tangent is off by {error:.2e}, allowed {budget:.2e}")

    def forward_and_backward() -> object:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(example.attend(*leaves), leaves, grad_out)

    functions: dict[str, Callable[[], object]] = {
        "forward": lambda: example.attend(*inputs),
        "backward": forward_and_backward,
        "jvp": lambda: pushed(example.attend),
        "peer": lambda: pushed(example.peer),
    }
    spreads = time_interleaved(functions, device, rounds)
    forward, backward, jvp, peer = (spreads[name].median for name in functions)
    results = 2 * inputs[0].numel() * inputs[0].element_size()
    extra, peer_extra = ((peak_memory(functions[name], device) - results) / 2**20 for name in ("jvp", "peer"))
    return [
        f"{forward * 1e3:.2f} ms",
        f"{backward * 1e3:.2f} ms",
        f"{jvp * 1e3:.2f} ms",
        f"{jvp / backward:.2f}",
        f"{extra:.2f}",
        f"{peer * 1e3:.2f} ms",
        f"{peer_extra:.2f}",
        f"{peer / jvp:.2f}x",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Forward mode beside reverse mode.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--operators", nargs="+", help="names; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="how often the functions take turns")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    print("  ".join(name.rjust(11) for name in COLUMNS))
    for example in examples(getattr(torch, options.dtype), device):
        if options.operators is None or example.name.split()[0] in options.operators:
            cells = measure(example, device, options.rounds)
            print(example.name, options.dtype)
            print(
                "  ".join(cell.rjust(max(11, len(name))) for name, cell in zip(COLUMNS, cells, strict=True)), flush=True
            )


if __name__ == "__main__":
    main()
