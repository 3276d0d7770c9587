"""Edge-sparse attention over the layouts of video models, against what one would write without it.

    python -m benchmarks.video_layouts               measure, print, append benchmarks/results/video_layouts.jsonl
    python -m benchmarks.video_layouts --build       how long it takes to build layouts of 29 x 45 x 80 tokens
    python -m benchmarks.video_layouts --help        all settings

    leaves  query, key and value (B, N, H * D), as linear layers leave them, tokens in raster order
    output  (B, N, H * D)

vattn reads tiles where they lie. The peers are

    sdpa    scaled dot product attention with the layout's mask of N x N
    gather  the tokens copied into the order of the tiles, and for every tile the keys and values that it reads copied
            beside each other; then scaled dot product attention. Needs tiles that read equally many
    flex    FlexAttention, compiled, on tokens copied into the order of the tiles

Columns are those of ``python -m benchmarks``.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

import vattn
from benchmarks import records, report
from benchmarks.gate import Pass
from benchmarks.harness import Session
from benchmarks.records import Line
from benchmarks.registry import Case, Operator, Provider, Run
from vattn import BlockLayout

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class VideoCase(Case):
    """B clips of a grid of tokens, H heads of size D, over the layout `pattern`: "sliding_tile" or "neighborhood"."""

    pattern: str
    grid: Sizes
    tile: Sizes
    window: Sizes
    B: int = 1
    H: int = 2
    D: int = 64

    @property
    def N(self) -> int:
        """How many tokens there are."""
        return math.prod(self.grid)

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [self.output_shape] * 3

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, self.N, self.H * self.D)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * self.N

    @property
    def density(self) -> float:
        """The share of the pairs of tokens that are read."""
        return self.layout(torch.device("cpu")).density

    @property
    def forward_flops(self) -> int:
        return round(2 * 2 * self.num_rows * self.N * self.density * self.D)

    def layout(self, device: torch.device) -> BlockLayout:
        """Who reads whom."""
        if self.pattern == "sliding_tile":
            return BlockLayout.sliding_tile(self.grid, self.tile, self.window).to(device)
        return BlockLayout.neighborhood(self.grid, self.window, tile=self.tile).to(device)

    def heads(self, *leaves: Tensor) -> list[Tensor]:
        """Views (B, H, N, D)."""
        return [x.unflatten(-1, (self.H, self.D)).transpose(1, 2) for x in leaves]

    def reference(self, *leaves: Tensor) -> Tensor:
        """The definition, head by head, and each again in the backward: the scores of all are gigabytes in float64."""
        layout = self.layout(leaves[0].device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = vattn.reference.edge_sparse_attention(query, key, value, layout)
            assert isinstance(out, Tensor)
            return out

        heads = zip(*(x.split(1, 1) for x in self.heads(*leaves)), strict=True)
        return merge(torch.cat([checkpoint(attend, *head, use_reentrant=False) for head in heads], 1))


def merge(out: Tensor) -> Tensor:
    """From (B, H, N, D) to the output."""
    return out.transpose(1, 2).flatten(-2)


def _vattn(case: VideoCase, device: torch.device) -> Run:
    layout = case.layout(device)

    def run(*leaves: Tensor) -> Tensor:
        query, key, value = case.heads(*leaves)
        out = vattn.edge_sparse_attention(query, key, value, layout)
        assert isinstance(out, Tensor)
        return merge(out)

    return run


def _sdpa(case: VideoCase, device: torch.device) -> Run:
    mask = case.layout(device).to_mask()

    def run(*leaves: Tensor) -> Tensor:
        query, key, value = case.heads(*leaves)
        return merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))

    return run


def _tiles(case: VideoCase, device: torch.device) -> BlockLayout:
    """The layout, of whole tiles."""
    layout = case.layout(device)
    if layout.num_blocks * layout.block_size != case.N:
        raise ValueError(f"VideoCase: tile must divide grid {case.grid} for this provider, got tile={case.tile}")
    return layout


def _in_order_of_tiles(case: VideoCase, layout: BlockLayout, attend: Callable[..., Tensor]) -> Run:
    """`attend` on tokens in the order of the tiles: a copy of each there, and one of the output back."""
    order = torch.arange(case.N, device=layout.device) if layout.order is None else layout.order.long()
    back = order.argsort()

    def run(*leaves: Tensor) -> Tensor:
        out = attend(*(x.index_select(2, order) for x in case.heads(*leaves)))
        return merge(out.index_select(2, back))

    return run


def _gather(case: VideoCase, device: torch.device) -> Run:
    layout = _tiles(case, device)
    counts = layout.row_offsets[0].diff()
    if (counts != counts[0]).any():
        raise ValueError(f"VideoCase: every tile must read as many for this provider, got {case.pattern}")
    reads, size = layout.columns.long().view(layout.num_blocks, -1), layout.block_size

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # (B, H, N, D) to (B, H, tiles, keys, D), and heads and tiles to one axis
        keys, values = (x.unflatten(2, (-1, size))[:, :, reads].flatten(3, 4).flatten(1, 2) for x in (key, value))
        out = F.scaled_dot_product_attention(query.unflatten(2, (-1, size)).flatten(1, 2), keys, values)
        return out.unflatten(1, (case.H, -1)).flatten(2, 3)

    return _in_order_of_tiles(case, layout, attend)


def _flex(case: VideoCase, device: torch.device) -> Run:
    """On a CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout = _tiles(case, device)
    reads, size = layout.block_counts()[0] > 0, layout.block_size

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return reads[query // size, key // size]

    mask = create_block_mask(visible, None, None, case.N, case.N, device=device, BLOCK_SIZE=size)
    torch.compiler.reset()  # each case compiles the same code: do not run into the limit of recompilations
    compiled = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), fullgraph=True, dynamic=False)
    return _in_order_of_tiles(case, layout, compiled)


OPERATOR = Operator(
    name="video_layouts",
    cases={
        "default": [
            VideoCase("sliding_tile", (8, 32, 32), (1, 2, 32), (3, 5, 1)),  # tiles of consecutive tokens: no order
            VideoCase("sliding_tile", (8, 32, 32), (2, 4, 4), (3, 3, 3)),
            VideoCase("neighborhood", (8, 32, 32), (4, 4, 4), (3, 7, 5)),
            VideoCase("neighborhood", (9, 31, 29), (4, 4, 4), (3, 7, 5)),
        ],
        "quick": [VideoCase("sliding_tile", (4, 4, 4), (2, 2, 2), (1, 1, 2), B=2, H=1, D=16)],
    },
    providers=[
        Provider("vattn", "vattn", _vattn),
        Provider("sdpa", "peer", _sdpa),
        Provider("gather", "peer", _gather),
        Provider("flex", "peer", _flex),
    ],
)

FULL_SIZE = (29, 45, 80)
BUILDS: dict[str, Callable[[], BlockLayout]] = {
    "neighborhood(window=(13, 25, 25), tile=(4, 4, 4))": lambda: BlockLayout.neighborhood(FULL_SIZE, (13, 25, 25)),
    "sliding_tile(tile=(6, 8, 8), window=(3, 3, 3))": lambda: BlockLayout.sliding_tile(FULL_SIZE, (6, 8, 8), (3, 3, 3)),
    "sliding_tile(tile=(4, 4, 4), window=(3, 5, 9))": lambda: BlockLayout.sliding_tile(FULL_SIZE, (4, 4, 4), (3, 5, 9)),
    "radial(block_size=64, decay=0.5)": lambda: BlockLayout.radial(FULL_SIZE, 64, decay=0.5),
}


def build_times() -> str:
    """A line per layout of FULL_SIZE: its sizes, and the median time to build it."""
    rows = [f"{'layout of 29 x 45 x 80 tokens':50}  blocks  entries  density  time"]
    for name, build in BUILDS.items():
        timer = Timer("build()", globals={"build": build}, num_threads=torch.get_num_threads())
        layout, median = build(), timer.blocked_autorange(min_run_time=0.5).median
        sizes = f"{layout.num_blocks:6}  {layout.columns.numel():7}  {layout.density:7.1%}"
        rows.append(f"{name:50}  {sizes}  {median * 1e3:.0f} ms")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is 1 if vattn was wrong or could not run somewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.video_layouts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--build", action="store_true", help="only the time that layouts of full size take to build")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", choices=OPERATOR.cases, default="default")
    parser.add_argument("--providers", nargs="+", choices=[p.name for p in OPERATOR.providers])
    parser.add_argument("--rounds", type=int, default=7, help="how often the providers take turns (default: 7)")
    parser.add_argument("--no-store", action="store_true", help="print only")
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.build:
        print(build_times())
        return 0
    passes: list[Pass] = ["forward", "forward+backward"]
    session = Session(OPERATOR, torch.float32, torch.device(options.device), options.providers, options.rounds)
    lines: list[Line] = []
    for case in OPERATOR.cases[options.cases]:
        for measured in session.measure(case, passes):
            print(report.table(measured), end="\n\n", flush=True)
            if not options.no_store:
                records.store(measured, options.results)
            lines += measured
    print(report.summary(lines))
    return int(any(line.role == "vattn" and line.reason is not None for line in lines))


if __name__ == "__main__":
    sys.exit(main())
