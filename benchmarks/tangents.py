"""Forward mode beside reverse mode: ``python -m benchmarks.tangents`` prints a table, and stores nothing.

For one shape of each operator: the forward, forward and backward, the tangents of out and lse, and, as the peer,
``torch.func.jvp`` of PyTorch's attention, forward and tangent at once; of its backends ATen's formula alone has a
forward mode. The peer gathers keys and pairs frames by copies, as one would; the bias is built before it is timed.
Memory is that beyond the results. A tangent that is wrong is not timed.
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

OPS = torch.ops.vattn
COLUMNS = ("forward", "+ backward", "tangent", "(f + t) / (f + b)", "MiB", "peer", "MiB", "peer / (f + t)")


@dataclasses.dataclass(frozen=True)
class Example:
    """A call of an operator, as functions of the inputs ``(query, key, value)``, and the same attention by `peer`."""

    name: str
    inputs: list[Tensor]
    forward: Callable[..., Sequence[Tensor]]  # of inputs: out, lse, ...
    backward: Callable[..., Any]  # of grad_out, inputs, out, lse
    tangent: Callable[..., tuple[Tensor, Tensor]]  # of tangents, inputs, out, lse
    peer: Callable[..., Tensor]  # of inputs: out


def _random(*shapes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """As linear layers leave them, channels of a head beside those of the next: (B, H, ..., D)."""
    return [torch.randn(B, *tokens, H, D, device=device).to(dtype).movedim(-2, 1) for B, H, *tokens, D in shapes]


def examples(dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """One typical shape of each operator."""
    random = functools.partial(_random, dtype=dtype, device=device)
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    scale = 64**-0.5

    leap = (4, 2, 0, 0.0, None, scale)
    yield Example(
        "leap_attention B=1 T=8 N=196 H=12 D=64 leap=4",
        random(*[(1, 12, 8, 196, 64)] * 3),
        lambda *x: OPS.leap_attention(*x, *leap),
        lambda grad, *x: OPS.leap_attention_backward(grad, None, *x, *leap),
        lambda dx, *x: OPS.leap_attention_jvp(*dx, *x, *leap),
        lambda *x: _frames(attend(*(_pairs(y) for y in x))),
    )

    latent = (None, 0.0, None, scale)
    yield Example(
        "latent_attention B=1 Lq=256 Lk=8192 H=16 D=64",
        random((1, 16, 256, 64), (1, 16, 8192, 64), (1, 16, 8192, 64)),
        lambda q, k, v: OPS.latent_attention(q, [k], [v], *latent),
        lambda grad, q, k, v, *results: OPS.latent_attention_backward(grad, None, q, [k], [v], *results, *latent),
        lambda dx, q, k, v, *results: OPS.latent_attention_jvp(dx[0], [dx[1]], [dx[2]], q, [k], [v], *results, *latent),
        attend,
    )

    kept = torch.randperm(3137, device=device)[:1000].sort().values[None]
    nodes = (kept, 0.0, None, scale)
    yield Example(
        "node_sparse_attention B=1 Lq=512 Lk=3137 K=1000 H=12 D=64",
        random((1, 12, 512, 64), (1, 12, 3137, 64), (1, 12, 3137, 64)),
        lambda *x: OPS.node_sparse_attention(*x, *nodes),
        lambda grad, *x: OPS.node_sparse_attention_backward(grad, None, *x, *nodes),
        lambda dx, *x: OPS.node_sparse_attention_jvp(*dx, *x, *nodes),
        lambda q, k, v: attend(q, k[:, :, kept[0]], v[:, :, kept[0]]),
    )

    axial = (0.0, None, 120**-0.5)
    for outer, line, inner in ((4, 32, 32), (1, 4, 1024)):
        yield Example(
            f"axial_attention B=2 outer={outer} line={line} inner={inner} H=2 D=120",
            random(*[(2, 2, outer, line, inner, 120)] * 3),
            lambda *x: OPS.axial_attention(*x, *axial),
            lambda grad, *x: OPS.axial_attention_backward(grad, None, *x, *axial),
            lambda dx, *x: OPS.axial_attention_jvp(*dx, *x, *axial),
            lambda *x: attend(*(y.transpose(3, 4) for y in x)).transpose(3, 4),
        )

    layout = vattn.BlockLayout.local_random(1568, 56, num_local=1, num_random=3).to(device)
    transposed, window = layout.transpose(), (8, 14, 14)
    table = torch.randn_like(vattn.RelativePositionBias3D(window, num_heads=12).table).to(device)
    bias = vattn.RelativePositionBias3D(window, num_heads=12)
    bias.table.data = table
    graph = (layout.row_offsets, layout.columns)
    sizes = (layout.block_size, layout.num_global, table, list(window), None, False, 0.0, None, scale)
    backward_graph = (*graph, transposed.row_offsets, transposed.columns)
    counts = layout.token_counts().log().to(table.dtype)
    mask = (counts + bias(torch.arange(1568, device=device)).detach()).to(dtype)
    yield Example(
        "edge_sparse_attention B=1 G=1 N=1568 block=56, 4 blocks each, bias, H=12 D=64",
        random(*[(1, 12, 1569, 64)] * 3),
        lambda *x: OPS.edge_sparse_attention(*x, *backward_graph, *sizes, False),
        lambda grad, *x: OPS.edge_sparse_attention_backward(grad, None, *x, *backward_graph, *sizes, False),
        lambda dx, *x: OPS.edge_sparse_attention_jvp(*dx, torch.zeros_like(table), *x, *graph, *sizes),
        lambda *x: attend(*x, attn_mask=mask.to(x[0].dtype)),
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
    out, lse, *_ = example.forward(*inputs)

    def peer(dtype: torch.dtype = out.dtype) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(
                example.peer, tuple(x.to(dtype) for x in inputs), tuple(x.to(dtype) for x in tangents)
            )[1]

    exact = peer(torch.float64)
    error, plain = ((x.double() - exact).abs().max() for x in (example.tangent(tangents, *inputs, out, lse)[0], peer()))
    budget = 2 * plain + torch.finfo(out.dtype).eps * exact.abs().max()
    if not error <= budget:
        raise RuntimeError(f"{example.name}: the tangent is off by {error:.2e}, allowed {budget:.2e}")

    def forward_and_backward() -> object:
        out, lse, *_ = example.forward(*inputs)
        return example.backward(grad_out, *inputs, out, lse)

    functions: dict[str, Callable[[], object]] = {
        "forward": lambda: example.forward(*inputs),
        "backward": forward_and_backward,
        "tangent": lambda: example.tangent(tangents, *inputs, out, lse),
        "peer": peer,
    }
    spreads = time_interleaved(functions, device, rounds)
    forward, backward, tangent, peer_time = (spreads[name].median for name in functions)
    result = out.numel() * out.element_size() + 4 * lse.numel()
    extra, peer_extra = ((peak_memory(functions[name], device) - result) / 2**20 for name in ("tangent", "peer"))
    return [
        f"{forward * 1e3:.2f} ms",
        f"{backward * 1e3:.2f} ms",
        f"{tangent * 1e3:.2f} ms",
        f"{(forward + tangent) / backward:.2f}",
        f"{extra:.2f}",
        f"{peer_time * 1e3:.2f} ms",
        f"{peer_extra:.2f}",
        f"{peer_time / (forward + tangent):.2f}x",
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
