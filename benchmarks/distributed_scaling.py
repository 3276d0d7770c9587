"""A model of how the operators scale over GPUs: no GPU is used, and no time here was measured.

    python -m benchmarks.distributed_scaling          a table and a plot: benchmarks/results/distributed-scaling.*

Bytes are exact: each function of ``vattn.distributed`` runs on tensors without data, over ranks on paper, as
``vattn.distributed.bytes_sent`` does. Arithmetic is that of the operators' own counts. Times follow from both by a
model whose speeds are options:

    compute     floating-point operations of the rank that has most of them / (--tflops)
    all_to_all  bytes handed / bandwidth + latency
    all_reduce  2 (R - 1) / R x bytes / bandwidth + 2 log2(R) x latency      ring for the bytes, tree for the latency
    all_gather  (R - 1) x bytes / bandwidth + log2(R) x latency

The bandwidth is --node-gb-per-s where all ranks share a node of --node ranks, else --network-gb-per-s. Nothing overlaps
in this model: a step is the sum of both.
"""

import argparse
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import records
from vattn import BlockLayout
from vattn.distributed.bytes_sent import calls

NAME = "distributed-scaling"
HEADS, HEAD_DIM, FRAME, BLOCK, LATENTS = 16, 64, 256, 64, 256
RANKS = (8, 16, 32, 64, 128, 256, 512)
TOKENS = (65_536, 262_144, 1_048_576)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speeds in SI units, by which bytes and arithmetic become seconds."""

    flops: float
    node: int
    node_bandwidth: float
    network_bandwidth: float
    latency: float

    def seconds(self, kind: str, handed: int, size: int) -> float:
        """Of a collective of `size` ranks, each of which hands over so many bytes."""
        bandwidth = self.node_bandwidth if size <= self.node else self.network_bandwidth
        hops = math.log2(size)
        if kind == "all_to_all":
            return handed / bandwidth + self.latency
        if kind == "all_reduce":
            return 2 * (size - 1) / size * handed / bandwidth + 2 * hops * self.latency
        return (size - 1) * handed / bandwidth + hops * self.latency


@dataclasses.dataclass(frozen=True)
class Step:
    """A forward and a backward of one operator on the rank that takes longest."""

    case: str
    tokens: int
    size: int
    sent: int
    compute: float
    communication: float

    @property
    def share(self) -> float:
        """Of the step, what is communication."""
        return self.communication / max(self.compute + self.communication, 1e-30)


def _rows(*tokens: int) -> Tensor:
    return torch.empty(1, HEADS, *tokens, HEAD_DIM, dtype=torch.bfloat16, device="meta")


def _shares(total: int, size: int) -> list[int]:
    return [total * (rank + 1) // size - total * rank // size for rank in range(size)]


def _encode(tokens: int, size: int, rank: int) -> tuple[str, list[Any], dict[str, Any]]:
    lengths = _shares(tokens, size)
    return "latent_attention", [_rows(LATENTS), *[_rows(lengths[rank])] * 2], {"lengths": lengths}


def _decode(tokens: int, size: int, rank: int) -> tuple[str, list[Any], dict[str, Any]]:
    lengths = _shares(tokens, size)
    inputs = [_rows(lengths[rank]), *[_rows(LATENTS)] * 2]
    return "latent_attention", inputs, {"lengths": lengths, "sharded": "queries"}


def _leap(level: int) -> Callable[[int, int, int], tuple[str, list[Any], dict[str, Any]]]:
    def case(tokens: int, size: int, rank: int) -> tuple[str, list[Any], dict[str, Any]]:
        frames = tokens // FRAME
        lengths = _shares(frames, size)
        leap = max(frames >> level, 1) if level else 1
        return "leap_attention", [*[_rows(lengths[rank], FRAME)] * 3, leap], {"lengths": lengths, "fold_div": 4}

    return case


def _axial(dim: int) -> Callable[[int, int, int], tuple[str, list[Any], dict[str, Any]]]:
    def case(tokens: int, size: int, rank: int) -> tuple[str, list[Any], dict[str, Any]]:
        side = math.isqrt(FRAME)
        lengths = _shares(tokens // FRAME, size)
        return "axial_attention", [*[_rows(lengths[rank], side, side)] * 3, dim], {"lengths": lengths}

    return case


def _edge(tokens: int, size: int, rank: int) -> tuple[str, list[Any], dict[str, Any]]:
    blocks = tokens // BLOCK
    layout = BlockLayout.local_random(tokens, BLOCK, generator=torch.Generator().manual_seed(0))
    lengths = [BLOCK * share for share in _shares(blocks, size)]
    return "edge_sparse_attention", [*[_rows(1 + lengths[rank])] * 3, layout], {"lengths": lengths}


def _node(tokens: int, size: int, rank: int) -> tuple[str, list[Any], dict[str, Any]]:
    lengths = _shares(tokens, size)
    kept = torch.empty(1, tokens // 10 // size, dtype=torch.int64, device="meta")  # as many as a rank has on average
    return "node_sparse_attention", [_rows(LATENTS), *[_rows(lengths[rank])] * 2, kept], {"lengths": lengths}


CASES: dict[str, Callable[[int, int, int], tuple[str, list[Any], dict[str, Any]]]] = {
    "latent attention, keys sharded": _encode,
    "latent attention, queries sharded": _decode,
    "leap attention, neighbours (leap 1)": _leap(0),
    "leap attention, half the clip apart": _leap(1),
    "axial attention along time": _axial(0),
    "axial attention along a row": _axial(2),
    "edge-sparse attention, 1 local + 3 random": _edge,
    "node-sparse attention, a tenth kept": _node,
}
"""Tokens, ranks and the rank to a function, its inputs and its settings."""


def step(case: str, tokens: int, size: int, machine: Machine, ranks: Sequence[int] | None = None) -> Step:
    """The step of a case: of the first, the middle and the last rank, that which takes longest."""
    worst: Step | None = None
    for rank in sorted({0, size // 2, size - 1} if ranks is None else set(ranks)):
        op, inputs, settings = CASES[case](tokens, size, rank)
        with FlopCounterMode(display=False) as counter:
            made = calls(op, *inputs, rank=rank, size=size, backward=True, **settings)
        communication = sum(machine.seconds(kind, handed, size) for kind, handed in made)
        sent = sum(handed for _, handed in made)
        found = Step(case, tokens, size, sent, counter.get_total_flops() / machine.flops, communication)
        if worst is None or found.compute + found.communication > worst.compute + worst.communication:
            worst = found
    assert worst is not None
    return worst


def steps(tokens: Sequence[int], ranks: Sequence[int], machine: Machine) -> Iterator[Step]:
    from tqdm import tqdm

    combinations = [(case, n, size) for case in CASES for n in tokens for size in ranks]
    for case, n, size in tqdm(combinations, desc="on paper", leave=False):
        if n // FRAME >= size:
            yield step(case, n, size, machine)


def table(found: Sequence[Step]) -> str:
    """One row for each case and number of tokens: a column for each number of ranks."""
    sizes = sorted({one.size for one in found})
    lines = ["| operator | tokens | half is sending from | " + " | ".join(f"{size} GPUs" for size in sizes) + " |"]
    lines.append("|---|---|---|" + "---|" * len(sizes))
    by_row: dict[tuple[str, int], dict[int, Step]] = {}
    for one in found:
        by_row.setdefault((one.case, one.tokens), {})[one.size] = one
    for (case, tokens), row in by_row.items():
        cells = [_cell(row[size]) if size in row else "" for size in sizes]
        takes_over = next((f"{size} GPUs" for size in sizes if size in row and row[size].share >= 0.5), "-")
        lines.append(f"| {case} | {tokens:,} | {takes_over} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(one: Step) -> str:
    milliseconds = 1e3 * (one.compute + one.communication)
    return f"{one.sent / 2**20:.2f} MiB, {milliseconds:.3f} ms, {100 * one.share:.0f} %"


def plot(found: Sequence[Step], path: pathlib.Path) -> None:
    """Time of a step over the number of ranks, a panel for each number of tokens; dashed: without communication."""
    from matplotlib.figure import Figure

    counts, sizes = sorted({one.tokens for one in found}), sorted({one.size for one in found})
    figure = Figure(figsize=(5.5 * len(counts), 5.5), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for axes, tokens in zip(panels, counts, strict=True):
        for number, case in enumerate(CASES):
            row = [one for one in found if one.case == case and one.tokens == tokens]
            whole = [1e3 * (one.compute + one.communication) for one in row]
            axes.plot([one.size for one in row], whole, color=f"C{number}", marker="o", markersize=3, label=case)
            compute = [1e3 * one.compute for one in row]
            axes.plot([one.size for one in row], compute, "--", color=f"C{number}", linewidth=0.8)
        axes.set(title=f"{tokens:,} tokens", xlabel="GPUs", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, labels=[str(size) for size in sizes])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward, ms (model; dashed: compute alone)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME.replace('-', '_')}", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of the whole video")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--tflops", type=float, default=400, help="of a GPU, in these operators, 10**12 per second")
    parser.add_argument("--node", type=int, default=8, help="GPUs that share a node")
    parser.add_argument("--node-gb-per-s", type=float, default=450, help="of a GPU within a node, one direction")
    parser.add_argument("--network-gb-per-s", type=float, default=50, help="of a GPU between nodes, one direction")
    parser.add_argument("--latency-us", type=float, default=10, help="of one message")
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    machine = Machine(
        1e12 * options.tflops, options.node, 1e9 * options.node_gb_per_s, 1e9 * options.network_gb_per_s,
        1e-6 * options.latency_us,
    )  # fmt: skip
    found = list(steps(options.tokens, options.ranks, machine))
    text = (
        "# How far the operators scale, on paper\n\n"
        "A model, not a measurement: bytes are exact, times follow from the speeds below. Each cell: what the slowest "
        "of three ranks hands to collectives, the time of a forward and a backward, and the share of it that is "
        f"communication. bfloat16, {HEADS} heads of {HEAD_DIM}, {LATENTS} latents, {FRAME} tokens a frame, blocks of "
        f"{BLOCK}.\n\n{options.tflops:g} TFLOP/s, {options.node_gb_per_s:g} GB/s within a node of {options.node}, "
        f"{options.network_gb_per_s:g} GB/s between nodes, {options.latency_us:g} us latency.\n\n"
    )
    text += table(found) + "\n\n![time over the number of GPUs](distributed-scaling.png)\n"
    (options.results / f"{NAME}.md").write_text(text)
    plot(found, options.results / f"{NAME}.png")
    print(text)


if __name__ == "__main__":
    main()
