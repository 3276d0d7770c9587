"""What sparse edges and pruned nodes save in a training step of SViTT's video encoder, in time, memory and FLOP.

    python -m benchmarks.pruned_encoder           measure, print, append benchmarks/results/pruned_encoder.jsonl
    python -m benchmarks.pruned_encoder --show    print the last run that was stored

A step is forward and backward, in float32, for one video::

    dense     every token reads every token, with this library's kernels, too
    edges     a block of tokens reads itself, three random ones and the global token
    both      and layers 3, 6 and 9 keep 0.6 of the tokens: 3136, 1882, 1130, 678

New edges are drawn in each layer of each step. On paper counts multiply-adds: of projections, attention and MLP. Every
setting has a process of its own, so that the peak of its memory is its own, too.

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

import argparse
import dataclasses
import datetime
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import records
from benchmarks.steps import Cost, cost_apart, cost_of
from vattn.models.svitt import Sparsity, VideoEncoder

NAME = "pruned_encoder"
SETTINGS = {
    "dense": Sparsity(num_random=None, keep=1.0),
    "edges": Sparsity(keep=1.0),
    "both": Sparsity(keep=0.6),
}
PATCH_SIZE = 16


class Sizes(NamedTuple):
    """Of the encoder; the official ones for 16 frames."""

    num_frames: int = 16
    image_size: int = 224
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    block_size: int = 56

    @property
    def mlp_dim(self) -> int:
        return 4 * self.dim

    def sparsity(self, setting: str) -> Sparsity:
        return dataclasses.replace(SETTINGS[setting], block_size=self.block_size)


@dataclasses.dataclass(frozen=True)
class Line(records.Origin):
    """One setting.

    Attributes:
        multiply_adds: of the forward; a backward has twice as many everywhere, not counting what it computes again.
    """

    dtype: str
    sizes: dict[str, int]
    setting: str
    multiply_adds: int
    cost: Cost


def build(setting: str, sizes: Sizes) -> VideoEncoder:
    return VideoEncoder(
        sizes.num_frames,
        image_size=sizes.image_size,
        patch_size=PATCH_SIZE,
        dim=sizes.dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_dim=sizes.mlp_dim,
        sparsity=sizes.sparsity(setting),
    )


def multiply_adds(setting: str, sizes: Sizes) -> int:
    """Of a forward, by the shapes of the layers: patches, projections, edges of the attention, MLP.

    Example:
        >>> multiply_adds("dense", Sizes(num_frames=1, image_size=32, dim=1, depth=1)) == (
        ...     4 * 3 * 16**2  # 4 patches of 16 x 16 pixels
        ...     + 5 * (4 + 2 * 4)  # 5 tokens through four projections, and an MLP four times as wide
        ...     + 2 * 5**2  # their scores, and their values
        ... )
        True
    """
    sparsity = sizes.sparsity(setting)
    tokens = sizes.num_frames * (sizes.image_size // PATCH_SIZE) ** 2
    generator = torch.Generator().manual_seed(0)  # a last block that is short is read by some, by chance
    total = float(tokens * 3 * PATCH_SIZE**2 * sizes.dim)
    for layer in range(sizes.depth):
        layout = sparsity.layout(tokens, generator)
        pairs = (1 + tokens) ** 2 * (1.0 if layout is None else layout.density)
        total += (1 + tokens) * (4 * sizes.dim**2 + 2 * sizes.dim * sizes.mlp_dim) + 2 * pairs * sizes.dim
        if layer in sparsity.prune_after:
            tokens = math.ceil(sparsity.keep * tokens)
    return round(total)


def measure(setting: str, sizes: Sizes, rounds: int, limit: float) -> Cost:
    """Do at most `rounds` steps, and no more once they have taken `limit` seconds together; in this process."""
    torch.manual_seed(0)
    encoder = build(setting, sizes)
    video = torch.randn(1, sizes.num_frames, 3, sizes.image_size, sizes.image_size)
    target = torch.randn(1, sizes.dim)

    def step() -> None:
        loss = F.mse_loss(encoder(video).pooled, target)
        encoder.zero_grad()
        loss.backward()

    return cost_of(step, rounds, limit)


def run(settings: Sequence[str], sizes: Sizes, rounds: int, limit: float, folder: pathlib.Path) -> list[Line]:
    """Measure each setting in a process of its own; store the lines."""
    shared = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **records.environment(torch.device("cpu")),
        "dtype": "float32",
        "sizes": sizes._asdict(),
    }
    lines = []
    for setting in settings:
        options: dict[str, Any] = {"settings": setting, "rounds": rounds, "limit": limit, **sizes._asdict()}
        cost = cost_apart(f"benchmarks.{NAME}", options)
        lines.append(Line(**shared, setting=setting, multiply_adds=multiply_adds(setting, sizes), cost=cost))
        records.append(_path(folder), [dataclasses.asdict(lines[-1])])
    return lines


def load(folder: pathlib.Path) -> list[Line]:
    """The lines of the last run."""
    rows = records.read(_path(folder), f"python -m benchmarks.{NAME}")
    lines = [Line(**(fields | {"cost": Cost(**fields["cost"])})) for fields in rows]
    return [line for line in lines if line.run == lines[-1].run]


def table(lines: Sequence[Line]) -> str:
    """The settings below each other, each amount also as a share of the first one's."""
    first = lines[0]
    sizes = ", ".join(f"{name} {size}" for name, size in first.sizes.items())
    text = [
        f"one training step, {first.dtype}, batch 1, {sizes}; {first.machine}, {first.threads} threads, "
        f"torch {first.versions['torch']}, run of {first.run} at {first.commit[:9]}",
        "",
        f"| setting | multiply-adds, G | of {first.setting} | median, s | p20 .. p80, s | of {first.setting} "
        f"| peak, MiB | of the steps, MiB | of {first.setting} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        cost = line.cost
        of_steps, of_first_steps = (x.peak - x.before for x in (cost, first.cost))
        cells = [
            *(line.setting, f"{line.multiply_adds / 1e9:.3g}", f"{line.multiply_adds / first.multiply_adds:.3f}"),
            *(f"{cost.median:.3f}", f"{cost.p20:.3f} .. {cost.p80:.3f}", f"{cost.median / first.cost.median:.3f}"),
            *(f"{cost.peak / 2**20:.0f}", f"{of_steps / 2**20:.0f}", f"{of_steps / of_first_steps:.3f}"),
        ]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7, help="most steps that are timed of a setting")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds: no more steps after")
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--here", action="store_true", help="one setting, in this process, which prints it as JSON")
    options = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes._fields})
    if options.here:
        cost = measure(options.settings[0], sizes, options.rounds, options.limit)
        print(json.dumps(dataclasses.asdict(cost)))
        return
    if not options.show:
        run(options.settings, sizes, options.rounds, options.limit, options.results)
    print(table(load(options.results)))


def _path(folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{NAME}.jsonl"


if __name__ == "__main__":
    main()
